"""The part of LinVTForConditionalGeneration that turns videos' frames into the few tokens its language model reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .encoded_video import EncodedVideo, PixelStream, as_encoded
from .image_llm import features_per_frame
from .running_tokens import RunningTokens

FRAMES_INPUTS = ("pixel_values_videos", "frame_features", "encoded_videos")  # a video's frames, in whatever form
VIDEO_INPUTS = (*FRAMES_INPUTS, "num_frames", "frame_times", "question_ids", "question_mask")
_SAME_SCORER = 0.05  # ours: bfloat16 differs from float32 by about 1 %
FRAME_PREFIX = "frames_"  # what the base's image processor gave beside the pixels of the frames
_NORMED = (torch.float32, torch.bfloat16, torch.float16)  # types of weights, but quantised ones, which do not change
_SIZES = ("image_grid_thw", "image_sizes")  # of these, what tells how frames' tokens lie


@dataclass
class VideoFeatures(ModelOutput):
    """
    pooler_output: [V, M, D], the tokens of each video.
    weights: for each video W, [M, T, N], whose rows weigh its frames' own tokens; only when asked for.
    scores: for each video [T, N], the significance of its tokens as logits; -inf for those that are not stored.
    dropped_weights: beside weights, for each video [M, R], what the averages of tokens that are not stored weigh, one
        of each of R equal stretches of time; None where all are stored.
    """

    pooler_output: Tensor | None = None
    weights: list[Tensor] | None = None
    scores: list[Tensor] | None = None
    dropped_weights: list[Tensor | None] | None = None


class VideoMixin:
    """Of `LinVTForConditionalGeneration`, which has the base, its `image_llm` and the `video_tokenizer`."""

    def encode_video(
        self, video: PixelStream | EncodedVideo, progress: Callable[[int, int], None] | None = None
    ) -> EncodedVideo:
        """
        A video's frames through the base's vision encoder and projector, some at a time, while the next are read.

        Args:
            video: what `processor.stream(...)` gives of it.
            progress: is told, now and then, how many frames are done, and of how many.

        Returns what the processor takes in a video's place, for as many questions as there are. Raises what reading
        the video raises.
        """
        return self.encode_videos([video], progress)[0]

    @torch.no_grad()
    def encode_videos(
        self, videos: Sequence[PixelStream | EncodedVideo], progress: Callable[[int, int], None] | None = None
    ) -> list[EncodedVideo]:
        """Several of them; short ones share a pass through the vision encoder."""
        known = [as_encoded(video) for video in videos]
        streams = [video for video, encoded in zip(videos, known, strict=True) if encoded is None]
        for stream in streams:
            if not hasattr(stream, "num_frames"):
                raise ValueError(f"A {type(stream).__name__} cannot be encoded; give processor.stream(video).")
        encoded = iter(self._encode_streams(streams, progress or (lambda done, total: None)))
        return [next(encoded) if video is None else video for video in known]

    @torch.no_grad()
    def encoding_state(self) -> tuple:
        """
        What tells whether a video would be encoded as it was before: settings, and the norms of all weights that it
        goes through until there is a question. Those are read for it, which takes less than a word of the language
        model; that a weight has changed, optimizers do not always say.
        """
        settings = {name: value for name, value in vars(self.config).items() if name != "base_config"}
        after = [part for part in (self.base.get_decoder(), self.base.get_output_embeddings()) if part is not None]
        later = {id(weight) for part in after for weight in part.parameters()}
        weights = [
            w for w in (*self.base.parameters(), *self.video_tokenizer.scorer.parameters()) if id(w) not in later
        ]
        weights = [w.detach() for w in weights if w.dtype in _NORMED and not w.is_meta]
        norms: list[float] = []
        for device in dict.fromkeys(w.device for w in weights):
            here = [w for w in weights if w.device == device]
            norms += torch.stack(torch._foreach_norm(here, 2, torch.float32)).tolist()
        return repr(settings), tuple(norms)

    def _encode_streams(self, streams: list[PixelStream], progress: Callable[[int, int], None]) -> list[EncodedVideo]:
        encoded: list[EncodedVideo | None] = [None] * len(streams)
        running: dict[int, RunningTokens] = {}
        waiting: list[_Part] = []  # whole short videos, or some frames of a long one

        def encode() -> None:
            parts = self._encode_parts(waiting) if waiting else ()
            for part, tokens in zip(waiting, parts, strict=True):
                grid = self.image_llm.grid(tokens.shape[1], part.inputs, 0)
                if part.frames.start == 0:
                    running[part.number] = RunningTokens(self.video_tokenizer, part.total, part.times, grid)
                running[part.number].add(tokens.to(self.video_tokenizer.device))
                if part.frames.stop == part.total:
                    found = running.pop(part.number).finish()
                    encoded[part.number] = EncodedVideo(
                        found, part.total, grid, part.times, part.duration, self.video_tokenizer.scorer.probe()
                    )
                before = sum(stream.num_frames for stream in streams[: part.number])
                progress(before + part.frames.stop, sum(stream.num_frames for stream in streams))
            waiting.clear()

        try:
            for number, stream in enumerate(streams):
                for frames, inputs in stream.on(self.device):
                    part = _Part(number, frames, inputs, stream.num_frames, stream.times, stream.duration)
                    if waiting and not part.fits(waiting, self.config.frames_per_chunk):
                        encode()
                    waiting.append(part)
                    if not part.whole:
                        encode()
            encode()
        finally:
            for stream in streams:
                stream.close()
        if any(video is None for video in encoded):
            raise ValueError(
                "A stream gives its frames once, and one of these was read before; make another with processor.stream."
            )
        return encoded

    def _encode_parts(self, parts: list["_Part"]) -> list[Tensor]:
        """Of each part [t, N, D]."""
        inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
        pixels, counts = inputs.pop("pixel_values"), [part.count for part in parts]
        tokens = self.image_llm.encode_frames(self.base, pixels, inputs, sum(counts), self.config.frames_per_chunk)
        return features_per_frame(tokens, counts)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        num_frames: Tensor | list[int] | None = None,
        frame_times: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        output_weights: bool = False,
        frame_features: Tensor | None = None,
        encoded_videos: list[EncodedVideo] | None = None,
        **frame_inputs: Tensor,
    ) -> VideoFeatures:
        """
        The tokens of some videos, each conditioned on its question.

        Args:
            pixel_values_videos: the frames of all videos one after another, as the processor gives them.
            num_frames: [V], frames of each video.
            frame_times: [V, max T], seconds of each frame; padding is ignored.
            question_ids, question_mask: [V, L], each video's question as token ids, and True (or 1) for real words.
                Without them the tokens depend on the video alone.
            output_weights: also return W.
            frame_features: [sum of T, N, D], the frames' visual tokens if they are already there, as
                `image_llm.encode_frames` gave them; instead of `pixel_values_videos`. Where frames differ in N, N is
                the largest and `frames_num_tokens`, [sum of T], says how many of a frame's rows are real.
            encoded_videos: instead, V videos as `encode_video` gave them; `num_frames` and `frame_times` are theirs.
            frame_inputs: `frames_<name>` for each further input of the base's vision encoder, one entry a frame.
        """
        forms = dict(zip(FRAMES_INPUTS, (pixel_values_videos, frame_features, encoded_videos), strict=True))
        given = [name for name, value in forms.items() if value is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} were given" if given else "none was given"
            raise ValueError(
                f"A video's frames are one of {', '.join(FRAMES_INPUTS[:-1])} and {FRAMES_INPUTS[-1]}; {found}."
            )
        if encoded_videos is not None:
            num_frames = [video.num_frames for video in encoded_videos]
        counts = num_frames.tolist() if isinstance(num_frames, Tensor) else list(num_frames or [])
        if not counts or min(counts) < 1:
            raise ValueError(f"num_frames must hold a positive count for each video; got {counts}.")
        if question_ids is not None and len(question_ids) != len(counts):
            raise ValueError(f"{len(counts)} videos, but {len(question_ids)} rows of question_ids; give one a video.")
        inputs = {name.removeprefix(FRAME_PREFIX): value for name, value in frame_inputs.items()}
        num_tokens = inputs.pop("num_tokens", None)
        sizes = {name: inputs[name].cpu() for name in _SIZES if name in inputs}
        device = self.device  # LinVT's, which comes first; a device_map may put the base on several, which take any
        # To the device before the frames, and sizes from there: a copy waits for all that was started.
        text = None if question_ids is None else self.get_input_embeddings()(question_ids.to(device)).to(device)
        question_mask = None if text is None or question_mask is None else question_mask.to(device)
        frame_times = None if frame_times is None else frame_times.to(device)
        if encoded_videos is not None:
            return self._condense(encoded_videos, text, question_mask, output_weights)
        if frame_features is not None:
            videos = _split_features(frame_features.to(device), counts, num_tokens)
        else:
            tokens = self.image_llm.encode_frames(
                self.base, pixel_values_videos, inputs, sum(counts), self.config.frames_per_chunk
            )
            videos = features_per_frame(tokens, counts)  # V tensors [T, N, D]
            del tokens  # they were copied, and are the largest thing here
        starts = [sum(counts[:index]) for index in range(len(counts))]
        grids = [self.image_llm.grid(v.shape[1], sizes, start) for v, start in zip(videos, starts, strict=True)]

        rows: list[tuple] = [()] * len(videos)
        # Videos whose frames have the same shape make one batch. Their lengths lie between two powers of two, so that
        # no video is padded to more than twice its length.
        alike = [(grid, (count - 1).bit_length()) for grid, count in zip(grids, counts, strict=True)]
        for kind in dict.fromkeys(alike):
            members = [index for index, other in enumerate(alike) if other == kind]
            grid = kind[0]
            lengths = [counts[index] for index in members]
            out = self.video_tokenizer(
                _batch([videos[index] for index in members]).to(device),  # [B, T, N, D]
                frame_mask=None if len(set(lengths)) == 1 else _mask(lengths, device),
                frame_times=None if frame_times is None else _rows(frame_times, members)[:, : max(lengths)],
                text_embeds=None if text is None else _rows(text, members),
                text_mask=None if question_mask is None else _rows(question_mask, members),
                output_weights=output_weights,
                grid=grid,
            )
            for row, (index, length) in enumerate(zip(members, lengths, strict=True)):
                weights = None
                if output_weights:
                    weights = out.weights[row].unflatten(-1, (-1, videos[index].shape[1]))[:, :length]
                rows[index] = (out.video_tokens[row], weights, out.scores[row, :length])
        video_tokens, weights, scores = zip(*rows, strict=True)
        return VideoFeatures(torch.stack(video_tokens), list(weights) if output_weights else None, list(scores))

    def _condense(
        self, videos: list[EncodedVideo], text: Tensor | None, text_mask: Tensor | None, output_weights: bool
    ) -> VideoFeatures:
        """Encoded videos, one after another: they differ in length, and most of the work is done."""
        tokenizer = self.video_tokenizer
        video_tokens, weights, scores, dropped_weights = [], [], [], []
        probe = tokenizer.scorer.probe()
        for number, video in enumerate(videos):
            if video.tokens.values.shape[2] != self.config.hidden_size:
                raise ValueError(
                    f"An encoded video has tokens of width {video.tokens.values.shape[2]}, and this model's are "
                    f"{self.config.hidden_size} wide; encode it with this model."
                )
            if video.made_by is not None and (off := _difference(video.made_by, probe)) > _SAME_SCORER:
                raise ValueError(
                    f"An encoded video was scored by another LinVT (their scorers differ by {off:.0%}, and by "
                    f"{_SAME_SCORER:.0%} at most where one has other precision); encode it with this model."
                )
            one = slice(number, number + 1)
            out = tokenizer.condense(
                video.tokens.to(tokenizer.device, tokenizer.dtype),
                None if text is None else text[one].to(tokenizer.device),
                None if text is None or text_mask is None else text_mask[one].to(tokenizer.device),
                output_weights,
            )
            video_tokens.append(out.video_tokens[0])
            scores.append(_everywhere(out.scores[0], video, -torch.inf))
            if output_weights:
                weights.append(_everywhere(out.weights[0], video, 0.0))
                dropped_weights.append(None if out.dropped_weights is None else out.dropped_weights[0])
        if not output_weights:
            return VideoFeatures(torch.stack(video_tokens), scores=scores)
        return VideoFeatures(torch.stack(video_tokens), weights, scores, dropped_weights)

    @staticmethod
    def take_video_inputs(inputs: dict) -> dict:
        """Takes what `get_video_features` needs out of a model's inputs; nothing if they hold no video."""
        names = [name for name in inputs if name in VIDEO_INPUTS or name.startswith(FRAME_PREFIX)]
        videos = {name: inputs.pop(name) for name in names}
        return videos if any(videos.get(name) is not None for name in FRAMES_INPUTS) else {}


@dataclass
class _Part:
    """Some frames of video `number`, and what is known of all of it."""

    number: int
    frames: slice
    inputs: dict[str, Tensor]
    total: int
    times: Tensor | None
    duration: float | None

    @property
    def count(self) -> int:
        return self.frames.stop - self.frames.start

    @property
    def whole(self) -> bool:
        return self.count == self.total

    def fits(self, others: list["_Part"], most: int) -> bool:
        """Whether it is encoded together with others, which makes at most `most` frames; only whole videos are."""
        parts = [*others, self]
        shapes = [{name: value.shape[1:] for name, value in part.inputs.items()} for part in parts]
        alike = all(shape == shapes[0] for shape in shapes)
        return alike and all(part.whole for part in parts) and sum(part.count for part in parts) <= most


def _everywhere(stored: Tensor, video: EncodedVideo, fill: float) -> Tensor:
    """Of a video's stored tokens [..., K] to all of its places, [..., T, N]."""
    places = video.num_frames * video.tokens.places
    whole = stored.new_full((*stored.shape[:-1], places), fill)
    whole[..., video.tokens.index[0].to(stored.device)] = stored
    return whole.unflatten(-1, (video.num_frames, video.tokens.places))


def _difference(one: Tensor, other: Tensor) -> float:
    """How far apart, as a share of the second's length; 1 where they are not even of one shape."""
    return float((one - other).norm() / other.norm()) if one.shape == other.shape else 1.0


def _split_features(features: Tensor, counts: list[int], num_tokens: Tensor | None) -> list[Tensor]:
    """Frames' tokens [sum of T, N, D] as one tensor [T, N, D] a video, each without its padding."""
    if len(features) != sum(counts):
        raise ValueError(
            f"frame_features holds {len(features)} frames, but num_frames asks for {sum(counts)}; give one entry a "
            "frame."
        )
    videos = features.split(counts)
    if num_tokens is None:
        return list(videos)
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    return [video[:, :real] for video, real in zip(videos, num_tokens[firsts].tolist(), strict=True)]


def _batch(videos: list[Tensor]) -> Tensor:
    """Videos [T, N, D] as one tensor [B, max T, N, D]; without a copy if there is only one."""
    return videos[0][None] if len(videos) == 1 else pad_sequence(videos, batch_first=True)


def _rows(x: Tensor, numbers: list[int]) -> Tensor:
    """Some rows of x; a list as index would make a GPU wait."""
    return torch.stack([x[number] for number in numbers])


def _mask(lengths: list[int], device: torch.device) -> Tensor:
    """[B, max T], True for the first `lengths[b]` frames; made without a copy to the device, which would wait."""
    order = torch.arange(max(lengths), device=device)
    return torch.stack([order < length for length in lengths])


__all__ = ["FRAME_PREFIX", "VideoFeatures", "VideoMixin"]
