"""Videos in, sampled frames and their times out.

`read_video` takes a video in any of the forms people hold one (a file, its bytes, an array, a list of pictures) and
returns a `Clip`. This file and those it imports, `video_*.py`, stand alone, without the rest of the package, and need
PyAV only to read a video file.
"""

import contextlib
import io
import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch

from .video_decoding import VideoFile, check_count, check_size
from .video_index import VideoIndex, VideoReadError
from .video_sampling import Sampling
from .video_sources import IMAGE_SUFFIXES, Deadline, Limits, locate, located

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class VideoInfo:
    """
    What a video file is, without its frames.

    duration: seconds; fps: frames a second, on average; None where nobody knows.
    width, height: of the frames as they are shown.
    rotation: degrees, counterclockwise, by which the stored picture is turned before it is shown.
    codec, format: as libav calls them.
    num_frames: counted from the file's table of contents or its packets; by decoding only where these do not tell.
    problem: what is wrong with the file, as far as that shows without decoding more than its first frame.
    """

    duration: float | None
    fps: float | None
    width: int
    height: int
    rotation: int
    codec: str
    format: str
    num_frames: int
    problem: str | None


def video_info(source: Any, *, limits: Limits | None = None) -> VideoInfo:
    """
    Of a path, URL, bytes or file object. Raises what `read_video` raises, and `ValueError` for pictures.
    """
    limits = limits or Limits()
    with located(source, limits) as (file, name):
        if isinstance(file, list):
            raise ValueError(f"{name} is pictures, which have no times or codec; give a video file.")
        if _is_webp(file):
            with _opened_webp(file, name, limits) as (image, ends):
                total, duration = len(ends) - 1, ends[-1] or None
                return VideoInfo(duration, duration and total / duration, *image.size, 0, "webp", "webp", total, None)
        video = VideoFile(file, name, limits=limits)
        index = video.index()
        rotation = video.turned(index)
    width, height = (index.width, index.height) if rotation % 180 == 0 else (index.height, index.width)
    return VideoInfo(
        duration=index.duration,
        fps=index.total / index.duration if index.duration else None,
        width=width,
        height=height,
        rotation=rotation,
        codec=index.codec,
        format=index.format,
        num_frames=index.total,
        problem=index.problem,
    )


def read_video(
    source: Any,
    *,
    num_frames: int | None = 32,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    times: Sequence[float] | None = None,
    start: float | None = None,
    end: float | None = None,
    exact: bool = True,
    on_error: Literal["raise", "keep"] = "raise",
    threads: int | None = None,
    limits: Limits | None = None,
) -> Clip:
    """
    Reads one video and samples its frames.

    Args:
        source: one of
            - a path (str or Path), a `file://`, http(s) or `data:` URL, the bytes of a file, a binary file object
              (which is read from its start and left open);
            - a folder of images, or a glob such as "frames/*.png", in the order of the numbers in their names;
            - a uint8 array or tensor [T, H, W, 3], or [T, 3, H, W] where that is not ambiguous;
            - a list of PIL images, of image paths, or of uint8 arrays [H, W, 3], all of one size;
            - a `Clip`, which is returned as it is.
        num_frames: how many frames, taken at the centres of that many equal segments; a shorter source gives each of
            its frames once. None sets no limit.
        fps: the frames nearest to 0, 1/fps, 2/fps, ... seconds instead, at most `num_frames` of them.
        indices: these frames instead, in this order; those beyond the last are the last.
        times: the frames shown at these seconds instead, in this order, clamped to what there is.
        start, end: seconds; only what is shown in between is sampled.
        exact: False takes the nearest key frames instead, each once, which a long file gives much sooner.
        on_error: what becomes of a file that is damaged or cut short: an error, or, with "keep", what is left of it.
        threads: that decode a file; None for as many as PyTorch uses.
        limits: what the reading may take; None for `Limits()`.

    Raises `FileNotFoundError` for a path that does not exist, `VideoReadError` for a file that cannot be read, and
    `ValueError`, which that is too, for a source or arguments that are not as above, and for times that are asked of
    a source without any.
    """
    if isinstance(source, Clip):
        return source
    sampling = Sampling(num_frames, fps, indices, times, start, end)
    if on_error not in ("raise", "keep"):
        raise ValueError(f"on_error must be 'raise' or 'keep', not {on_error!r}.")
    if isinstance(source, np.ndarray | torch.Tensor):
        return _read_array(source, sampling)
    if isinstance(source, list | tuple):
        return _read_images(source, sampling)
    limits = limits or Limits()
    with located(source, limits) as (file, name):
        if isinstance(file, list):
            return _read_images(file, sampling, limits)
        if _is_webp(file):
            return _read_webp(file, name, sampling, limits)
        return _read_file(VideoFile(file, name, threads, limits), sampling, exact, on_error)


def is_one_video(value: Any) -> bool:
    """True if `value` is one video in a form `read_video` takes, False if it is a list of videos.

    A list is one video when every item is a picture: a PIL image, an image path, or a 3-D array or tensor.
    """
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_image(item) for item in value)
    return not (isinstance(value, np.ndarray | torch.Tensor) and value.ndim > 4)


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


def _read_array(video: np.ndarray | torch.Tensor, sampling: Sampling) -> Clip:
    name = f"the given {'array' if isinstance(video, np.ndarray) else 'tensor'}"
    _check_pixels(video, 4, name)
    picks = sampling.choose(name, len(video), None, None)
    return Clip(_to_tensor(video[picks]), None, None, len(video))


def _read_images(images: Sequence[Any], sampling: Sampling, limits: Limits | None = None) -> Clip:
    name = f"the given list of {len(images)}"
    if images and not is_one_video(images):
        raise ValueError(f"{name} holds items that are not images: read a list of videos one video at a time.")
    frames: list[torch.Tensor] = []
    picks = sampling.choose(name, len(images), None, None)
    if limits is not None:  # of a folder or a glob: a caller's own list is in memory, or was written down
        check_count(name, len(picks), limits)
    for index in picks:
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
    file, path = locate(image, Limits())
    try:
        with PIL.Image.open(file) as opened:
            return _to_tensor(np.asarray(opened.convert("RGB")))
    except BROKEN_IMAGE as error:
        raise ValueError(f"{name}, {path}, cannot be read as an image from disk.") from error


def _read_file(file: VideoFile, sampling: Sampling, exact: bool, on_error: str) -> Clip:
    name = file.name

    def choose(index: VideoIndex) -> list[int]:
        if index.problem and not index.total:
            raise VideoReadError(f"{name} holds no frames that can be read: {index.problem}.")
        try:
            picks = sampling.choose(name, index.total, index.times, index.duration)
        except ValueError as error:  # it fits the arguments, so it is the file that does not
            raise VideoReadError(str(error)) from error
        return picks if exact else index.nearest_keys(picks)

    index, kept, frames = file.read(lambda index: sorted(set(choose(index))))
    if index.problem and on_error == "raise":
        raise VideoReadError(
            f"{name} is damaged: {index.problem}; on_error='keep' gives the {index.total} frames that there are."
        )
    if index.problem:
        logger.warning(f"{name} is damaged: {index.problem}; it gives {index.total} frames.")
    picks = choose(index)
    if picks != kept:
        frames = frames[np.searchsorted(kept, picks)]
    times = None if index.times is None else torch.from_numpy(index.times[picks]).float()
    return Clip(torch.from_numpy(frames), times, index.duration, index.total)


def _is_webp(file: Any) -> bool:
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=["WEBP"]):
            return True
    except BROKEN_IMAGE:  # also a URL
        return False


@contextlib.contextmanager
def _opened_webp(file: Any, name: str, limits: Limits) -> Iterator[tuple[PIL.Image.Image, list[float]]]:
    """An animated WebP, which FFmpeg does not decode and Pillow does; 0, and at which second each frame ends."""
    ends, deadline = [0.0], Deadline(name, limits)
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            check_size(name, *image.size, limits)
            for index in range(image.n_frames):
                deadline.check()
                image.seek(index)
                image.load()  # only now is the frame's duration known
                ends.append(ends[-1] + image.info.get("duration", 0) / 1000)
            yield image, ends
    except (OSError, EOFError) as error:
        raise VideoReadError(f"{name} cannot be read as an animated image.") from error


def _read_webp(file: Any, name: str, sampling: Sampling, limits: Limits) -> Clip:
    pixels = []
    with _opened_webp(file, name, limits) as (image, ends):
        picks = sampling.choose(name, len(ends) - 1, np.array(ends[:-1]), ends[-1])
        check_count(name, len(picks), limits)
        for index in picks:
            image.seek(index)
            pixels.append(_load_image(image, name))
    return Clip(torch.stack(pixels), torch.tensor(ends)[picks], ends[-1] or None, len(ends) - 1)
