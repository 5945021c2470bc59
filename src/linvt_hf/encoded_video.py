"""A video on its way through the vision encoder: its pixels, some at a time, and what became of them."""

import json
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .token_refiner import VideoTokens
from .video_reading import Clip, VideoStream

_FORMAT = "linvt-video-4"
_BESIDE = ("times", "made_by")  # tensors beside the tokens


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
        return self.on("cpu")

    def on(self, device: str | torch.device) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The same, made on another device: frames go there as bytes, a quarter of what their pixels take."""
        for first, frames in self._frames:
            yield slice(first, first + len(frames)), self._to_pixels(frames.to(device, non_blocking=True))

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


class EncodedVideo:  # no dataclass: of one in a chat transformers would make a dict
    """
    What is known of a video before a question, as `LinVTForConditionalGeneration.encode_video` gives it: its visual
    tokens, and what the tokenizer's scoring made of them. A processor takes it wherever it takes a video; a question
    then needs neither the file nor the vision encoder. Its file, a path that ends in `.safetensors`, is taken in the
    same places.

    tokens: all T * N of them, or the most significant ones of a long video, and averages of the others.
    num_frames: T. grid: rows and columns of a frame's tokens; N is their product.
    times: float32 [T], seconds of each frame; None where nobody knows.
    duration: seconds of the whole video; None where unknown.
    made_by: `SignificanceScorer.probe` of the tokenizer that scored it, which alone can go on from there.
    """

    def __init__(
        self,
        tokens: VideoTokens,
        num_frames: int,
        grid: tuple[int, int],
        times: Tensor | None = None,
        duration: float | None = None,
        made_by: Tensor | None = None,
    ):
        self.tokens, self.num_frames, self.grid = tokens, num_frames, grid
        self.times, self.duration, self.made_by = times, duration, made_by

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "EncodedVideo":
        """On another device, or with visual tokens of another type."""
        moved = copy(self)
        moved.tokens = self.tokens.to(device, dtype)
        return moved

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tokens.tensors().values())

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file. Raises `FileNotFoundError` where there is no folder for it."""
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {Path(path).parent} to save an encoded video in.")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tokens.tensors().items()}
        for name in _BESIDE:
            if (value := getattr(self, name)) is not None:
                tensors[name] = value.contiguous()
        about = {"num_frames": self.num_frames, "grid": self.grid, "duration": self.duration}
        save_file(tensors, path, metadata={"format": _FORMAT, "about": json.dumps(about)})

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
                tensors = {name: file.get_tensor(name) for name in names}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no encoded video: {error}") from error
        about = json.loads(about["about"])
        beside = {name: tensors.pop(name).cpu() for name in _BESIDE if name in tensors}
        grid = tuple(about["grid"])
        tokens = VideoTokens.of_tensors(tensors, grid[0] * grid[1])
        return cls(tokens, about["num_frames"], grid, duration=about["duration"], **beside)


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
