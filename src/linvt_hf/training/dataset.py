"""
ChatDataset: conversations to labelled samples, one at a time.

A sample whose video or image cannot be read, or that is too long, is replaced by the next that can be used, so that
one broken file among thousands ends no run; each is written down in the `skipped` file.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import Dataset
from transformers import BatchFeature
from transformers.utils import logging

from ..processing_linvt import LinVTProcessor
from .feature_cache import FeatureCache
from .labels import encode_text
from .media import SkippedSample, VideoInput, open_image, read_clip
from .sources import Conversation, DataSource, check_sampling, read_source

logger = logging.get_logger(__name__)


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
        sources: list[DataSource] | list[Conversation],
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
        self.conversations: list[Conversation] = []
        self._groups: list[tuple[list[tuple[int, int]], float]] = []  # samples of each source and its weight
        loose = [source for source in sources if isinstance(source, Conversation)]
        groups = [(loose, 1.0)] if loose else []
        groups += [(read_source(source), source.weight) for source in sources if isinstance(source, DataSource)]
        for conversations, weight in groups:
            start = len(self.conversations)
            self.conversations += conversations
            samples = [(start + i, n) for i, c in enumerate(conversations) for n in self._ends(c)]
            self._groups.append((samples, weight))
        if not self.conversations:
            raise ValueError("There is nothing to train on: give at least one source of data.")
        self._check_texts()
        self._texts: dict[tuple[int, int], BatchFeature] = {}
        self._reported: set[tuple] = set()
        self._unusable: dict[tuple[int, int], str] = {}  # and why
        self.set_epoch(0)

    def _ends(self, conversation: Conversation) -> list[int]:
        """After how many turns each sample of a conversation ends."""
        answers = [n for n, turn in enumerate(conversation.messages, 1) if turn["role"] == "assistant"]
        return answers if self.turns == "each" else answers[-1:]

    def _check_texts(self) -> None:
        """Words that the tokenizer takes for a video or an image would ask for one that is not there."""
        tokenizer = self.processor.tokenizer
        images = {getattr(tokenizer, "image_token", None), getattr(tokenizer, "boi_token", None), "<image>"}
        marks = {self.processor.video_token, *images & {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}}
        for conversation in self.conversations:
            for turn in conversation.messages:
                for block in turn["content"]:
                    found = [m for m in marks if block["type"] == "text" and m in block["text"]]
                    if found:
                        raise ValueError(
                            f"{conversation.origin}: a text holds {found[0]}, which this model reads as a place for "
                            "pixels; take it out, or make it a block of its own."
                        )

    def set_epoch(self, epoch: int) -> None:
        """Chooses which samples of sources with a fractional weight are used; their number stays the same."""
        self.epoch = epoch
        self._order: list[tuple[int, int]] = []
        for number, (samples, weight) in enumerate(self._groups):
            whole, part = int(weight), weight - int(weight)
            chosen = random.Random(f"{self.seed} {epoch} {number}").sample(samples, round(part * len(samples)))
            self._order += samples * whole + chosen
        if not self._order:
            raise ValueError("There is nothing to train on: the weights of the sources leave no record.")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> BatchFeature:
        for step in range(len(self)):
            sample = self._order[(index + step) % len(self)]
            if sample not in self._unusable:
                try:
                    return self._encode(*sample)
                except SkippedSample as error:
                    self._unusable[sample] = str(error)
                    self.report(self.conversations[sample[0]].origin, error)
        raise ValueError(f"None of {len(self)} samples can be used; the first: {self._unusable[self._order[0]]}")

    def videos(self) -> Iterator[VideoInput]:
        """All videos of all conversations, each as often as it occurs."""
        for conversation in self.conversations:
            yield from self._videos(conversation, conversation.messages)

    # ---- one sample ----

    def _encode(self, number: int, end: int) -> BatchFeature:
        conversation = self.conversations[number]
        messages = conversation.messages[:end]
        videos = self._videos(conversation, messages)
        keep = self.features is not None and self.features.memory
        inputs = self._texts.get((number, end)) if keep else None
        if inputs is None:
            inputs, plain = self._text(conversation, messages)
            if keep and plain:
                self._texts[number, end] = inputs
        length = inputs["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise SkippedSample(f"{length} tokens, max_length {self.max_length}")
        if not videos:
            return inputs if not keep else BatchFeature(dict(inputs))
        if self.features is None:
            clips = [read_clip(self.processor, video) for video in videos]
            return BatchFeature({**inputs, **self.processor._frames(clips)})
        return BatchFeature({**inputs, **self.features.inputs(self.processor, videos)})

    def _text(self, conversation: Conversation, messages: list[dict]) -> tuple[BatchFeature, bool]:
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
            return encode_text(self.processor, opened, turns=self.turns), plain
        except ValueError as error:
            raise ValueError(f"{conversation.origin}: {error}") from error

    def _videos(self, conversation: Conversation, messages: list[dict]) -> list[VideoInput]:
        own = conversation.num_frames is not None or conversation.fps is not None
        num_frames, fps = (conversation.num_frames, conversation.fps) if own else (self.num_frames, self.fps)
        return [
            VideoInput(block["video"], num_frames, fps, conversation.origin)
            for message in messages
            for block in message["content"]
            if block["type"] == "video"
        ]

    def report(self, origin: str, error: SkippedSample) -> None:
        """Writes down, once, what was skipped and why."""
        entry = {"origin": origin, "path": error.path, "reason": str(error)}
        if tuple(entry.values()) in self._reported:
            return
        self._reported.add(tuple(entry.values()))
        logger.warning(f"{origin} is skipped: {error}")
        if self.skipped is not None:
            self.skipped.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending: processes do not tear each other's lines.
            file = os.open(self.skipped, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, (json.dumps(entry) + "\n").encode())
            finally:
                os.close(file)


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
