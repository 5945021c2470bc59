"""The rows of a batch while they are generated: each is told its words, and ends by rules of its own."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import BaseStreamer

from .questions import Asked, End, Piece


class GrowingText:
    """
    Tokens to text, of which is given out what further tokens cannot change: no half of a character, nothing that may
    be the beginning of a stop text, and no white space before or after the whole.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        # Tokens are decoded with those before them, since a token's text may depend on them: from `_from` on, of which
        # those before `_read` are text already.
        self._from = self._read = 0
        self._held, self._begun = "", False
        self.stopped = False

    def add(self, token: int) -> str:
        """What another token adds; "" for now, perhaps."""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        if now.endswith("\ufffd"):  # the rest of the character is to come
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._give(now[len(before) :])

    def end(self) -> str:
        """What is left of the text at its end."""
        rest = self._decode(self._ids[self._from :])[len(self._decode(self._ids[self._from : self._read])) :]
        return "" if self.stopped else self._give(rest, last=True)

    def _give(self, text: str, last: bool = False) -> str:
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        self.stopped = bool(found)
        if found or last:
            text, self._held = text[: min(found, default=len(text))].rstrip(), ""
        else:
            beginnings = (
                n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
            )
            sure = len(text[: len(text) - max(beginnings, default=0)].rstrip())
            text, self._held = text[:sure], text[sure:]
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Row:
    """One question of a batch and its answer so far."""

    def __init__(self, asked: Asked, tokenizer, ends: int | list[int] | None):
        self.asked, self._count = asked, 0
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._text = GrowingText(tokenizer, asked.question.stop)

    def add(self, token: int) -> None:
        if self.asked.over:
            return
        self._count += 1
        if token in self._ends:
            self.end("stop")
            return
        if text := self._text.add(token):
            self.asked.tell(Piece(text))
        if self._text.stopped:
            self.end("stop")
        elif self._count >= self.asked.question.max_new_tokens:
            self.end("length")

    def end(self, reason: Literal["stop", "length"]) -> None:
        """Nothing, if it has ended already."""
        if rest := self._text.end():
            self.asked.tell(Piece(rest))
        self.asked.tell(End(reason, self.asked.prompt_tokens, self._count))


class Rows(BaseStreamer, StoppingCriteria):
    """For `generate`, as its streamer and as one of its stopping criteria."""

    def __init__(self, rows: list[Row], give_up: Callable[[], bool]):
        self.rows, self._give_up = rows, give_up
        self.begun = False
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """First the prompts, [B, S], then the next token of each row, [B]."""
        if self._prompt:
            self._prompt = False
            return
        self.begun = True
        for row, token in zip(self.rows, value.tolist(), strict=True):
            row.add(token)

    def end(self) -> None:
        pass

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """[B], True for rows that go on no longer."""
        stop = self._give_up()
        return torch.tensor([stop or not row.asked.check() for row in self.rows], device=input_ids.device)
