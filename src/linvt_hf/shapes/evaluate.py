"""How often a model answers the questions of `shapes` right."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..training.dataset import ChatDataset
from ..training.feature_cache import FeatureCache
from ..training.sources import DataSource
from .world import LONG, SHORT

FRAMES = {"video": SHORT, "long": LONG, "image": None}  # that are read, by kind of test


@dataclass
class Score:
    """
    Answers by kind of question, True where right.

    exact: whether greedy decoding gives the answer and stops, word for word.
    options: whether the answer is the likeliest of the question's options, by the first token in which they differ.
    """

    exact: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    options: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    @staticmethod
    def mean(answers: dict[str, list[bool]]) -> float:
        """Over all questions alike."""
        every = [right for several in answers.values() for right in several]
        return sum(every) / len(every)

    def by_kind(self) -> dict[str, float]:
        return {kind: sum(right) / len(right) for kind, right in sorted(self.exact.items())}


class QuestionSet:
    """
    The questions of a file that `write_split` wrote.

    Args:
        records: the JSONL file.
        features, model: keeps visual features, and computes those that are missing; None reads the videos each time.
        num_frames: frames of a video; None for the processor's number.
    """

    def __init__(
        self,
        records: str | Path,
        processor,
        features: FeatureCache | None = None,
        model=None,
        num_frames: int | None = None,
    ):
        self.records = [json.loads(line) for line in Path(records).read_text(encoding="utf-8").splitlines()]
        self.dataset = ChatDataset([DataSource(str(records))], processor, features=features, num_frames=num_frames)
        self.processor = processor
        if features is not None:
            features.fill(model, self.dataset, progress=False)

    @torch.no_grad()
    def score(self, model, batch_size: int = 64) -> Score:
        model.eval()
        score = Score()
        for start in range(0, len(self.records), batch_size):
            rows = range(start, min(start + batch_size, len(self.records)))
            batch = self.processor.collate([self.dataset[row] for row in rows])
            labels = batch.pop("labels")[:, 1:]  # [B, S - 1]
            logits = model(**batch.to(model.device)).logits[:, :-1].cpu()  # [B, S - 1, vocabulary]
            answered = labels >= 0
            exact = ((logits.argmax(dim=-1) == labels) | ~answered).all(dim=1).tolist()
            first = answered.int().argmax(dim=1)  # where an answer's first token is foretold
            for row, right, start_logits in zip(rows, exact, logits[torch.arange(len(rows)), first], strict=True):
                record = self.records[row]
                score.exact[record["kind"]].append(right)
                if (chosen := self._choose(record["options"], start_logits)) is not None:
                    answer = record["messages"][-1]["content"][0]["text"]
                    score.options[record["kind"]].append(chosen == answer)
        if self.dataset.unusable:  # another question stood in for it, which is right in training and wrong here
            raise ValueError(f"Not all questions can be asked: {next(iter(self.dataset.unusable.values()))}")
        return score

    def _choose(self, options: list[str], logits: Tensor) -> str | None:
        """The likeliest option; None where there are none, or the first token does not tell them apart."""
        ids = [self.processor.tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in options]
        return None if len(set(ids)) < max(len(ids), 1) else options[int(logits[ids].argmax())]
