"""Many questions to one model, some of which cannot be answered: every one gets its answer or the reason."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..pipeline_linvt import VideoQuestionAnsweringPipeline

# What a question or its video can be guilty of; anything else is our mistake, and ends the run.
_FAULTS = (ValueError, OSError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Answer:
    """
    What became of one question.

    text: the model's answer, without special tokens; "" if there is none.
    error: why there is none, in one sentence; None if there is.
    frame_times: of each of its videos the seconds of the frames that were seen; None where nobody knows them.
    log_likelihoods: of a question with options, by option: the mean log-probability of its tokens after the prompt.
    """

    text: str = ""
    error: str | None = None
    frame_times: tuple[list[float] | None, ...] = ()
    log_likelihoods: dict[str, float] | None = None


def answer_all(
    pipeline: VideoQuestionAnsweringPipeline,
    inputs: Sequence,
    *,
    batch_size: int = 1,
    **kwargs,
) -> Iterator[Answer]:
    """
    One `Answer` for each input, in order.

    A batch that cannot be answered is asked again by halves, down to one input, so that what is wrong with one video,
    or with the memory that a whole batch takes, costs no other question its answer.

    Args:
        inputs: what the pipeline takes: dicts with `video`, `question` and perhaps `choices`, or chats. Questions on
            one video should stand together: it is encoded once for all of them.
        batch_size: inputs that go through the model together.
        kwargs: for the pipeline, such as `num_frames` or `max_new_tokens`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    done = 0
    while done < len(inputs):
        try:
            # As a generator: it gives the answers before the batch that fails.
            for answers in pipeline(iter(inputs[done:]), batch_size=batch_size, return_frame_times=True, **kwargs):
                yield _answer(answers)
                done += 1
        except _FAULTS as error:
            failed = inputs[done : done + batch_size]
            if len(failed) == 1:
                yield Answer(error=in_one_line(error))
            else:
                yield from answer_all(pipeline, failed, batch_size=(len(failed) + 1) // 2, **kwargs)
            done += len(failed)


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _answer(answers: list[dict]) -> Answer:
    first = answers[0]
    options = {answer["answer"]: answer["log_likelihood"] for answer in answers if "log_likelihood" in answer}
    return Answer(text=first["answer"], frame_times=tuple(first["frame_times"]), log_likelihoods=options or None)
