"""
How many questions a second `linvt batch` answers with one worker and with two, and where one worker's time goes.

    python benchmarks/batch.py                # the small model that ships, on shapes and on 720p
    python benchmarks/batch.py --json FILE

Each worker is timed from its first chunk to its last, without the loading before, and both are run in turns. With one
worker the time is divided into waiting for frames, the vision encoder with LinVT's scoring, answering, and the rest.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import torch
from measuring import environment, save, show

from linvt_hf import pipeline_linvt
from linvt_hf.asking import batch
from linvt_hf.asking.batch import BatchSettings, Progress, Worker, run_batch
from linvt_hf.encoded_video import PixelStream
from linvt_hf.shapes.videos import write_split

MODEL = Path("examples/linvt-shapes")
CHUNKS = 8
QUESTIONS = ("What shape flashes up?", "How many shapes appear in all?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--videos", type=int, default=128, help="of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("16 frames of 64 x 64", shapes), ("10 s of 720p", hd)):
            videos = Path(folder) / name
            videos.mkdir()
            write(videos, args.videos)
            settings = BatchSettings(
                str(args.model), str(videos), QUESTIONS, num_frames=16, max_new_tokens=8, chunk=args.videos // CHUNKS
            )
            rates = defaultdict(list)
            for _ in range(args.repeats):
                for workers in (1, 2):
                    rates[workers].append(rate(settings, workers))
            medians = {f"{workers} worker(s), questions/s": statistics.median(rates[workers]) for workers in (1, 2)}
            rows.append({"videos": name, **medians, **shares(settings)})
    show(rows, dict.fromkeys(rows[0], ".1f"))
    save(args.json, {**environment("cpu"), "rows": rows})


def shapes(folder: Path, count: int) -> None:
    write_split(folder, "video", "test", count)


def hd(folder: Path, count: int) -> None:
    """One file of noise that moves, under as many names."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)
    with av.open(str(folder / "0.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "60", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(300):
            picture = np.roll(noise, number, axis=1).repeat(8, axis=0).repeat(8, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    for number in range(1, count):
        shutil.copy(folder / "0.mp4", folder / f"{number}.mp4")


def rate(settings: BatchSettings, workers: int) -> float:
    """Questions a second after the first chunk."""
    seen: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        if progress.chunks > 0:
            seen.append((time.perf_counter(), progress.answered))

    with tempfile.TemporaryDirectory() as output:
        run_batch(settings, Path(output), workers=workers, say=note)
    # With two, the first two chunks come nearly at once.
    (begin, before), (end, after) = seen[workers - 1], seen[-1]
    return (after - before) / (end - begin)


def shares(settings: BatchSettings) -> dict[str, float]:
    """Of one worker's time, after a chunk that warms it up."""
    worker = Worker(settings, None, batch_size=8)
    chunks = [asked for _, asked in batch._chunks(settings, range(CHUNKS))]
    worker(chunks[0])
    spent: dict[str, float] = defaultdict(float)
    model, frames, begin_work = worker.pipeline.model, PixelStream.on, pipeline_linvt._begun

    def timed(name, function):
        def call(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begin

        return call

    def waiting(self, device):
        stream = frames(self, device)
        while (chunk := timed("frames", next)(stream, None)) is not None:
            yield chunk

    def begun(work):
        future = begin_work(work)
        future.result = timed("opening", future.result)
        return future

    model.encode_videos, model.generate = timed("encoding", model.encode_videos), timed("answering", model.generate)
    PixelStream.on, pipeline_linvt._begun = waiting, begun
    begin = time.perf_counter()
    try:
        for asked in chunks[1:]:
            worker(asked)
    finally:
        PixelStream.on, pipeline_linvt._begun = frames, begin_work
    whole = time.perf_counter() - begin
    frames_wait = spent["opening"] + spent["frames"]
    encoding = spent["encoding"] - spent["frames"]
    parts = {"waiting for frames": frames_wait, "encoding": encoding, "answering": spent["answering"]}
    parts["the rest"] = whole - sum(parts.values())
    return {f"{name} %": 100 * seconds / whole for name, seconds in parts.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
