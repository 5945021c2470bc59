"""A question to an engine, and what is said of it: some more of its answer, the end, or why there is none."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..video_limits import Limits

logger = logging.getLogger(__name__)


_COLD = 1e-3  # ours: below it, logits that are divided by it are no longer numbers


class Busy(RuntimeError):
    """So many wait already that one more would wait too long."""


@dataclass(frozen=True)
class Piece:
    """Some more of an answer."""

    text: str


@dataclass(frozen=True)
class End:
    """
    The end of an answer.

    reason: "stop", where the model or a stop text ended it, or "length", where `max_new_tokens` did.
    prompt_tokens: of the prompt, each video's video tokens among them. new_tokens: of the answer.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Failure:
    """Why there is no answer, or no more of it."""

    error: Exception


Listener = Callable[[Piece | End | Failure], None]


@dataclass(eq=False)
class Question:
    """
    A chat to be answered. Numbers that are None are the model's own.

    messages: as the pipeline takes them. A block of type "video" may have a `key`: what has the same key, `num_frames`
        and `fps` is the same video, and is encoded once as long as the engine remembers it.
    num_frames, fps: how its videos are sampled.
    temperature: 0, or next to it, for the likeliest token at each step; top_p: of the likeliest tokens that make up so
        much.
    seed: the same seed gives the same sample; such a question is answered by itself.
    stop: texts before which the answer ends.
    seconds: within which it must be answered, from the time it is asked.
    limits: of reading its videos.
    """

    messages: list[dict]
    num_frames: int | None = None
    fps: float | None = None
    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    seconds: float | None = None
    limits: Limits = field(default_factory=Limits)

    def is_sampled_like(self, other: "Question") -> bool:
        """Whether both can be answered in one batch."""
        return self.sampling() == other.sampling() and self.seed is None and other.seed is None

    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        if self.temperature is not None and self.temperature < _COLD:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        given = {"temperature": self.temperature, "top_p": self.top_p}
        given = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, **given} if given or self.seed is not None else {}


class Asked:
    """A question on its way. `cancel()` when nobody waits for its answer any more."""

    def __init__(self, question: Question, listener: Listener):
        self.question, self._listener = question, listener
        seconds = question.seconds
        self._end = None if seconds is None else time.monotonic() + seconds
        self.over = False  # nothing more is said of it
        self.prompt_tokens = 0

    def cancel(self) -> None:
        self.over = True

    def tell(self, event: Piece | End | Failure) -> None:
        if self.over:
            return
        self.over = not isinstance(event, Piece)
        try:
            self._listener(event)
        except Exception:  # whoever listened is gone; the others of its batch are not
            self.over = True
            logger.exception("a listener failed")

    def check(self) -> bool:
        """Whether it is still to be answered; what has taken too long is told so."""
        if self._end is not None and time.monotonic() > self._end:
            self.tell(Failure(TimeoutError(f"There was no whole answer within {self.question.seconds:g} s.")))
        return not self.over
