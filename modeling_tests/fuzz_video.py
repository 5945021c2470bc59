"""
Broken video files, many and from a seed: each must give frames or a `VideoReadError`, soon, and leave nothing behind.

    python modeling_tests/fuzz_video.py [--files 5000] [--seed 0] [--seconds 20]

Small files of every kind that PyAV writes are cut short, overwritten here and there, given other numbers in their
headers, or joined to pieces of one another. They are read in a few processes, each of which says which file it reads,
so that a crash or a hang is known by its file; open files and memory are counted before and after.
"""

import argparse
import gc
import json
import os
import random
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

CODECS = {
    "a.mp4": ("libx264", {"gop": 6, "bframes": 2}),
    "b.mkv": ("libx264", {"gop": 6, "bframes": 2}),
    "c.ts": ("libx264", {"gop": 6, "bframes": 2}),
    "d.webm": ("libvpx-vp9", {"gop": 6}),
    "e.webm": ("libvpx", {"gop": 6}),
    "f.avi": ("mpeg4", {"gop": 6}),
    "g.mp4": ("libx265", {"gop": 6, "options": {"x265-params": "log-level=none"}}),
    "h.mov": ("prores_ks", {"pix_fmt": "yuv422p10le"}),
    "i.mkv": ("mjpeg", {}),
    "j.gif": ("gif", {}),
    "k.apng": ("apng", {"pix_fmt": "rgb24"}),
    "l.flv": ("libx264", {"gop": 6}),
    "m.mp4": ("libsvtav1", {"gop": 6}),
    "n.mp4": ("mpeg4", {"gop": 6, "faststart": True}),
}
MEMORY = 400  # MB that a process may grow by, over all its files; libraries keep some of what they once needed


def originals(folder: Path) -> list[bytes]:
    from video_files import has_encoder, moving_square, write_video

    frames = moving_square(20, 48, 64)
    found = []
    for name, (codec, options) in CODECS.items():
        if has_encoder(codec):
            found.append(write_video(folder / name, frames, codec=codec, **options).read_bytes())
    import PIL.Image

    first, *others = (PIL.Image.fromarray(frame) for frame in frames[:8])
    first.save(folder / "o.webp", save_all=True, append_images=others, duration=100)
    return [*found, (folder / "o.webp").read_bytes()]


def broken(whole: list[bytes], seed: int) -> bytes:
    """One broken file, the same for the same seed."""
    draw = random.Random(seed)
    data = bytearray(draw.choice(whole))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at = draw.randrange(max(len(data), 1))
        near = draw.randrange(min(len(data), 1200) or 1)  # where the headers are
        kind = draw.choice(["cut", "bytes", "bits", "header", "number", "hole", "repeat", "join", "swap", "tail"])
        if kind == "cut":
            del data[at:]
        elif kind == "tail":
            del data[:near]
        elif kind == "bytes":
            for _ in range(draw.choice([1, 4, 32])):
                data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == "bits":
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "header":
            for _ in range(draw.choice([1, 2, 8])):
                data[draw.randrange(min(len(data), 1200))] = draw.randrange(256)
        elif kind == "number":
            value = draw.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16, 0x7F7F7F7F])
            data[near : near + 4] = value.to_bytes(4, draw.choice(["big", "little"]))
        elif kind == "hole":
            data[at : at + draw.randrange(400)] = bytes(draw.randrange(400))
        elif kind == "repeat":
            data[at:at] = data[at : at + draw.randrange(1, 3000)]
        elif kind == "join":
            data[at:] = draw.choice(whole)[draw.randrange(200) :]
        elif kind == "swap":
            piece = bytes(data[at : at + 64])
            data[near : near + 64] = piece
        if not data:
            break
    return bytes(data)


# ---- the process that reads ----


def read_all(folder: Path, first: int, step: int, last: int) -> None:
    from linvt_hf.video_limits import Limits
    from linvt_hf.video_reading import VideoReadError, read_video

    warnings.simplefilter("ignore")
    whole = [file.read_bytes() for file in sorted(folder.glob("*.original"))]
    limits = Limits(frame_pixels=2**22, frames=200, seconds=15)
    for seed in range(first, first + 3 * step, step):  # libraries are loaded, and threads started
        _try(read_video, VideoReadError, broken(whole, seed), seed, limits)
    before = _held()
    for seed in range(first, last, step):
        print(f"at {seed}", flush=True)
        began = time.monotonic()
        outcome = _try(read_video, VideoReadError, broken(whole, seed), seed, limits)
        print(json.dumps({"seed": seed, "outcome": outcome, "seconds": time.monotonic() - began}), flush=True)
    files, memory = (after - then for after, then in zip(_held(), before, strict=True))
    print(json.dumps({"files": files, "memory": memory}), flush=True)


WAYS = (
    {"num_frames": 5},
    {"num_frames": None},
    {"fps": 3.0},
    {"times": [0.3, 1.0]},
    {"num_frames": 4, "exact": False},
)


def _try(read, expected: type, data: bytes, seed: int, limits) -> str:
    ways = (
        {"num_frames": 5},
        {"num_frames": None},
        {"fps": 3.0},
        {"times": [0.3, 1.0]},
        {"num_frames": 4, "exact": False},
    )
    way = dict(ways[seed % len(ways)], on_error=("raise", "keep")[seed // 7 % 2], threads=1 + seed % 2)
    try:
        frames = read(data, limits=limits, **way).frames
    except expected as error:
        sentence = str(error)
        return f"not a sentence: {sentence!r}" if "\n" in sentence or not sentence.endswith(".") else "VideoReadError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "frames" if frames.ndim == 4 and frames.dtype.itemsize == 1 and len(frames) else "no frames"


def _held() -> tuple[int, float]:
    """Open files, and megabytes in use."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ---- the process that watches ----


def fuzz(count: int, seed: int, seconds: float, processes: int) -> list[str]:
    """What went wrong, a line each; nothing, if all is well."""
    wrong, outcomes, slowest = [], Counter(), 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, data in enumerate(originals(folder)):
            (folder / f"{number:02}.original").write_bytes(data)
        waiting = [(seed + start, processes, seed + count) for start in range(processes)]
        running: dict = {}
        watch = selectors.DefaultSelector()
        while waiting or running:
            while waiting and len(running) < processes:
                task = waiting.pop()
                command = [sys.executable, __file__, "--read", name, *map(str, task)]
                reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                watch.register(reader.stdout, selectors.EVENT_READ, reader)
                running[reader] = {"task": task, "at": None, "since": time.monotonic(), "whole": False}
            for key, _ in watch.select(timeout=1.0):
                reader, line = key.data, key.data.stdout.readline()
                state = running[reader]
                if line.startswith("at "):
                    state.update(at=int(line[3:]), since=time.monotonic())
                elif line:
                    said = json.loads(line)
                    if "outcome" in said:
                        kind = said["outcome"]
                        outcomes[kind if kind in ("frames", "VideoReadError") else "wrong"] += 1
                        slowest = max(slowest, said["seconds"])
                        if kind not in ("frames", "VideoReadError"):
                            wrong.append(f"file {said['seed']}: {kind}")
                    else:
                        state["whole"] = True
                        if said["files"] > 0:
                            wrong.append(f"{said['files']} files were left open")
                        if said["memory"] > MEMORY:
                            wrong.append(f"a process grew by {said['memory']:.0f} MB")
                        print(f"a process ended with {said['files']} more open files and {said['memory']:.0f} MB more")
                else:
                    _end(reader, state, running, watch, waiting, wrong, f"crashed the reader ({reader.wait()})")
            for reader, state in list(running.items()):
                if time.monotonic() - state["since"] > seconds:
                    reader.kill()
                    _end(reader, state, running, watch, waiting, wrong, f"took longer than {seconds} seconds")
    print(f"{sum(outcomes.values())} files, seed {seed}: {dict(outcomes)}; the slowest took {slowest:.1f} s")
    return wrong


def _end(reader, state, running, watch, waiting, wrong, how: str) -> None:
    """Of a process, whose files that are left go to another."""
    watch.unregister(reader.stdout)
    reader.stdout.close()
    reader.wait()
    del running[reader]
    if not state["whole"]:
        wrong.append(f"file {state['at']}: {how}")
        first, step, last = state["task"]
        following = (first if state["at"] is None else state["at"]) + step
        if state["at"] is not None and following < last:
            waiting.append((following, step, last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="that one file may take")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--read", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        folder, *numbers = args.read
        read_all(Path(folder), *map(int, numbers))
        return
    if wrong := fuzz(args.files, args.seed, args.seconds, args.processes):
        raise SystemExit("\n".join(wrong[:50]))


if __name__ == "__main__":
    main()
