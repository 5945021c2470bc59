"""Videos that are pictures: arrays, tensors, lists of images, and animated WebP, which FFmpeg does not decode."""

import contextlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from .video_chunks import check_count, check_size
from .video_index import VideoReadError
from .video_limits import Deadline, Limits
from .video_sampling import Sampling
from .video_sources import IMAGE_SUFFIXES, locate

# What Pillow raises for a file that is broken, or says it is so large that reading it would fill the memory.
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Whole:
    """Of all sampled frames: how many, and the rest as in `Clip`."""

    num_frames: int
    times: torch.Tensor | None
    duration: float | None
    total_frames: int


# The sampled frames of a video a few at a time: what the whole is, the number of frames before, uint8 [t, H, W, 3].
Parts = Iterator[tuple[Whole, int, torch.Tensor]]


def split(count: int, size: int | None) -> list[slice]:
    size = size or count
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def scaled(parts: Parts, size: tuple[int, int] | None) -> Parts:
    """With frames of another size, if one is given."""
    for whole, first, frames in parts:
        if size is not None and tuple(frames.shape[1:3]) != tuple(size):
            pixels = F.interpolate(frames.permute(0, 3, 1, 2), tuple(size), mode="bicubic", antialias=True)
            frames = pixels.permute(0, 2, 3, 1).contiguous()
        yield whole, first, frames


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


def parts_of_array(video: np.ndarray | torch.Tensor, sampling: Sampling, size: int | None) -> Parts:
    name = f"the given {'array' if isinstance(video, np.ndarray) else 'tensor'}"
    _check_pixels(video, 4, name)
    picks = sampling.choose(name, len(video), None, None)
    whole = Whole(len(picks), None, None, len(video))
    for part in split(len(picks), size):
        yield whole, part.start, _to_tensor(video[picks[part]])


def parts_of_images(
    images: Sequence[Any], sampling: Sampling, size: int | None, limits: Limits | None = None
) -> Parts:
    name = f"the given list of {len(images)}"
    if images and not is_one_video(images):
        raise ValueError(f"{name} holds items that are not images: read a list of videos one video at a time.")
    picks = sampling.choose(name, len(images), None, None)
    if limits is not None:  # of a folder or a glob: a caller's own list is in memory, or was written down
        check_count(name, len(picks), limits)
    whole, shape = Whole(len(picks), None, None, len(images)), None
    for part in split(len(picks), size):
        frames = []
        for index in picks[part]:
            frame = _load_image(images[index], f"image {index} of {name}")
            shape = shape or frame.shape
            if frame.shape != shape:
                one, other = (f"{shape[1]}x{shape[0]}" for shape in (shape, frame.shape))
                raise ValueError(
                    f"{name} has pictures of {one} and of {other} (width x height): resize them to one size."
                )
            frames.append(frame)
        yield whole, part.start, torch.stack(frames)


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


def is_webp(file: Any) -> bool:
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=["WEBP"]):
            return True
    except BROKEN_IMAGE:  # also a URL
        return False


@contextlib.contextmanager
def opened_webp(file: Any, name: str, limits: Limits) -> Iterator[tuple[PIL.Image.Image, list[float]]]:
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


def parts_of_webp(file: Any, name: str, sampling: Sampling, size: int | None, limits: Limits) -> Parts:
    with opened_webp(file, name, limits) as (image, ends):
        picks = sampling.choose(name, len(ends) - 1, np.array(ends[:-1]), ends[-1])
        check_count(name, len(picks), limits)
        whole = Whole(len(picks), torch.tensor(ends)[picks], ends[-1] or None, len(ends) - 1)
        for part in split(len(picks), size):
            frames = []
            for index in picks[part]:
                image.seek(index)
                frames.append(_load_image(image, name))
            yield whole, part.start, torch.stack(frames)


__all__ = [
    "BROKEN_IMAGE",
    "Parts",
    "Whole",
    "is_one_video",
    "is_webp",
    "opened_webp",
    "parts_of_array",
    "parts_of_images",
    "parts_of_webp",
    "scaled",
    "split",
]
