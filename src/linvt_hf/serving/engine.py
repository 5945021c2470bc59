"""One model that many ask at once: questions wait in a line, and are answered some at a time, word by word."""

import contextlib
import ctypes
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteriaList

from ..chat_templates import blocks_of, videos_of, with_videos
from ..encoded_video import EncodedVideo, PixelStream, as_encoded
from ..pipeline_linvt import VideoQuestionAnsweringPipeline
from .questions import Asked, Busy, End, Failure, Listener, Piece, Question
from .rows import Row, Rows

logger = logging.getLogger(__name__)
_STOPPED = "The engine was stopped before the whole answer came."
_CHARACTERS = 20  # of a token, on average, at most (ours): a longer prompt is refused without counting its tokens
_FAULTS = (ValueError, OSError, torch.OutOfMemoryError)  # of a question; anything else is our mistake

# A video of a question, and what it is remembered by.
_Opened = tuple[tuple | None, PixelStream | EncodedVideo]


class Engine:
    """
    A model in a thread of its own, which alone touches it.

    Questions of the same sampling are answered together, at most `batch_size`; what is asked meanwhile waits. A video
    that cannot be read, or a prompt that cannot be made, costs no other question its answer, and a batch that does not
    fit into memory is answered by halves.

    Args:
        batch_size: questions that are answered at a time (ours: 8).
        max_waiting: questions that may wait; one more is refused with `Busy` (ours: 64).
        cache_bytes: of encoded videos that are remembered, where the model is (ours: 1 GiB).
    """

    def __init__(
        self,
        pipeline: VideoQuestionAnsweringPipeline,
        *,
        batch_size: int = 8,
        max_waiting: int = 64,
        cache_bytes: int = 2**30,
    ):
        self.pipeline, self.batch_size, self.max_waiting = pipeline, batch_size, max_waiting
        self._cache, self._cache_bytes = OrderedDict[tuple, EncodedVideo](), cache_bytes
        self._line: deque[Asked] = deque()
        self._works: deque[tuple[Callable, Future]] = deque()
        self._change, self._closing, self._give_up = threading.Condition(), False, False
        self._opening = ThreadPoolExecutor(batch_size, thread_name_prefix="linvt-opening")
        self.answering = 0
        self._thread = threading.Thread(target=self._run, name="linvt-engine", daemon=True)
        self._thread.start()

    # ---- for those who ask, from any thread ----

    def ask(self, question: Question, listener: Listener) -> Asked:
        """Puts a question in line. The listener is called from the engine's thread, and must not take long."""
        asked = Asked(question, listener)
        with self._change:
            self._must_be_open()
            if len(self._line) >= self.max_waiting:
                self._line = deque(other for other in self._line if other.check())
            if len(self._line) >= self.max_waiting:
                raise Busy(f"{len(self._line)} questions wait already, as many as may; ask again later.")
            self._line.append(asked)
            self._change.notify()
        return asked

    def stream(self, question: Question) -> Iterator[Piece | End]:
        """The same, for a thread that waits; raises what went wrong."""
        events: SimpleQueue[Piece | End | Failure] = SimpleQueue()
        asked = self.ask(question, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Failure):
                    raise event.error
                yield event
                if isinstance(event, End):
                    return
        finally:
            asked.cancel()

    def run(self, work: Callable[[VideoQuestionAnsweringPipeline], Any]) -> Future:
        """Something else to do with the model, between two batches."""
        future: Future = Future()
        with self._change:
            self._must_be_open()
            self._works.append((work, future))
            self._change.notify()
        return future

    def videos(self, question: Question) -> list[EncodedVideo]:
        """A question's videos, encoded now or remembered; for `run`, whose thread alone may call this."""
        return self._encode(self._opened(question))

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def alive(self) -> bool:
        """Whether questions are taken and answered."""
        return self._thread.is_alive() and not self._closing

    def close(self, seconds: float = 30.0) -> None:
        """Takes no more questions, and ends once all are answered; those that are not by then are told so."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up = True
            self._thread.join()

    def _must_be_open(self) -> None:
        if not self.alive:
            raise RuntimeError("The engine is closed, and takes no more questions.")

    # ---- its thread ----

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._line or self._works or self._closing)
                work = self._works.popleft() if self._works else None
                batch = [] if work else self._take()
                if not work and not batch and self._closing and not self._line:
                    self._opening.shutdown(wait=False)
                    return
                self.answering = len(batch)
            if work is not None:
                _do(*work, self.pipeline)
            elif batch:
                try:
                    self._answer(batch)
                except Exception as error:  # these questions are lost, and no others
                    for asked in batch:
                        _fail(asked, error)
                self.answering = 0
                if not self._line:
                    _give_back_memory()

    def _take(self) -> list[Asked]:
        """The first in line, and those behind it that are answered alike."""
        batch: list[Asked] = []
        others: list[Asked] = []
        while self._line and len(batch) < self.batch_size:
            asked = self._line.popleft()
            if self._give_up:
                asked.tell(Failure(RuntimeError(_STOPPED)))
            if asked.check():
                fits = not batch or asked.question.is_sampled_like(batch[0].question)
                (batch if fits else others).append(asked)
        self._line.extendleft(reversed(others))
        return batch

    def _answer(self, batch: list[Asked]) -> None:
        ready = []
        for asked, opening in [(asked, self._opening.submit(self._opened, asked.question)) for asked in batch]:
            try:
                sample = self._sample(asked, self._encode(opening.result(), asked))
                ready.append((asked, sample))
            except Exception as error:
                _fail(asked, error)
        self._generate([(asked, sample) for asked, sample in ready if asked.check()])

    def _opened(self, question: Question) -> list[_Opened]:
        """A question's videos, begun to be read or remembered."""
        sampling = {"num_frames": question.num_frames, "fps": question.fps}
        chunk = self.pipeline.model.config.frames_per_chunk
        blocks = [block for message in question.messages for block in blocks_of(message, "video")]
        opened: list[_Opened] = []
        try:
            for block, video in zip(blocks, videos_of(question.messages), strict=True):
                name = (block["key"], *sampling.values()) if "key" in block else None
                known = self._cache.get(name) or as_encoded(video)
                if known is None:
                    reading = {"limits": question.limits}
                    known = self.pipeline.processor.stream(video, **sampling, chunk_size=chunk, videos_kwargs=reading)
                opened.append((name, known))
        except BaseException:
            _close(opened)
            raise
        return opened

    def _encode(self, opened: list[_Opened], asked: Asked | None = None) -> list[EncodedVideo]:
        """While whoever asked still waits; else raises `TimeoutError`, for nobody to hear."""
        encoded = []

        def go_on(done: int = 0, total: int = 0) -> None:
            if asked is not None and not asked.check():
                raise TimeoutError("Nobody waits for it any more.")

        try:
            for name, video in opened:
                if name in self._cache:  # perhaps another question of the batch has encoded it meanwhile
                    self._cache.move_to_end(name)
                    encoded.append(self._cache[name])
                else:
                    go_on()
                    encoded.append(self.pipeline.model.encode_video(video, go_on))
                    self._remember(name, encoded[-1])
        finally:
            _close(opened)
        return encoded

    def _sample(self, asked: Asked, videos: list[EncodedVideo]) -> dict[str, Any]:
        """A question as the model takes it."""
        text = self.pipeline.model.config.get_text_config()
        context = getattr(text, "max_position_embeddings", None)
        words = sum(len(block["text"]) for message in asked.question.messages for block in blocks_of(message, "text"))
        if context is not None and words > _CHARACTERS * context:  # to count its tokens would take all others' time
            raise ValueError(
                f"The prompt has {words:,} characters, and the model reads {context} tokens. Ask for less."
            )
        sample = self.pipeline._features(with_videos(asked.question.messages, iter(videos)))
        asked.prompt_tokens = sample["input_ids"].shape[1]
        most = asked.question.max_new_tokens
        if context is not None and asked.prompt_tokens + most > context:
            raise ValueError(
                f"The prompt takes {asked.prompt_tokens} tokens and the answer may take {most}; the model reads "
                f"{context} in all. Ask for less."
            )
        return self.pipeline._ensure_tensor_on_device(sample, self.pipeline.device)

    def _remember(self, name: tuple | None, video: EncodedVideo) -> None:
        if name is None:
            return
        self._cache[name] = video
        while sum(each.nbytes for each in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)

    @torch.no_grad()
    def _generate(self, ready: list[tuple[Asked, dict]]) -> None:
        if not ready:
            return
        model, processor = self.pipeline.model, self.pipeline.processor
        question = ready[0][0].question
        ends = model.generation_config.eos_token_id
        rows = Rows([Row(asked, processor.tokenizer, ends) for asked, _ in ready], lambda: self._give_up)
        if question.seed is not None:
            torch.manual_seed(question.seed)
        try:
            model.generate(
                **processor.collate([sample for _, sample in ready]),
                **question.sampling(),
                max_new_tokens=max(asked.question.max_new_tokens for asked, _ in ready),
                streamer=rows,
                stopping_criteria=StoppingCriteriaList([rows]),
            )
        except Exception as error:  # too little memory for all, or one of them is to blame
            if len(ready) > 1 and not rows.begun:
                torch.cuda.empty_cache()
                half = (len(ready) + 1) // 2
                self._generate(ready[:half])
                self._generate(ready[half:])
                return
            for asked, _ in ready:
                _fail(asked, error)
        for row in rows.rows:  # none, but where the engine gave up or the model has a limit of its own
            if self._give_up:
                row.asked.tell(Failure(RuntimeError(_STOPPED)))
            row.end("length")


def _fail(asked: Asked, error: Exception) -> None:
    if not isinstance(error, _FAULTS):
        logger.error("a question failed", exc_info=error)
    asked.tell(Failure(error))


def _close(opened: list[_Opened]) -> None:
    for _, video in opened:
        if isinstance(video, PixelStream):
            video.close()


def _give_back_memory() -> None:
    """
    What glibc keeps of freed memory, which with many threads that decode large frames becomes hundreds of megabytes:
    it goes back to the system while nobody waits.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _do(work: Callable, future: Future, pipeline: VideoQuestionAnsweringPipeline) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work(pipeline))
    except Exception as error:
        future.set_exception(error)
