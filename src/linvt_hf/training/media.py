"""Videos and images of conversations, opened when a sample is made; what cannot be read is told from what is a bug."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor
from transformers.image_utils import load_image

from ..processing_linvt import LinVTProcessor
from ..video_pictures import BROKEN_IMAGE
from ..video_reading import Clip
from ..video_sources import has_times

TIMEOUT = 60  # seconds that a server may take over an image


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
    """
    A video of a conversation and how it is sampled. `video` is what `read_video` takes, or a folder of frames; `start`
    and `end` are seconds.
    """

    video: Any
    num_frames: int | None
    fps: float | None
    origin: str
    start: float | None = None
    end: float | None = None

    @property
    def path(self) -> str | None:
        return _path(self.video)


def _read_clip(processor: LinVTProcessor, source: VideoInput) -> Clip:
    """
    A video's sampled frames. Frames that have no times, in a folder or a list, are sampled by number whatever `fps`
    is. Raises `SkippedSample` if the video cannot be read.
    """
    video, fps = source.video, source.fps if has_times(source.video) else None
    part = {name: value for name, value in (("start", source.start), ("end", source.end)) if value is not None}
    try:
        return processor._read(video, num_frames=source.num_frames, fps=fps, **part)
    except (OSError, ValueError) as error:  # read_video's own; settings were checked before
        raise SkippedSample(str(error), source.path) from error


def read_frames(processor: LinVTProcessor, videos: list[VideoInput]) -> dict[str, Tensor]:
    """
    What the processor makes of videos' frames. Raises `SkippedSample` if one cannot be read, or if the base's image
    processor refuses its frames.
    """
    clips = [_read_clip(processor, video) for video in videos]
    try:
        return processor._frames(clips)
    except ValueError as error:
        path = videos[0].path if len(videos) == 1 else None
        raise SkippedSample(f"{path or 'a video'} is refused by the base's image processor: {error}", path) from error


def open_image(image: Any) -> Any:
    """A picture from a path, a URL or a file's bytes; others stay. Raises `SkippedSample` if it cannot be read."""
    if not isinstance(image, (str, Path, bytes)):
        return image
    path = _path(image)
    try:
        return load_image(PIL.Image.open(BytesIO(image)) if path is None else path, timeout=TIMEOUT)
    except Exception as error:
        if not isinstance(error, BROKEN_IMAGE) and "://" not in (path or ""):  # a URL's client has errors of its own
            raise
        raise SkippedSample(f"{path or 'an image'} cannot be read as an image.", path) from error


def check_image(processor: LinVTProcessor, image: Any) -> None:
    """Raises `SkippedSample` if the base's image processor refuses a picture."""
    try:
        processor.image_processor([[open_image(image)]], return_tensors="pt")
    except ValueError as error:
        path = _path(image)
        raise SkippedSample(f"{path or 'an image'} is refused by the base's image processor: {error}", path) from error


def _path(source: Any) -> str | None:
    return str(source) if isinstance(source, (str, Path)) else None


__all__ = ["SkippedSample", "VideoInput", "check_image", "open_image", "read_frames"]
