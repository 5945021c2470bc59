"""Videos in, sampled frames and their times out.

`read_video` takes a video in any of the forms people hold one (a file, its bytes, an array, a list of pictures) and
returns a `Clip`; `stream_video` gives the same frames a few at a time. This file and those it imports, `video_*.py`,
stand alone, without the rest of the package, and need PyAV only to read a video file.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .video_decoding import VideoFile
from .video_index import VideoIndex, VideoReadError
from .video_limits import Limits
from .video_pictures import (
    Parts,
    Whole,
    is_one_video,
    is_webp,
    opened_webp,
    parts_of_array,
    parts_of_images,
    parts_of_webp,
    scaled,
    split,
)
from .video_sampling import Sampling
from .video_sources import located

logger = logging.getLogger(__name__)


class Clip:  # no dataclass: of one in a chat transformers would make a dict
    """
    Sampled frames of one video and when each is shown.

    frames: uint8 [T, H, W, 3], RGB, upright.
    times: float32 [T], seconds from the video's first frame; None where nobody knows (arrays, lists of pictures).
    duration: seconds of the whole source; None where unknown.
    total_frames: the number of frames the source holds.
    """

    def __init__(self, frames: torch.Tensor, times: torch.Tensor | None, duration: float | None, total_frames: int):
        self.frames, self.times, self.duration, self.total_frames = frames, times, duration, total_frames

    @property
    def num_frames(self) -> int:
        return len(self.frames)


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
        if is_webp(file):
            with opened_webp(file, name, limits) as (image, ends):
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
    size: tuple[int, int] | None = None,
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
        size: height and width of the frames, scaled (bicubic, antialiased) while they are converted: less memory and
            time, where the model takes no larger ones. None for their own.
        threads: that decode a file; None for as many as PyTorch uses.
        limits: what the reading may take; None for `Limits()`.

    Raises `FileNotFoundError` for a path that does not exist, `VideoReadError` for a file that cannot be read, and
    `ValueError`, which that is too, for a source or arguments that are not as above, and for times that are asked of
    a source without any.
    """
    if isinstance(source, Clip):
        return source
    sampling = Sampling(num_frames, fps, indices, times, start, end)
    for whole, _, frames in _parts(source, sampling, exact, on_error, size, threads, limits, None):
        clip = Clip(frames, whole.times, whole.duration, whole.total_frames)
    return clip


class VideoStream:
    """
    Sampled frames of one video, a few at a time, in the order they are sampled; the next are read meanwhile.

    Iterating, which works once, gives pairs: the number of frames that came before, and the next ones, uint8
    [t, H, W, 3]. A file that turns out other than it says begins again, at 0: what was read of it is to be forgotten.

    num_frames: how many frames that makes.
    times, duration, total_frames: as in `Clip`.
    """

    def __init__(self, parts: Parts):
        self._parts, self._next = parts, None
        self._advance()  # reading begins here, and what is wrong with a source shows

    def _advance(self) -> None:
        self._next = next(self._parts, None)
        if self._next is not None:
            whole = self._next[0]
            self.num_frames, self.total_frames = whole.num_frames, whole.total_frames
            self.times, self.duration = whole.times, whole.duration

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        while self._next is not None:
            _, first, frames = self._next
            self._next = None
            yield first, frames
            del frames  # as soon as nobody else needs them
            self._advance()

    def close(self) -> None:
        """Ends the reading before its end."""
        self._parts.close()
        self._next = None


def stream_video(
    source: Any,
    *,
    chunk_size: int = 32,
    num_frames: int | None = 32,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    times: Sequence[float] | None = None,
    start: float | None = None,
    end: float | None = None,
    exact: bool = True,
    on_error: Literal["raise", "keep"] = "raise",
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
) -> VideoStream:
    """
    The frames that `read_video` gives for the same arguments, at most `chunk_size` at a time (ours: 32), in memory
    that does not grow with their number. Only `indices` or `times` out of order are held all at once.

    Raises what `read_video` raises, here or later: a damaged file gives its error where it is damaged.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}.")
    if isinstance(source, Clip):
        return VideoStream(_parts_of_clip(source, chunk_size))
    sampling = Sampling(num_frames, fps, indices, times, start, end)
    return VideoStream(_parts(source, sampling, exact, on_error, size, threads, limits, chunk_size))


# ---- every form of a video as parts: what the whole is, the number of frames before, uint8 [t, H, W, 3] ----


def _parts(
    source: Any,
    sampling: Sampling,
    exact: bool,
    on_error: str,
    size: tuple[int, int] | None,
    threads: int | None,
    limits: Limits | None,
    chunk_size: int | None,
) -> Parts:
    """Of at most `chunk_size` frames; None for one part."""
    if on_error not in ("raise", "keep"):
        raise ValueError(f"on_error must be 'raise' or 'keep', not {on_error!r}.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be a height and a width of at least 1, not {size}.")
    if isinstance(source, np.ndarray | torch.Tensor):
        yield from scaled(parts_of_array(source, sampling, chunk_size), size)
        return
    if isinstance(source, list | tuple):
        yield from scaled(parts_of_images(source, sampling, chunk_size), size)
        return
    limits = limits or Limits()
    with located(source, limits) as (file, name):
        if isinstance(file, list):
            yield from scaled(parts_of_images(file, sampling, chunk_size, limits), size)
        elif is_webp(file):
            yield from scaled(parts_of_webp(file, name, sampling, chunk_size, limits), size)
        else:
            video = VideoFile(file, name, threads, limits, size)
            yield from _parts_of_file(video, sampling, exact, on_error, chunk_size)


def _parts_of_clip(clip: Clip, size: int) -> Parts:
    whole = Whole(len(clip.frames), clip.times, clip.duration, clip.total_frames)
    for part in split(len(clip.frames), size):
        yield whole, part.start, clip.frames[part]


def _parts_of_file(file: VideoFile, sampling: Sampling, exact: bool, on_error: str, size: int | None) -> Parts:
    name = file.name

    def choose(index: VideoIndex) -> list[int]:
        if index.problem and not index.total:
            raise VideoReadError(f"{name} holds no frames that can be read: {index.problem}.")
        try:
            picks = sampling.choose(name, index.total, index.times, index.duration)
        except ValueError as error:  # it fits the arguments, so it is the file that does not
            raise VideoReadError(str(error)) from error
        return picks if exact else index.nearest_keys(picks)

    known = None
    # Decoded are the frames in the order they are shown, each once; `picks` may repeat them, and unordered ones turn.
    reading = file.stream(lambda index: sorted(set(choose(index))), size if sampling.in_order else None)
    with contextlib.closing(reading):
        for index, kept, first, pixels in reading:
            if index.problem and on_error == "raise":
                raise VideoReadError(
                    f"{name} is damaged: {index.problem}; on_error='keep' gives the {index.total} frames that there "
                    "are."
                )
            if index is not known:
                known, picks = index, choose(index)
                times = None if index.times is None else torch.from_numpy(index.times[picks]).float()
                whole = Whole(len(picks), times, index.duration, index.total)
            shown, begin = picks, 0
            if len(pixels) < len(kept):
                begin, end = np.searchsorted(picks, [kept[first], kept[first + len(pixels) - 1] + 1]).tolist()
                shown = picks[begin:end]
            if shown != kept[first : first + len(pixels)]:
                pixels = pixels[np.searchsorted(kept[first : first + len(pixels)], shown)]
            for part in split(len(pixels), size):
                yield whole, begin + part.start, torch.from_numpy(pixels[part])
    if index.problem:
        logger.warning(f"{name} is damaged: {index.problem}; it gives {index.total} frames.")


__all__ = [
    "Clip",
    "VideoInfo",
    "VideoReadError",
    "VideoStream",
    "is_one_video",
    "read_video",
    "stream_video",
    "video_info",
]
