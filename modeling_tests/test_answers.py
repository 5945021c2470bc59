"""Many questions to one model, of which some cannot be answered."""

import pytest
import torch
from tiny_models import chat, wrapped
from video_files import moving_square, write_video

from linvt_hf import VideoQuestionAnsweringPipeline
from linvt_hf.asking.answers import Answer, answer_all

SETTINGS = {"max_new_tokens": 4, "do_sample": False, "num_frames": 3}


@pytest.fixture
def pipe():
    model, processor = wrapped("internvl_qwen2")
    return VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture
def inputs(tmp_path):
    """Seven, of which the third has a broken video, the fifth none that is there, and the last no words."""
    videos = [write_video(tmp_path / f"{n}.mp4", moving_square(4 + n)) for n in range(7)]
    videos[2].write_bytes(b"no video")
    videos[4].unlink()
    return [{"video": str(video), "question": "Who?" if n < 6 else ""} for n, video in enumerate(videos)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_each_gets_its_answer_or_the_reason(pipe, inputs, batch_size):
    answers = list(answer_all(pipe, inputs, batch_size=batch_size, **SETTINGS))
    for one, answer in zip(inputs, answers, strict=True):
        if answer.error is None:
            (alone,) = pipe(one, return_frame_times=True, **SETTINGS)
            assert answer == Answer(alone["answer"], frame_times=tuple(alone["frame_times"]))
            assert len(answer.frame_times[0]) == 3
    errors = {n: answer.error for n, answer in enumerate(answers) if answer.error is not None}
    assert errors.keys() == {2, 4, 6}
    assert "2.mp4" in errors[2] and "4.mp4" in errors[4] and "no words" in errors[6]


def test_options_are_scored(pipe, inputs):
    asked = [{**one, "choices": ["A", "B", "C"]} for one in inputs[:4]]
    answers = list(answer_all(pipe, asked, batch_size=2, num_frames=3))
    assert [answer.error is None for answer in answers] == [True, True, False, True]
    for answer in answers[:2]:
        assert answer.log_likelihoods.keys() == {"A", "B", "C"}
        assert answer.text == max(answer.log_likelihoods, key=answer.log_likelihoods.get)


def test_what_is_too_much_together_is_asked_one_by_one(pipe, inputs, monkeypatch):
    generate = pipe.model.generate

    def little_memory(**features):
        if len(features["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(**features)

    monkeypatch.setattr(pipe.model, "generate", little_memory)
    answers = list(answer_all(pipe, inputs[:2], batch_size=2, **SETTINGS))
    assert [answer.error for answer in answers] == [None, None]


def test_a_mistake_of_ours_is_not_taken_for_an_answer(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(answer_all(pipe, [chat("Who?")], **SETTINGS))


def test_nothing_to_ask(pipe):
    assert list(answer_all(pipe, [])) == []
