"""
Video readers side by side: time, processor time and memory to read a few frames of short and long files.

    python benchmarks/video_reading.py FOLDER [--files 10s-720p-h264-2s ...] [--frames 8 64 256] [--repeats 3]

Files are made first, in FOLDER, from ten seconds of moving shapes that are encoded once and repeated, so that hours
take seconds to write. Every reading is a process of its own, which reads the same evenly spaced frames as RGB; readers
take turns, and each number is the median over the repeats; what took half a minute is not repeated. Readers: ours;
`streamed`, ours 32 frames at a time; `least`, the decoding alone of the frames that are wanted or that a wanted one
needs, on as many threads, as if all else took no time; `sequential`, PyAV from the first frame to the last that is
wanted; transformers (its PyAV reader, which spaces frames its own way), torchcodec, OpenCV and decord where they are
installed. Those that decode all that comes before a frame (`sequential` and transformers) read no files of hours.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

SECONDS = {"10s": 10, "10min": 600, "2h": 7200}
SIZES = {"720p": (1280, 720), "1080p": (1920, 1080)}
CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9"}
FPS = 30
FILES = [
    *(f"{length}-{size}-h264-{gop}" for size in SIZES for length in SECONDS for gop in ("2s", "10s")),
    "10min-720p-hevc-2s",
    "10min-720p-vp9-2s",
]


# ---- files ----


def make(folder: Path, name: str) -> Path:
    """A file named by its length, size, codec and seconds between key frames."""
    length, size, codec, gop = name.split("-")
    suffix = ".webm" if codec == "vp9" else ".mp4"
    path, part = folder / f"{name}{suffix}", folder / f"part-{size}-{codec}-{gop}{suffix}"
    if not path.exists():
        if not part.exists():
            _encode(part, CODECS[codec], *SIZES[size], int(gop.rstrip("s")) * FPS)
        _repeat(part, path, SECONDS[length] // 10)
    return path


def _encode(path: Path, codec: str, width: int, height: int, gop: int) -> None:
    import av
    import numpy as np

    options = {
        "libx264": {"preset": "veryfast", "x264-params": "scenecut=0"},
        "libx265": {"preset": "ultrafast", "x265-params": "scenecut=0:open-gop=0:bframes=3:log-level=error"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"},
    }[codec]
    coarse = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    ground = coarse.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        for number in range(10 * FPS):
            picture = np.roll(ground, (2 * number, 3 * number), axis=(0, 1)).copy()
            left = 5 * number % (width - 200)
            picture[100:300, left : left + 200] = 255 - picture[100:300, left : left + 200]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _repeat(part: Path, path: Path, times: int) -> None:
    import av

    with av.open(str(part)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        step = round(10 / stream.time_base)
        copies = target.add_stream_from_template(stream)
        for number in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + number * step, packet.dts + number * step
                copy.duration, copy.time_base = packet.duration, stream.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, copies
                target.mux(copy)


# ---- readers: path, frames, threads -> uint8 [T, H, W, 3] and how many frames were decoded, if that is known ----


def ours(path: str, frames: int, threads: int):
    from linvt_hf.video_decoding import VideoFile
    from linvt_hf.video_sampling import sample_indices

    video = VideoFile(path, path, threads)
    _, _, pixels = video.read(lambda index: sample_indices(index.total, frames))
    return pixels, video.decoded


def streamed(path: str, frames: int, threads: int):
    """Of which no more than a few chunks are there at a time."""
    from linvt_hf.video_reading import stream_video

    for _, chunk in stream_video(path, num_frames=frames, threads=threads):
        del chunk
    return None, None


def least(path: str, frames: int, threads: int):
    """How long it takes is measured from when it is known what to decode."""
    from linvt_hf import video_decoding

    video = video_decoding.VideoFile(path, path, threads)
    index = video.by_table() or video.by_packets()
    packets = [int(index.order[pick]) for pick in _evenly(index.total, frames)]
    all_at_once = [video_decoding.Stretch(0, max(packets), {packet: slot for slot, packet in enumerate(packets)})]
    stretches = video_decoding._stretches(index, _evenly(index.total, frames)) or all_at_once
    readers = min(threads, len(stretches))
    waiting = deque(video_decoding._joined(stretches, readers, frames))

    def decode(_):
        with video.opened(max(threads // readers, 1)) as (container, stream):
            count, fresh = 0, True
            with contextlib.suppress(IndexError):
                while stretch := waiting.popleft():
                    packets = video._packets(container, stream, index, stretch.start, fresh, lambda: None)
                    count += sum(1 for _ in video_decoding._frames_of(packets, stream, index, stretch))
                    fresh = False
            return count

    began = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        decoded = sum(pool.map(decode, range(readers)))
    return None, decoded, time.perf_counter() - began


def sequential(path: str, frames: int, threads: int):
    """Decoding from the first frame to the last that is wanted, and converting those."""
    import av
    import numpy as np

    pixels, number = [], 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        wanted = set(_evenly(round(float(container.duration / av.time_base) * FPS), frames))
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                pixels.append(frame.to_ndarray(format="rgb24"))
                if len(pixels) == len(wanted):
                    break
    return np.stack(pixels), number + 1


def transformers(path: str, frames: int, threads: int):
    from transformers.video_utils import load_video

    return load_video(path, num_frames=frames, backend="pyav")[0], None


def torchcodec(path: str, frames: int, threads: int):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=threads)
    return decoder.get_frames_at(_evenly(len(decoder), frames)).data.numpy(), None


def opencv(path: str, frames: int, threads: int):
    import cv2
    import numpy as np

    cv2.setNumThreads(threads)
    capture, pixels = cv2.VideoCapture(path), []
    for index in _evenly(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), frames):
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        pixels.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return np.stack(pixels), None


def decord(path: str, frames: int, threads: int):
    from decord import VideoReader

    reader = VideoReader(path, num_threads=threads)
    return reader.get_batch(_evenly(len(reader), frames)).asnumpy(), None


READERS = {
    reader.__name__: reader for reader in (ours, streamed, least, sequential, transformers, torchcodec, opencv, decord)
}
DECODE_ALL = ("sequential", "transformers")


def _evenly(total: int, frames: int) -> list[int]:
    frames = min(frames, total)
    return [(2 * i + 1) * total // (2 * frames) for i in range(frames)]


# ---- measuring ----


def measure(reader: str, path: Path, frames: int, threads: int) -> dict:
    """In a process of its own; what it says is None if the reader is not there."""
    command = [sys.executable, __file__, "--one", reader, str(path), str(frames), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def one(reader: str, path: str, frames: str, threads: str) -> None:
    read = READERS[reader]
    with open(path, "rb") as file:  # from memory, for all alike
        while file.read(2**24):
            pass
    read(str(Path(path).with_name("warm-up.mp4")), 2, int(threads))  # libraries are loaded, and threads started
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    pixels, decoded, *timed = read(path, int(frames), int(threads))
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    beside = (after.ru_maxrss - before.ru_maxrss) / 1024 - (0 if pixels is None else pixels.nbytes / 2**20)
    result = {
        "seconds": timed[0] if timed else seconds,
        "processor_seconds": None if timed else used,
        "peak_megabytes_beside_frames": None if timed else max(beside, 0.0),
        "decoded": decoded,
    }
    if pixels is not None:
        result |= {"frames": len(pixels), "sum": int(pixels.sum(dtype="int64"))}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/videos"))
    parser.add_argument("--files", nargs="+", default=FILES, metavar="NAME", help=", ".join(FILES))
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    warm_up = args.folder / "warm-up.mp4"
    if not warm_up.exists():
        _encode(warm_up, "libx264", 320, 304, FPS)
    rows, missing = [], set()
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, commit {_commit()}")
    print("file                  frames  reader          seconds  of ours  processor s  peak MB  decoded")
    for name in args.files:
        path = make(args.folder, name)
        for frames in args.frames:
            runs: dict[str, list[dict]] = {}
            for _ in range(args.repeats):
                for reader in args.readers:
                    done = runs.setdefault(reader, [])
                    if reader in missing or (reader in DECODE_ALL and name.startswith("2h")):
                        continue
                    if not any("error" in run for run in done) and sum(run["seconds"] for run in done) < 30:
                        done.append(measure(reader, path, frames, args.threads))
            fastest = None
            for reader, several in runs.items():
                if problem := next((run["error"] for run in several if "error" in run), None):
                    print(f"{name:21} {frames:6}  {reader:12} {problem[:80]}", flush=True)
                    if "No module" in problem:
                        missing.add(reader)
                if problem or not several:
                    continue
                row = {"file": name, "frames": frames, "reader": reader, "decoded": several[0]["decoded"]}
                for key in ("seconds", "processor_seconds", "peak_megabytes_beside_frames"):
                    known = [run[key] for run in several if run[key] is not None]
                    row[key] = round(statistics.median(known), 3) if known else None
                if "sum" in several[0]:
                    row["same pixels as ours"] = several[0]["sum"] == runs["ours"][0].get("sum")
                rows.append(row)
                fastest = fastest or row["seconds"]
                numbers = [f"{row['seconds']:10.2f} {row['seconds'] / fastest:8.2f}"]
                for key, width, digits in (("processor_seconds", 12, 2), ("peak_megabytes_beside_frames", 8, 0)):
                    numbers.append(" " * width if row[key] is None else f"{row[key]:{width}.{digits}f}")
                print(f"{name:21} {frames:6}  {reader:12} {' '.join(numbers)}  {row['decoded'] or ''}", flush=True)
        if args.json:  # after each file: this takes long
            args.json.write_text(json.dumps({**_made_with(args.threads), "rows": rows}, indent=1) + "\n")


def _made_with(threads: int) -> dict:
    packages = {}
    for name in ("av", "transformers", "opencv-python-headless", "opencv-python", "decord", "torchcodec"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {"machine": platform.machine(), "threads": threads, "commit": _commit(), **packages}


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
