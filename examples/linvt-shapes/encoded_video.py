"""A video on its way through the vision encoder: its pixels, some at a time, and what became of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .video_reading import Clip, VideoStream

_FORMAT = "linvt-video-1"


class PixelStream:
    """
    A video's frames as the base's vision encoder takes them, some at a time, while the next are read: for
    `model.encode_video`.

    Iterating gives pairs: which frames, as a slice, and `pixel_values` with whatever else the encoder needs of them.
    It may begin again at 0; see `VideoStream`, whose other attributes this has too.
    """

    def __init__(self, frames: VideoStream, to_pixels: Callable[[Tensor], dict[str, Tensor]]):
        self._frames, self._to_pixels = frames, to_pixels

    def __iter__(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        for first, frames in self._frames:
            yield slice(first, first + len(frames)), self._to_pixels(frames)

    def close(self) -> None:
        """Ends the reading before its end."""
        self._frames.close()

    @property
    def num_frames(self) -> int:
        return self._frames.num_frames

    @property
    def times(self) -> Tensor | None:
        return self._frames.times

    @property
    def duration(self) -> float | None:
        return self._frames.duration


@dataclass(eq=False)
class EncodedVideo:
    """
    A video's visual tokens, as `LinVTForConditionalGeneration.encode_video` gives them. A processor takes it wherever
    it takes a video; a question then needs neither the file nor the vision encoder.

    Its file, a path that ends in `.safetensors`, is taken in the same places.

    tokens: [T, N, D], of each sampled frame, in the width of the language model.
    grid: rows and columns of a frame's tokens; N is their product.
    times: float32 [T], seconds of each frame; None where nobody knows.
    duration: seconds of the whole video; None where unknown.
    """

    tokens: Tensor
    grid: tuple[int, int]
    times: Tensor | None = None
    duration: float | None = None

    @property
    def num_frames(self) -> int:
        return len(self.tokens)

    def to(self, *args, **kwargs) -> "EncodedVideo":
        """On another device, or in another type, as `Tensor.to`."""
        return EncodedVideo(self.tokens.to(*args, **kwargs), self.grid, self.times, self.duration)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {"tokens": self.tokens.detach().cpu().contiguous()}
        if self.times is not None:
            tensors["times"] = self.times.contiguous()
        about = {"format": _FORMAT, "grid": json.dumps(self.grid), "duration": json.dumps(self.duration)}
        save_file(tensors, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "EncodedVideo":
        """Reads what `save` wrote. Raises `ValueError` for any other file, `FileNotFoundError` where there is none."""
        if not Path(path).exists():
            raise FileNotFoundError(f"There is no encoded video at {path}.")
        try:
            with safetensors.safe_open(path, "pt", device=str(device)) as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError(f"{path} is no encoded video of this version ({about.get('format')}).")
                names = file.keys()
                times = file.get_tensor("times").cpu() if "times" in names else None
                tokens = file.get_tensor("tokens")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no encoded video: {error}") from error
        return cls(tokens, tuple(json.loads(about["grid"])), times, json.loads(about["duration"]))


def as_encoded(video: Any) -> EncodedVideo | None:
    """An encoded video, or the path of one; None for any other video."""
    if isinstance(video, str | Path) and str(video).endswith(".safetensors"):
        return EncodedVideo.load(video)
    # By what it is like: a model's folder brings a class of its own along.
    return video if hasattr(video, "tokens") and hasattr(video, "grid") else None


def frame_times_of(videos: list[Clip] | list[EncodedVideo]) -> Tensor | None:
    """[V, max T] seconds, where one has none evenly spaced ones; None if no video has times."""
    if all(video.times is None for video in videos):
        return None
    evenly = (torch.arange(video.num_frames, dtype=torch.float32) for video in videos)
    times = [even if video.times is None else video.times for video, even in zip(videos, evenly, strict=True)]
    return pad_sequence(times, batch_first=True)


__all__ = ["EncodedVideo", "PixelStream", "as_encoded", "frame_times_of"]
