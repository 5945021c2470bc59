"""
`linvt serve` under load on loopback: is every request answered, how long does each take, does memory stay flat.

    python benchmarks/serving.py                # 50 requests at a time, ten rounds, the small model that ships
    python benchmarks/serving.py --json FILE

The server runs in a process of its own. Each round asks all requests at once, in an order of its own: questions on
several videos of shapes, as data: URLs, half of them streamed; some of 720p; and some videos that are broken. An
answer is right if it is the one that the model gives alone, and so is the word that a video is broken.
"""

import argparse
import asyncio
import base64
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
from batch import hd
from measuring import environment, save, show

from linvt_hf.asking.loading import load_pipeline
from linvt_hf.shapes.videos import write_split

MODEL = Path("examples/linvt-shapes")
WORDS = "What shape flashes up?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cache-mb", type=int, default=0, help="of encoded videos that are remembered (0: none)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        requests = make_requests(Path(folder), args.model, args.at_once)
    command = [sys.executable, "-m", "linvt_hf.cli", "serve", args.model, "--port", "0", "--name", "model"]
    with subprocess.Popen(
        [*command, "--batch-size", str(args.batch_size), "--cache-mb", str(args.cache_mb)],
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        for line in server.stderr:
            if found := re.search(r"at (http://\S+)", line):
                break
        rows = []
        for number in range(args.rounds):
            random.Random(number).shuffle(requests)
            measured = asyncio.run(one_round(found[1], requests))
            time.sleep(0.5)  # memory is that of a server that nobody asks
            rows.append({"round": number + 1, **measured, **memory(server.pid)})
            print(json.dumps(rows[-1]), file=sys.stderr)
        server.terminate()
    show(rows, {name: ".2f" if " s" in name else ".0f" for name in rows[0]})
    save(args.json, {**environment("cpu"), "batch_size": args.batch_size, "cache_mb": args.cache_mb, "rows": rows})


def make_requests(folder: Path, model: str, count: int) -> list[tuple[str, str, str | None]]:
    """A video as a data: URL, a question, and the model's own answer; None where the video is broken."""
    pipeline = load_pipeline(model)
    file = next(file for file in write_split(folder, "video", "test", 8) if "captions" not in file.name)
    asked = [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()]
    pairs = [(folder / video["video"], words["text"]) for video, words in asked]
    (folder / "hd").mkdir()
    hd(folder / "hd", 1)
    pairs += [(path, WORDS) for path in (folder / "hd").glob("*.mp4")] * (len(pairs) // 8)
    random.Random(0).shuffle(pairs)
    broken = [(url(b"no video"), WORDS, None), (url(pairs[0][0].read_bytes()[:2000]), WORDS, None)]
    requests = []
    for path, words in (pairs * count)[: count - 2 * len(broken)]:
        answer = pipeline(video=str(path), question=words, max_new_tokens=20, do_sample=False)[0]["answer"]
        requests.append((url(path.read_bytes()), words, answer))
    return requests + broken * 2


def url(data: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


async def one_round(server: str, requests: list[tuple[str, str, str | None]]) -> dict[str, float]:
    async with openai.AsyncOpenAI(base_url=server, api_key="none", max_retries=0, timeout=300) as client:
        began = time.perf_counter()
        results = await asyncio.gather(*(one(client, number, *request) for number, request in enumerate(requests)))
        seconds = time.perf_counter() - began
    times = sorted(taken for _, taken, _ in results)
    firsts = [first for _, _, first in results if first is not None]
    return {
        "right": sum(right for right, *_ in results),
        "of": len(results),
        "whole round, s": seconds,
        "median, s": statistics.median(times),
        "90 %, s": times[int(0.9 * len(times))],
        "slowest, s": times[-1],
        "first words, median, s": statistics.median(firsts),
    }


async def one(client: openai.AsyncOpenAI, number: int, video: str, words: str, expected: str | None):
    """Whether the answer is right, how long it took, and until its first words where they were streamed."""
    content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": words}]
    asked = {"model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 20}
    began, first = time.perf_counter(), None
    try:
        if number % 2:
            said = (await client.chat.completions.create(**asked)).choices[0].message.content
        else:
            said = ""
            async for piece in await client.chat.completions.create(**asked, stream=True):
                said += piece.choices[0].delta.content or ""
                first = first or time.perf_counter() - began if said else first
    except openai.BadRequestError:
        said = None
    return said == expected, time.perf_counter() - began, first


def memory(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return {"memory, MB": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024}


if __name__ == "__main__":
    main()
