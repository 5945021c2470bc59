"""Videos in, sampled frames and their times out.

`read_video` takes a video in any of the forms people hold one (a file, its bytes, an array, a list of pictures) and
returns a `Clip`. This file stands alone, without the rest of the package, and needs PyAV only to read a video file.
"""

import contextlib
import io
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import PIL.Image
import torch

# In a list, files with these endings are the frames of one video. GIF is not among them: a list of GIFs is several.
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What Pillow raises for a file that is broken, or says it is so large that reading it would fill the memory.
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Clip:
    """Sampled frames of one video and when each is shown.

    frames: uint8 [T, H, W, 3], RGB, upright.
    times: float32 [T], seconds from the video's first frame; None where nobody knows (arrays, lists of pictures).
    duration: seconds of the whole source; None where unknown.
    total_frames: the number of frames the source holds.
    """

    frames: torch.Tensor
    times: torch.Tensor | None
    duration: float | None
    total_frames: int


def read_video(source: Any, *, num_frames: int | None = 32, fps: float | None = None) -> Clip:
    """Read one video and sample its frames.

    source: one of
        - a path (str or Path), a `file://` or http(s) URL, the bytes of a file, a binary file object (which is read
          from its start and left open);
        - a uint8 array or tensor [T, H, W, 3], or [T, 3, H, W] where that is not ambiguous;
        - a list of PIL images, of image paths, or of uint8 arrays [H, W, 3], all of one size;
        - a `Clip`, which is returned as it is.
    num_frames: how many frames, taken at the centres of that many equal segments; a shorter source gives each of its
        frames once. None sets no limit.
    fps: sample the frames nearest to 0, 1/fps, 2/fps, ... seconds instead, at most `num_frames` of them.

    Raises FileNotFoundError for a path that does not exist, and ValueError for a source that cannot be read or does
    not have the form above, for num_frames < 1, fps <= 0, or fps where the source has no times.
    """
    if isinstance(source, Clip):
        return source
    sample_indices(1, num_frames)  # refuses a bad num_frames before any work
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be a positive number of frames per second or None, not {fps}.")
    choose = partial(_choose, num_frames=num_frames, fps=fps)
    if isinstance(source, np.ndarray | torch.Tensor):
        return _read_array(source, choose)
    if isinstance(source, list | tuple):
        return _read_images(source, choose)
    file, name = _locate(source)
    return (_read_webp if _is_webp(file) else _read_file)(file, name, choose)


def is_one_video(value: Any) -> bool:
    """True if `value` is one video in a form `read_video` takes, False if it is a list of videos.

    A list is one video when every item is a picture: a PIL image, an image path, or a 3-D array or tensor.
    """
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_image(item) for item in value)
    return not (isinstance(value, np.ndarray | torch.Tensor) and value.ndim > 4)


def sample_indices(total: int, num_frames: int | None) -> list[int]:
    """The centres of `num_frames` equal segments of `total` frames; every index once if there are no more frames."""
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1 or None for every frame, not {num_frames}.")
    if num_frames is None or num_frames >= total:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * num_frames) for i in range(num_frames)]


def _choose(
    name: str, total: int, times: list | None, duration: float | None, *, num_frames: int | None, fps: float | None
) -> list[int]:
    """Indices of the frames to keep, out of `total` shown at `times` (seconds, ascending)."""
    if total == 0:
        raise ValueError(f"{name} holds no frames.")
    if fps is None:
        return sample_indices(total, num_frames)
    if times is None:
        raise ValueError(f"fps={fps} needs a video with known times, and {name} has none: use num_frames instead.")
    # Frame i is nearest to the moments between the midpoints to its neighbours; the last one is shown to the end.
    # It is kept if a multiple of 1/fps lies there, so the work does not grow with fps.
    edges = [(left + right) / 2 for left, right in zip(times[:-1], times[1:], strict=True)]
    reached, kept = -1, []
    for index, edge in enumerate(edges):
        tick = math.floor(edge * fps)
        if tick > reached:
            kept.append(index)
            reached = tick
    end = max(duration or 0, times[-1])
    if math.ceil(end * fps - 1e-6) - 1 > reached or not kept:
        kept.append(total - 1)
    return [kept[i] for i in sample_indices(len(kept), num_frames)]


def _is_image(value: Any) -> bool:
    if isinstance(value, str | Path):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, PIL.Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 3)


def _check_pixels(pixels: np.ndarray | torch.Tensor, ndim: int, name: str) -> None:
    shape, dtype = list(pixels.shape), str(pixels.dtype).removeprefix("torch.")
    if len(shape) != ndim or 3 not in (shape[-1], shape[-3]):
        wanted = "[T, H, W, 3] or [T, 3, H, W]" if ndim == 4 else "[H, W, 3]"
        raise ValueError(f"{name} has shape {shape}, and {wanted} with RGB colours is expected.")
    if dtype != "uint8":
        raise ValueError(f"{name} is {dtype}, and uint8 0..255 is expected: cast it, after 255 * x for x in 0..1.")


def _to_tensor(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The same pixels on the CPU with the colours last."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(np.array(pixels))  # a copy: the caller's array may be read-only or reversed
    pixels = pixels.detach().cpu()
    return (pixels if pixels.shape[-1] == 3 else pixels.movedim(-3, -1)).contiguous()


def _read_array(video: np.ndarray | torch.Tensor, choose: Callable) -> Clip:
    name = f"the given {'array' if isinstance(video, np.ndarray) else 'tensor'}"
    _check_pixels(video, 4, name)
    picks = choose(name, len(video), None, None)
    return Clip(_to_tensor(video[picks]), None, None, len(video))


def _read_images(images: Sequence[Any], choose: Callable) -> Clip:
    name = f"the given list of {len(images)}"
    if images and not is_one_video(images):
        raise ValueError(f"{name} holds items that are not images: read a list of videos one video at a time.")
    frames: list[torch.Tensor] = []
    for index in choose(name, len(images), None, None):
        frame = _load_image(images[index], f"image {index} of {name}")
        if frames and frame.shape != frames[0].shape:
            one, other = (f"{shape[1]}x{shape[0]}" for shape in (frames[0].shape, frame.shape))
            raise ValueError(f"{name} has pictures of {one} and of {other} (width x height): resize them to one size.")
        frames.append(frame)
    return Clip(torch.stack(frames), None, None, len(images))


def _load_image(image: Any, name: str) -> torch.Tensor:
    if isinstance(image, np.ndarray | torch.Tensor):
        _check_pixels(image, 3, name)
        return _to_tensor(image)
    if isinstance(image, PIL.Image.Image):
        return _to_tensor(np.asarray(image.convert("RGB")))
    file, path = _locate(image)
    try:
        with PIL.Image.open(file) as opened:
            return _to_tensor(np.asarray(opened.convert("RGB")))
    except BROKEN_IMAGE as error:
        raise ValueError(f"{name}, {path}, cannot be read as an image from disk.") from error


def _locate(source: Any) -> tuple[Any, str]:
    """What to open (path or URL string, or a seekable binary file object) and its name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        file, name = io.BytesIO(source), f"the given file of {len(source)} bytes"
    elif isinstance(source, str | Path):
        path = str(source)
        scheme = path.split("://")[0].lower() if isinstance(source, str) and "://" in path else None
        if scheme in ("http", "https"):
            return path, repr(path.split("?")[0])  # a signed URL's query is not for logs
        if scheme == "file":
            path = url2pathname(urlsplit(path).path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path[:200]!r} is neither an existing file nor a file:// or http(s):// URL.")
        if os.path.isdir(path):
            raise ValueError(f"{path!r} is a folder, not a video file: give its images as a list of paths.")
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path!r} is empty (0 bytes).")
        return os.path.abspath(path), repr(path)  # absolute, so that no name looks like one of FFmpeg's protocols
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = f"the file object {getattr(source, 'name', type(source).__name__)!r}"
        file = source if hasattr(source, "seekable") and source.seekable() else io.BytesIO(source.read())
    else:
        raise ValueError(
            f"a {type(source).__name__} is not a video: give a path, URL, bytes, binary file object, uint8 array or "
            "tensor [T, H, W, 3], or list of images."
        )
    file.seek(0, io.SEEK_END)
    if file.tell() == 0:
        raise ValueError(f"{name} is empty (0 bytes).")
    return file, name


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Reading a video file needs PyAV: pip install av. Arrays, tensors and lists of images work without it."
        ) from error
    return av


def _read_file(file: Any, name: str, choose: Callable) -> Clip:
    av = _import_av()
    try:
        # Headers miscount and packets may not tell the truth either, so what they say is checked against the decoded
        # frames; where they are wrong, one more decode counts and dates the frames.
        frames = None
        stamps, times, duration = _scan(file, name, decode=False)
        if stamps:
            picks = choose(name, len(stamps), times, duration)
            frames = _decode(file, name, picks, stamps)
        if frames is None:
            stamps, times, duration = _scan(file, name, decode=True)
            picks = choose(name, len(stamps), times, duration)
            frames = _decode(file, name, picks, None)
    except av.error.FFmpegError as error:
        raise ValueError(f"{name} cannot be read as a video: {error.strerror}.") from error
    kept = None if times is None else torch.tensor([times[i] for i in picks[: len(frames)]], dtype=torch.float32)
    return Clip(torch.from_numpy(frames), kept, duration, len(stamps))


@contextmanager
def _opened(file: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, from the file's start."""
    if not isinstance(file, str):
        file.seek(0)
    av = _import_av()
    with av.open(file, metadata_errors="replace") as container:
        cover = av.stream.Disposition.attached_pic  # a song's cover is a video stream too
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise ValueError(f"{name} holds no video stream.")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """The frames that can be decoded, in the order they are shown."""
    damaged = _import_av().error.InvalidDataError
    for packet in container.demux(stream):
        with contextlib.suppress(damaged):  # the packets after it can be good
            yield from packet.decode()


def _scan(file: Any, name: str, decode: bool) -> tuple[list[int | None], list[float] | None, float | None]:
    """Each frame's timestamp in the order shown, its time in seconds from the first, and the seconds of the whole.

    The packets tell without decoding, unless one has no timestamp (then nothing is returned); with `decode`, the
    frames themselves do.
    """
    with _opened(file, name) as (container, stream):
        if decode:
            marks = [(frame.pts, frame.duration) for frame in _frames(container, stream)]
        else:
            marks = [(p.pts, p.duration) for p in container.demux(stream) if p.size and not p.is_discard]
            if any(pts is None for pts, _ in marks):
                return [], None, None
            marks.sort(key=lambda mark: mark[0])
        time_base, rate = stream.time_base, stream.average_rate
    stamps = [pts for pts, _ in marks]
    gap = float(1 / rate) if rate else None
    if stamps and None not in stamps and all(a < b for a, b in zip(stamps[:-1], stamps[1:], strict=True)):
        times = [float((pts - stamps[0]) * time_base) for pts in stamps]
        if marks[-1][1]:
            gap = float(marks[-1][1] * time_base)
        elif len(times) > 1:
            gap = times[-1] / (len(times) - 1)
    else:
        times = [index * gap for index in range(len(stamps))] if gap else None
    return stamps, times, times[-1] + gap if times and gap else None


def _decode(file: Any, name: str, picks: list[int], stamps: list[int] | None) -> np.ndarray | None:
    """Frames `picks` (ascending) as uint8 [T, H, W, 3]; None where the decoded frames do not match `stamps`."""
    pixels, count = None, 0
    with _opened(file, name) as (container, stream):
        convert = _import_av().video.reformatter.VideoReformatter()  # one for all: each new one starts its own threads
        for index, frame in enumerate(_frames(container, stream)):
            if stamps is not None and (index >= len(stamps) or frame.pts != stamps[index]):
                return None
            if index != picks[count]:
                continue
            if pixels is None:  # some streams change their size on the way: all frames get the first one's
                size = {"width": frame.width, "height": frame.height}
            picture = convert.reformat(frame, format="rgb24", **size).to_ndarray()
            picture = np.rot90(picture, round(frame.rotation / 90))  # both counterclockwise
            if pixels is None:
                pixels = np.empty((len(picks), *picture.shape), np.uint8)
            pixels[count] = picture
            count += 1
            if count == len(picks):
                return pixels
    return None if stamps is not None else pixels[:count]


def _is_webp(file: Any) -> bool:
    try:
        with PIL.Image.open(file, formats=["WEBP"]):
            return True
    except BROKEN_IMAGE:  # also a URL
        return False


def _read_webp(file: Any, name: str, choose: Callable) -> Clip:
    """An animated WebP, which FFmpeg does not decode and Pillow does."""
    ends, pixels = [0.0], []
    try:
        with PIL.Image.open(file) as image:
            for index in range(image.n_frames):
                image.seek(index)
                image.load()  # only now is the frame's duration known
                ends.append(ends[-1] + image.info.get("duration", 0) / 1000)
            picks = choose(name, len(ends) - 1, ends[:-1], ends[-1])
            for index in picks:
                image.seek(index)
                pixels.append(_load_image(image, name))
    except (OSError, EOFError) as error:
        raise ValueError(f"{name} cannot be read as an animated image.") from error
    return Clip(torch.stack(pixels), torch.tensor(ends)[picks], ends[-1] or None, len(ends) - 1)
