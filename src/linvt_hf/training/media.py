"""Videos and images of conversations, opened when a sample is made; what cannot be read is told from what is a bug."""

import os
import re
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from transformers.image_utils import load_image

from ..processing_linvt import LinVTProcessor, _has_times
from ..video_reading import IMAGE_SUFFIXES, Clip

# What readers of images raise for a broken file.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError)


class SkippedSample(Exception):
    """A sample that cannot be used, through no fault of the code. `path` is the video or image, if it is one."""

    def __init__(self, reason: str, path: str | None = None):
        super().__init__(reason, path)
        self.reason = reason
        self.path = path

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, eq=False)
class VideoInput:
    """A video of a conversation and how it is sampled. `video` is what `read_video` takes, or a folder of frames."""

    video: Any
    num_frames: int | None
    fps: float | None
    origin: str

    @property
    def path(self) -> str | None:
        return str(self.video) if isinstance(self.video, (str, Path)) else None


def read_clip(processor: LinVTProcessor, source: VideoInput) -> Clip:
    """
    A video's sampled frames. Frames that have no times, in a folder or a list, are sampled by number whatever `fps`
    is. Raises `SkippedSample` if the video cannot be read.
    """
    video = source.video
    try:
        if source.path is not None and os.path.isdir(video):
            video = _frames_of(video)
        return processor._read(video, source.num_frames, source.fps if _has_times(video) else None, True)
    except (OSError, ValueError) as error:  # read_video's own; settings were checked before
        raise SkippedSample(str(error), source.path) from error


def open_image(image: Any) -> Any:
    """A picture from a path or a file's bytes; others stay. Raises `SkippedSample` if it cannot be read."""
    if not isinstance(image, (str, Path, bytes)):
        return image
    try:
        return load_image(PIL.Image.open(BytesIO(image)) if isinstance(image, bytes) else str(image))
    except _BROKEN as error:
        path = None if isinstance(image, bytes) else str(image)
        raise SkippedSample(f"{path or 'an image'} cannot be read as an image.", path) from error


def _frames_of(folder: str | Path) -> list[str]:
    """The images of a folder in the order of the numbers in their names."""
    names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not names:
        raise ValueError(f"{str(folder)!r} is a folder without images; a video's folder holds its frames.")
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    return [os.path.join(folder, name) for name in names]


__all__ = ["SkippedSample", "VideoInput", "open_image", "read_clip"]
