"""The part of LinVTProcessor that has to do with videos: their frames read, sampled, and as pixels."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .encoded_video import EncodedVideo, PixelStream, as_encoded, frame_times_of
from .frames_to_pixels import frames_to_pixels
from .video_reading import Clip, is_one_video, read_video, stream_video
from .video_sources import has_times

# What of `read_video`'s arguments a call may set, beside the processor's own.
_READING = {"indices", "times", "start", "end", "exact", "on_error", "size", "threads", "limits"}


class VideoProcessing:
    """Of `LinVTProcessor`, which has the settings."""

    def stream(self, video: Any, **kwargs) -> PixelStream:
        """
        One video's frames for `model.encode_video`, some at a time and read meanwhile, in memory that does not grow
        with the video.

        Args:
            video: as in a call; an `EncodedVideo` is returned as it is.
            kwargs: as for `streams`.
        """
        return self.streams([video], **kwargs)[0]

    def streams(
        self,
        videos: list,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool = True,
        videos_kwargs: dict | None = None,
        chunk_size: int = 32,
    ) -> list[PixelStream]:
        """
        The same of several videos, for `model.encode_videos`.

        Args:
            chunk_size: frames at a time; the model's `config.frames_per_chunk` fits it best.
            num_frames, fps, do_sample_frames, videos_kwargs: as in a call.
        """
        sampling = self._sampling(num_frames, fps, do_sample_frames, videos_kwargs)

        def read(video, **reading):
            return PixelStream(stream_video(video, chunk_size=chunk_size, **reading), self._pixels)

        return self._read_all(videos, sampling, read)

    def encoding_state(self) -> tuple:
        """What tells whether a video would be read and turned to pixels as it was before."""
        own = (self.num_frames, self.fps, self.frame_kwargs, self.frame_inputs, vars(self.image_processor))
        return tuple(map(repr, own))

    def _sampling(
        self, num_frames: int | None, fps: float | None, do_sample_frames: bool, videos_kwargs: dict | None
    ) -> dict:
        """A call's arguments for reading videos, in one dict for `_read`."""
        reading = dict(videos_kwargs or {})
        for name, value in (("num_frames", num_frames), ("fps", fps)):
            if value is not None and reading.get(name, value) != value:
                raise ValueError(f"{name} is {value}, and {reading[name]} in videos_kwargs; give one of them.")
        sampling = {
            "num_frames": reading.pop("num_frames", num_frames),
            "fps": reading.pop("fps", fps),
            "sample": reading.pop("do_sample_frames", do_sample_frames),
        }
        if unknown := reading.keys() - _READING:
            raise ValueError(f"videos_kwargs has {', '.join(unknown)}; known are {', '.join(sorted(_READING))}.")
        return {**sampling, **reading}

    def _read_all(self, videos: list, sampling: dict, read: Callable[..., Any] = read_video) -> list:
        """What `read` gives for each; several at once where there are threads for it."""
        threads = torch.get_num_threads()
        at_once = max(min(threads, len(videos)), 1)
        shared = {"threads": max(threads // at_once, 1), **sampling}
        with ThreadPoolExecutor(at_once) as pool:
            found = [pool.submit(self._read, video, read, **shared) for video in videos]
        try:
            return [one.result() for one in found]
        except BaseException:
            for one in found:
                if one.exception() is None and hasattr(one.result(), "close"):  # a stream that was begun
                    one.result().close()
            raise

    def _read(
        self,
        video: Any,
        read: Callable[..., Any] = read_video,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        sample: bool = True,
        **reading,
    ) -> Any:
        """What `read` gives for a call's arguments and this processor's defaults."""
        if (encoded := as_encoded(video)) is not None:
            if num_frames is not None or fps is not None or not sample or reading.keys() - {"threads"}:
                raise ValueError(
                    "An encoded video has its frames already; give num_frames and the like where it is made."
                )
            return encoded
        if not sample:
            return read(video, num_frames=None, **reading)
        chosen = num_frames is not None or fps is not None or reading.keys() & {"indices", "times"}
        if not chosen and has_times(video):
            fps = self.fps  # only as a default: who asks for a rate of frames without times must hear of it
        num_frames = self.num_frames if num_frames is None else num_frames
        return read(video, num_frames=num_frames, fps=fps, **reading)

    def _flat_videos(self, videos, per_text: list[int] | None) -> list:
        """All videos in one list, after checking that they match the placeholders of the prompts."""
        if videos is None:
            nested = []
        elif is_one_video(videos):
            nested = [[videos]]
        elif all(is_one_video(video) for video in videos):
            nested = [list(videos)]
        else:
            nested = [[group] if is_one_video(group) else list(group) for group in videos]
            given = [len(group) for group in nested]
            if per_text is not None and given != per_text:
                raise ValueError(
                    f"The prompts hold {per_text} video placeholders ({self.video_token}) each, but {given} videos "
                    "were given; pass one video for each placeholder."
                )
        flat = [video for group in nested for video in group]
        if per_text is not None and sum(per_text) != len(flat):
            raise ValueError(
                f"The text holds {sum(per_text)} video placeholders ({self.video_token}), but {len(flat)} videos were "
                "given; pass one video for each placeholder."
            )
        return flat

    def _video_inputs(self, videos: list, sampling: dict) -> dict[str, Any]:
        """Videos as the model takes them, and `video_durations`; see `_frames`."""
        read = self._read_all(videos, sampling)
        encoded = [video for video in read if as_encoded(video) is not None]
        if not encoded:
            return self._frames(read)
        if len(encoded) < len(videos):
            raise ValueError(
                f"{len(encoded)} of {len(videos)} videos are encoded and the others are not; encode all or none."
            )
        return {"encoded_videos": encoded, **about_videos(encoded)}

    def _frames(self, clips: list[Clip]) -> dict[str, Tensor]:
        """
        Sampled frames to the base's pixels, all videos one after another; and, for prompts that say it, how long each
        video is (`video_durations`, which no model takes).
        """
        outputs = [self._pixels(clip.frames) for clip in clips]
        inputs = {"pixel_values_videos": cat_padded([output.pop("pixel_values") for output in outputs])}
        for name in self.frame_inputs:
            inputs[f"frames_{name}"] = cat_padded([output[name] for output in outputs])
        return {**inputs, **about_videos(clips)}

    def _pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """Frames [T, H, W, 3] as `pixel_values`, and the further inputs that the base's vision encoder needs."""
        output = frames_to_pixels(frames, self.image_processor, self.frame_kwargs)
        if output is None or any(name not in output for name in self.frame_inputs):
            # Every frame is a sample of its own: processors tile or join the images of one sample.
            pictures = [[Image.fromarray(frame)] for frame in frames.cpu().numpy()]
            output = self.image_processor(pictures, return_tensors="pt", **self.frame_kwargs)
            if output["pixel_values"].ndim == 5:  # [T, tiles, 3, H, W]: the first tile is the whole frame
                output["pixel_values"] = output["pixel_values"][:, :1]
        return {name: torch.as_tensor(output[name]) for name in ("pixel_values", *self.frame_inputs)}


def about_videos(videos: list[Clip] | list[EncodedVideo]) -> dict[str, Tensor]:
    """`num_frames`, `frame_times` if there are any, and `video_durations`, -1 for one without times."""
    about = {"num_frames": torch.tensor([video.num_frames for video in videos])}
    if (times := frame_times_of(videos)) is not None:
        about["frame_times"] = times
    known = [-1.0 if video.times is None or video.duration is None else video.duration for video in videos]
    return {**about, "video_durations": torch.tensor(known)}


def cat_padded(tensors: list[Tensor]) -> Tensor:
    """Concatenates along the first dimension; the others are padded with zeros at their ends where they differ."""
    sizes = [max(size) for size in zip(*(t.shape[1:] for t in tensors), strict=True)]

    def pad(tensor):
        missing = [n for size, full in zip(tensor.shape[:0:-1], sizes[::-1], strict=True) for n in (0, full - size)]
        return F.pad(tensor, missing) if any(missing) else tensor

    return torch.cat([pad(tensor) for tensor in tensors])


__all__ = ["VideoProcessing", "about_videos", "cat_padded"]
