"""
ChatDataset: conversations to labelled samples, one at a time.

A sample whose video or image cannot be read, or that is too long, is replaced by another that can be used, so that
one broken file among thousands ends no run; each is written down in the `skipped` file.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BatchFeature
from transformers.utils import logging

from ..processing_linvt import LinVTProcessor
from .feature_cache import FeatureCache
from .labels import encode_text
from .media import SkippedSample, VideoInput, check_image, open_image, read_frames
from .sources import Conversation, Conversations, DataSource, check_sampling, read_source

logger = logging.get_logger(__name__)

WARNINGS = 5  # skipped samples that a process names at once; all are in the file


class ChatDataset(Dataset):
    """
    Samples for training, each a `BatchFeature` with `input_ids`, `attention_mask`, `labels`, all [1, S], and what else
    the model takes; `processor.collate` makes batches of them.

    Args:
        sources: where the conversations are, or the conversations themselves. All files are read and checked here.
        processor: of the model that is trained.
        num_frames, fps: how videos are sampled, instead of the processor's defaults; a source's own settings go first.
        max_length: most tokens of a sample, its video tokens included. Longer ones are skipped, not cut: what would be
            lost is the answer or part of a video.
        turns: "each": a conversation of n answers is n samples, each with its own history, learning its last answer,
            the videos conditioned on its last question, as in inference. "all": it is one sample that learns all
            answers, the videos conditioned on all questions together; one pass instead of n, and less like inference.
        skipped: file for what was skipped, one JSON object a line; several processes and runs may share it.
        features: frames' visual tokens computed before, see `FeatureCache`; then samples hold `frame_features`.
        seed: decides which part of a source with a fractional weight is used in which epoch.
    """

    def __init__(
        self,
        sources: Sequence[DataSource] | Sequence[Conversation],
        processor: LinVTProcessor,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        max_length: int | None = None,
        turns: str = "each",
        skipped: str | Path | None = None,
        features: FeatureCache | None = None,
        seed: int = 0,
    ):
        check_sampling(num_frames, fps)
        if turns not in ("each", "all"):
            raise ValueError(f"turns is {turns!r}; it must be 'each' or 'all'.")
        self.processor = processor
        self.num_frames, self.fps = num_frames, fps
        self.max_length = max_length
        self.turns = turns
        self.skipped = None if skipped is None else Path(skipped)
        self.features = features
        self.seed = seed
        self._texts: dict[int, BatchFeature] = {}
        self._reported: set[tuple] = set()
        self.unusable: dict[int, str] = {}  # and why
        self._read(sources)
        self.set_epoch(0)

    def _read(self, sources: Sequence[DataSource] | Sequence[Conversation]) -> None:
        """All sources, and which samples they make; numbers in arrays, since there may be millions."""
        loose = Conversations(source for source in sources if isinstance(source, Conversation))
        groups = [(loose, 1.0)] if loose else []
        files = [source for source in sources if isinstance(source, DataSource)]
        groups += [(read_source(source), source.weight) for source in files]
        if not groups:
            raise ValueError("There is nothing to train on: give at least one source of data.")
        self._conversations = [conversations for conversations, _ in groups]
        self._groups: list[tuple[int, int, float]] = []  # first sample of a source, the one after its last, its weight
        rows: list[np.ndarray] = []
        marks, start = self._marks(), 0
        for number, (conversations, weight) in enumerate(groups):
            places = []
            for index, conversation in enumerate(conversations):
                _check_texts(conversation, marks)
                sizes = np.cumsum([_size(turn) for turn in conversation.messages])
                places += [(number, index, end, sizes[end - 1]) for end in self._ends(conversation)]
            if not round(weight * len(places)):
                source = files[number - len(groups)]
                raise ValueError(
                    f"{source.path}: a weight of {weight} leaves none of its {len(places)} samples; give it at least "
                    f"{1 / len(places):.2g}, or leave the source out."
                )
            rows.append(np.array(places, dtype=np.int32))
            self._groups.append((start, start + len(places), weight))
            start += len(places)
        self._samples = np.concatenate(rows)  # [samples, 4]: source, conversation, turns, size

    def _ends(self, conversation: Conversation) -> list[int]:
        """After how many turns each sample of a conversation ends."""
        answers = [n for n, turn in enumerate(conversation.messages, 1) if turn["role"] == "assistant"]
        return answers if self.turns == "each" else answers[-1:]

    def _marks(self) -> set[str]:
        """Words that the tokenizer takes for a video or an image."""
        tokenizer = self.processor.tokenizer
        images = {getattr(tokenizer, "image_token", None), getattr(tokenizer, "boi_token", None), "<image>"}
        return {self.processor.video_token, *images & {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}}

    def set_epoch(self, epoch: int) -> None:
        """Chooses which samples of sources with a fractional weight are used; their number stays the same."""
        self.epoch = epoch
        order: list[np.ndarray] = []
        for number, (start, stop, weight) in enumerate(self._groups):
            samples = np.arange(start, stop, dtype=np.int32)
            whole, part = int(weight), weight - int(weight)
            mixed = np.random.default_rng([self.seed, epoch, number]).permutation(samples)
            order += [np.tile(samples, whole), mixed[: round(part * len(samples))]]
        self._order = np.concatenate(order)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def lengths(self) -> np.ndarray:  # int32 [len(self)]
        """About how long each sample is, in characters, without opening anything."""
        return self._samples[self._order, 3]

    def __getitem__(self, index: int) -> BatchFeature:
        for place in self._instead(range(len(self))[index]):
            sample = int(self._order[place])
            if sample not in self.unusable:
                try:
                    return self._encode(sample)
                except SkippedSample as error:
                    self.unusable[sample] = str(error)
                    self.report(self._conversation(sample)[0].origin, error)
        first = self.unusable[int(self._order[0])]
        raise ValueError(f"None of {len(self)} samples can be used; the first: {first}")

    def _instead(self, index: int) -> Iterator[int]:
        """
        `index`, and what stands in for it if it cannot be used: all others, in wide strides. The one beside it would
        often be as broken, where a whole folder is, and would stand in for that whole folder.
        """
        stride = max(1, round(0.618 * len(self)))
        while math.gcd(stride, len(self)) > 1:
            stride += 1
        return ((index + step * stride) % len(self) for step in range(len(self)))

    def _conversation(self, sample: int) -> tuple[Conversation, int]:
        """The conversation of a sample, and after how many of its turns the sample ends."""
        source, index, end, _ = self._samples[sample].tolist()
        return self._conversations[source][index], end

    def videos(self) -> Iterator[VideoInput]:
        """All videos of all conversations, each as often as it occurs."""
        for conversations in self._conversations:
            for conversation in conversations:
                yield from self._videos(conversation, conversation.messages)

    # ---- one sample ----

    def _encode(self, sample: int) -> BatchFeature:
        conversation, end = self._conversation(sample)
        messages = conversation.messages[:end]
        videos = self._videos(conversation, messages)
        keep = self.features is not None and self.features.memory
        inputs = self._texts.get(sample) if keep else None
        frames = {}
        if videos and self.processor.times_in_prompt is not None:  # else only when the text was found to fit
            frames = self._frames(videos)
        if inputs is None:
            inputs, plain = self._text(conversation, messages, frames)
            if keep and plain:
                self._texts[sample] = inputs
        length = inputs["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise SkippedSample(f"{length} tokens, max_length {self.max_length}")
        if not videos:
            return inputs if not keep else BatchFeature(dict(inputs))
        frames = frames or self._frames(videos)
        return BatchFeature({**inputs, **{n: value for n, value in frames.items() if n != "video_durations"}})

    def _frames(self, videos: list[VideoInput]) -> dict[str, Tensor]:
        if self.features is None:
            return read_frames(self.processor, videos)
        return self.features.inputs(self.processor, videos)

    def _text(self, conversation: Conversation, messages: list[dict], frames: dict) -> tuple[BatchFeature, bool]:
        """All that does not come from videos, and whether it holds no images either."""
        plain = True
        opened = []
        for message in messages:
            blocks = []
            for block in message["content"]:
                if block["type"] == "image":
                    block, plain = {"type": "image", "image": open_image(block["image"])}, False
                blocks.append(block)
            opened.append({**message, "content": blocks})
        try:
            return encode_text(self.processor, opened, self.turns, frames), plain
        except ValueError as error:
            for block in _shown(messages, "image"):
                check_image(self.processor, block["image"])  # says so if that is the reason
            raise ValueError(f"{conversation.origin}: {error}") from error

    def _videos(self, conversation: Conversation, messages: list[dict]) -> list[VideoInput]:
        own = conversation.num_frames is not None or conversation.fps is not None
        num_frames, fps = (conversation.num_frames, conversation.fps) if own else (self.num_frames, self.fps)
        return [
            VideoInput(block["video"], num_frames, fps, conversation.origin, block.get("start"), block.get("end"))
            for block in _shown(messages, "video")
        ]

    def report(self, origin: str, error: SkippedSample) -> None:
        """Writes down, once, what was skipped and why."""
        entry = {"origin": origin, "path": error.path, "reason": str(error)}
        if tuple(entry.values()) in self._reported:
            return
        self._reported.add(tuple(entry.values()))
        if self.skipped is None or len(self._reported) <= WARNINGS:
            logger.warning(f"{origin} is skipped: {error}")
        if self.skipped is not None:
            self.skipped.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending: processes do not tear each other's lines.
            file = os.open(self.skipped, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, (json.dumps(entry) + "\n").encode())
            finally:
                os.close(file)


def _shown(messages: list[dict], kind: str) -> list[dict]:
    return [block for message in messages for block in message["content"] if block["type"] == kind]


def _size(turn: dict) -> int:
    """Of a turn, in characters. All videos become equally many tokens; those of an image are a rough guess."""
    worth = {"video": 0, "image": 2000}
    return sum(len(block["text"]) if block["type"] == "text" else worth[block["type"]] for block in turn["content"])


def _check_texts(conversation: Conversation, marks: set[str]) -> None:
    """Words that the tokenizer takes for a video or an image would ask for one that is not there."""
    for turn in conversation.messages:
        for block in turn["content"]:
            found = [mark for mark in marks if mark in block["text"]] if block["type"] == "text" else []
            if found:
                raise ValueError(
                    f"{conversation.origin}: a text holds {found[0]}, which this model reads as a place for "
                    "pixels; take it out, or make it a block of its own."
                )


def read_skipped(path: str | Path) -> list[dict]:
    """What a run skipped, each once: dicts of `origin`, `path` and `reason`. An absent file means nothing was."""
    if not os.path.exists(path):
        return []
    entries = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.setdefault(line, json.loads(line))
        except json.JSONDecodeError:
            continue  # a process that was killed while it wrote
    return list(entries.values())


__all__ = ["ChatDataset", "read_skipped"]
