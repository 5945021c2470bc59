"""The video-question-answering pipeline, inside the package (test_hub_folder.py has it from a bare folder)."""

import copy
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bases import NAMED, UNNAMED
from tiny_models import chat, encode, noise_video, wrapped
from transformers import TextStreamer, pipeline
from video_files import moving_square, write_video

from linvt_hf import VideoQuestionAnsweringPipeline, pipeline_linvt
from linvt_hf.video_index import VideoReadError
from linvt_hf.video_reading import read_video

VIDEOS = [noise_video(3, seed=1), noise_video(7, seed=2), noise_video(5, seed=3)]
QUESTIONS = ["Who?", "What is the colour of the thing that moves?", "Where?"]
PAIRS = list(zip(VIDEOS, QUESTIONS, strict=True))
SETTINGS = {"max_new_tokens": 5, "do_sample": False}


def pipe_of(name="internvl_qwen2", **kwargs):
    model, processor = wrapped(name)
    return VideoQuestionAnsweringPipeline(model=model, processor=processor, device="cpu", **kwargs)


@pytest.mark.parametrize("name", [*NAMED, *UNNAMED])
def test_batches_give_what_single_calls_give(name):
    pipe = pipe_of(name)
    inputs = [{"video": video, "question": question} for video, question in PAIRS]
    singles = [pipe(video=video, question=question, **SETTINGS) for video, question in PAIRS]
    for batch_size in (1, 2, 3):
        assert pipe(inputs, batch_size=batch_size, **SETTINGS) == singles


def test_every_way_to_call(tmp_path):
    pipe = pipe_of()
    path = write_video(tmp_path / "v.mp4", moving_square(12))
    expected = pipe(video=path, question="Who?", **SETTINGS)
    assert list(expected[0]) == ["answer"]
    assert pipe(str(path), "Who?", **SETTINGS) == expected
    assert pipe({"video": path, "question": "Who?"}, **SETTINGS) == expected
    assert pipe(chat(path, "Who?"), **SETTINGS) == expected
    assert pipe([chat(path, "Who?")] * 2, batch_size=2, **SETTINGS) == [expected] * 2
    assert pipe(video=[path, path], question="Who?", **SETTINGS) == [expected] * 2
    lazily = pipe(({"video": path, "question": "Who?"} for _ in range(3)), batch_size=2, **SETTINGS)
    assert not isinstance(lazily, list)
    assert list(lazily) == [expected] * 3


def test_a_chat_may_keep_its_first_question(monkeypatch):
    pipe, asked = pipe_of(), []
    condense = pipe.model.get_video_features
    monkeypatch.setattr(
        pipe.model, "get_video_features", lambda **inputs: asked.append(inputs["question_ids"]) or condense(**inputs)
    )
    messages = [*chat(VIDEOS[0], "Who?", answer="A cat."), *chat("Where?")]
    pipe(messages, **SETTINGS)
    pipe(messages, question_turn="first", **SETTINGS)
    pipe([messages], question_turn="first", num_workers=1, **SETTINGS)
    assert [pipe.tokenizer.decode(ids[0]) for ids in asked] == ["Where?", "Who?", "Who?"]


def test_the_next_videos_are_read_while_a_batch_is_answered(monkeypatch):
    pipe, seen = pipe_of(), [threading.Event() for _ in VIDEOS]
    streams, generate, answered = pipe.processor.streams, pipe.model.generate, []

    def read(videos, **kwargs):
        found = streams(videos, **kwargs)
        seen[next(i for i, video in enumerate(VIDEOS) if video is videos[0])].set()
        return found

    def answer(**inputs):
        answered.append(seen[min(len(answered) + 1, len(VIDEOS) - 1)].wait(timeout=60))
        return generate(**inputs)

    inputs = [{"video": video, "question": "Who?"} for video in VIDEOS]
    singles = [pipe(one, **SETTINGS) for one in inputs]
    monkeypatch.setattr(pipe.processor, "streams", read)
    monkeypatch.setattr(pipe.model, "generate", answer)
    assert pipe(inputs, **SETTINGS) == singles
    assert answered == [True] * 3


def test_nobody_waits_for_an_input_that_does_not_come():
    pipe, comes = pipe_of(), threading.Event()

    def live():
        yield {"video": VIDEOS[0], "question": "Who?"}
        comes.wait()
        yield {"video": VIDEOS[1], "question": "Who?"}

    answers = pipe(live(), **SETTINGS)
    assert next(answers) == pipe(video=VIDEOS[0], question="Who?", **SETTINGS)
    answers.close()  # the second was never there
    comes.set()


def test_a_broken_video_loses_no_answer_before_it(tmp_path):
    pipe = pipe_of()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    answers = pipe(iter([{"video": VIDEOS[0], "question": "Who?"}, {"video": broken, "question": "Who?"}]), **SETTINGS)
    assert next(answers) == pipe(video=VIDEOS[0], question="Who?", **SETTINGS)
    with pytest.raises(VideoReadError, match="broken.mp4"):
        next(answers)


def test_a_file_asked_about_in_batch_after_batch_is_encoded_once(tmp_path, monkeypatch):
    pipe, read = pipe_of(), []
    encode_videos = pipe.model.encode_videos
    monkeypatch.setattr(
        pipe.model, "encode_videos", lambda videos, progress: read.append(len(videos)) or encode_videos(videos)
    )
    one, other = (str(write_video(tmp_path / f"{name}.mp4", moving_square(8))) for name in "ab")
    inputs = [{"video": video, "question": "Who?"} for video in (one, one, other, one, one)]
    assert len(pipe(inputs, **SETTINGS)) == 5
    assert read == [1, 0, 1, 1, 0]
    read.clear()
    answers = pipe((each for each in inputs[:2]), **SETTINGS)
    next(answers), pipe(inputs[2], **SETTINGS), next(answers)  # another question, between two answers
    assert read == [0, 1, 0]


def test_videos_read_in_processes_of_their_own(tmp_path):
    pipe = pipe_of()
    path = str(write_video(tmp_path / "v.mp4", moving_square(12)))
    inputs = [{"video": path, "question": question} for question in QUESTIONS]
    here = pipe(inputs, num_frames=5, **SETTINGS)
    assert pipe(inputs, num_frames=5, num_workers=2, batch_size=2, **SETTINGS) == here
    options = {"choices": ["red", "blue"], "num_frames": 5}
    for there, one in zip(pipe(inputs, num_workers=2, **options), pipe(inputs, **options), strict=True):
        assert [answer["answer"] for answer in there] == [answer["answer"] for answer in one]


def test_an_answer_says_when_its_frames_are(tmp_path):
    pipe = pipe_of()
    video = write_video(tmp_path / "v.mp4", moving_square(12))
    clip = read_video(video, num_frames=4)
    inputs = [chat(video, VIDEOS[0], "Who?"), chat("Who?")]
    (first,), (second,) = pipe(inputs, num_frames=4, batch_size=2, return_frame_times=True, **SETTINGS)
    assert first["frame_times"] == [clip.times.tolist(), None] and second["frame_times"] == []
    assert {"answer": first["answer"]} == pipe(inputs[0], num_frames=4, **SETTINGS)[0]
    asked = {"video": video, "question": "Who?", "num_frames": 4, "return_frame_times": True}
    elsewhere = pipe([{"video": video, "question": "Who?"}], num_frames=4, num_workers=1, return_frame_times=True)
    assert elsewhere[0][0]["frame_times"] == pipe(**asked)[0]["frame_times"] == [clip.times.tolist()]
    assert [answer["frame_times"] for answer in pipe(**asked, choices=["a", "b"])] == [[clip.times.tolist()]] * 2


def test_a_chat_needs_no_video():
    pipe = pipe_of()
    model, processor = wrapped("internvl_qwen2")
    inputs = encode(processor, chat("Hello?"))
    own = model.generate(**inputs, **SETTINGS)[:, inputs["input_ids"].shape[1] :]
    assert (
        pipe(chat("Hello?"), **SETTINGS)[0]["answer"]
        == processor.batch_decode(own, skip_special_tokens=True)[0].strip()
    )


def test_generation_settings():
    pipe = pipe_of()
    one = {"video": VIDEOS[0], "question": "Who?"}
    assert len(pipe(one, num_beams=3, num_return_sequences=3, max_new_tokens=3)) == 3
    several = pipe([one, one], batch_size=2, num_beams=2, num_return_sequences=2, max_new_tokens=3)
    assert [len(answers) for answers in several] == [2, 2]
    assert several[0] == several[1]
    torch.manual_seed(0)
    sampled = {pipe(one, do_sample=True, max_new_tokens=8)[0]["answer"] for _ in range(4)}
    assert len(sampled) > 1


def test_streaming(capsys):
    pipe = pipe_of()
    answer = pipe(
        video=VIDEOS[0],
        question="Who?",
        streamer=TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True),
        **SETTINGS,
    )
    assert capsys.readouterr().out.strip() == answer[0]["answer"]


@pytest.mark.parametrize("name", [*NAMED, *UNNAMED])
def test_choices(name):
    """Probabilities sum to 1 and come from the mean log-likelihood of each option's tokens, counted by hand here."""
    pipe = pipe_of(name)
    model, processor = wrapped(name)
    options = ["red", "a blue square", "no"]
    answers = pipe(video=VIDEOS[0], question="What is it?", choices=options)
    assert sorted(answer["answer"] for answer in answers) == sorted(options)
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)
    assert answers == sorted(answers, key=lambda answer: -answer["score"])
    prompt = encode(processor, chat(VIDEOS[0], "What is it?"))
    for answer in answers:
        steps = log_probabilities(model, processor, prompt, answer["answer"])
        assert answer["log_likelihood"] == pytest.approx(sum(steps[:-1]) / len(steps[:-1]), abs=1e-4)


def log_probabilities(model, processor, prompt, option) -> list[float]:
    """Of an option's tokens, and of the answer's end after them, one step at a time and without a cache."""
    # Every prompt here ends in a newline or a colon; an option follows a colon after a space.
    ends = processor.tokenizer.decode(prompt["input_ids"][0, -1:]).isspace()
    ids = processor.tokenizer(("" if ends else " ") + option, add_special_tokens=False)["input_ids"]
    stops = model.generation_config.eos_token_id
    steps, inputs = [], dict(prompt)
    for wanted in [*([token] for token in ids), [stops] if isinstance(stops, int) else stops]:
        with torch.no_grad():
            steps.append(float(model(**inputs).logits[0, -1].softmax(dim=-1)[wanted].sum().log()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([wanted[:1]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "token_type_ids" in inputs:
            kind = torch.tensor([[model.image_llm.answer_token_type]])
            inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], kind], dim=1)
    return steps


@pytest.mark.parametrize("stops", [2, [2, 7]])
@pytest.mark.parametrize("image", [False, True])
def test_an_option_that_begins_another(stops, image, monkeypatch):
    """Whoever wants to say the longer one says the shorter one first: only the end tells them apart."""
    pipe = pipe_of("internvl_qwen2")
    model, processor = wrapped("internvl_qwen2")
    monkeypatch.setattr(model.generation_config, "eos_token_id", stops)
    before = [Image.fromarray(VIDEOS[0][0])] if image else []
    messages = chat(*before, VIDEOS[0], "Where?")
    prompt = encode(processor, messages)
    for answer in pipe({"messages": messages}, choices=["left", "left of it", "right"]):
        steps = log_probabilities(model, processor, prompt, answer["answer"])
        assert answer["log_likelihood"] == pytest.approx(sum(steps) / len(steps), abs=1e-4)


@pytest.mark.parametrize("name", [*NAMED, "llava", "gemma3", "paligemma"])
def test_choices_beside_an_image(name):
    """An option's likelihood does not depend on how many options there are, images or not."""
    pipe = pipe_of(name)
    image = Image.fromarray(VIDEOS[0][0])
    messages = chat(image, VIDEOS[1], "Is the image in the video?")
    together = {answer["answer"]: answer["log_likelihood"] for answer in pipe(messages, choices=["yes", "no, never"])}
    for option, expected in together.items():
        assert pipe(messages, choices=[option])[0]["log_likelihood"] == pytest.approx(expected, abs=1e-5)


def test_settings_given_at_the_start(monkeypatch):
    short = pipe_of(max_new_tokens=2, do_sample=False, num_frames=2)
    calls, generate = [], short.model.generate
    monkeypatch.setattr(short.model, "generate", lambda **kwargs: calls.append(kwargs) or generate(**kwargs))
    short({"video": VIDEOS[1], "question": "Who?"})
    short({"video": VIDEOS[1], "question": "Who?"}, max_new_tokens=3, num_frames=5)
    assert [(call["max_new_tokens"], call["do_sample"]) for call in calls] == [(2, False), (3, False)]
    assert [call["num_frames"].tolist() for call in calls] == [[2], [5]]


def test_choices_of_each_input():
    pipe = pipe_of()
    inputs = [
        {"video": VIDEOS[0], "question": "Who?", "choices": ["a", "b"]},
        {"video": VIDEOS[1], "question": "What?", "choices": ["c", "d", "e"]},
    ]
    together = pipe(inputs, batch_size=2)
    assert together == [pipe(one) for one in inputs]
    chats = [{"messages": chat(one["video"], one["question"]), "choices": one["choices"]} for one in inputs]
    assert pipe(chats, batch_size=2) == together
    assert pipe({"messages": chats[0]["messages"]}, choices=["a", "b"]) == together[0]
    with pytest.raises(ValueError, match="some inputs have choices and some have none"):
        pipe([inputs[0], {"video": VIDEOS[1], "question": "What?"}], batch_size=2)


def test_by_name(tmp_path):
    """Registered: with the package there, its own class answers, and no remote code is asked for."""
    model, processor = wrapped("internvl_qwen2")
    pipe = pipeline("video-question-answering", model=model, processor=processor, device="cpu")
    assert isinstance(pipe, VideoQuestionAnsweringPipeline)


def told(block):
    return [{"role": "user", "content": [block, {"type": "text", "text": "Who?"}]}]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"video": VIDEOS[0]}, "Give both video= and question="),
        ({"question": "Who?"}, "Give both video= and question="),
        ({}, "Nothing to answer"),
        ({"video": VIDEOS, "question": ["a", "b"]}, "3 videos, but 2 questions"),
        ({"video": VIDEOS[0], "question": ""}, "A question has no words"),
        ({"inputs": {"video": VIDEOS[0]}}, "An input holds 'video'; it is a dict with 'video' and 'question'"),
        ({"inputs": {"video": VIDEOS[0], "question": "Who?", "fps": 1}}, "An input holds 'video', 'question', 'fps'"),
        ({"inputs": {"videos": VIDEOS[0], "question": "Who?"}}, "An input holds 'videos', 'question'"),
        ({"video": VIDEOS[0], "question": 3}, "A question is a text; got int 3"),
        ({"inputs": {"video": VIDEOS[0], "question": ["Who?"]}}, "A question is a text; got list"),
        ({"video": VIDEOS[0], "question": "Who?", "choices": []}, r"choices are a list of texts, .*; got \[\]"),
        ({"video": VIDEOS[0], "question": "Who?", "choices": [1, 2]}, r"choices are a list of texts, .*; got \[1"),
        ({"video": VIDEOS[0], "question": "Who?", "choices": 5}, r"choices are a list of texts, at least one; got 5"),
        ({"video": VIDEOS[0], "question": "Who?", "num_frames": "8"}, "num_frames must be at least 1 .*, not '8'"),
        ({"video": VIDEOS[0], "question": "Who?", "num_frames": True}, "num_frames must be at least 1 .*, not True"),
        ({"inputs": told({"type": "video_url", "video_url": {"url": "v.mp4"}})}, "a block of type 'video_url'; "),
        ({"inputs": told({"video": "v.mp4"})}, "a block of no type; blocks are of type 'text', 'image', 'video'"),
        ({"video": VIDEOS[0], "question": "Who?", "choices": ["a", ""]}, "A choice has no words"),
        ({"video": VIDEOS[0], "question": "Who?", "choices": "red"}, "choices are a list of texts, .*; got 'red'"),
        ({"inputs": {"messages": None}}, "messages are a list, of a chat's turns; got NoneType"),
        ({"inputs": "v.mp4"}, "Nothing to answer"),
        ({"inputs": []}, "Nothing to answer"),
    ],
)
def test_one_sentence(inputs, message):
    with pytest.raises(ValueError, match=message):
        pipe_of()(**inputs)


def test_a_part_of_a_video(tmp_path):
    path, pipe = str(write_video(tmp_path / "v.mp4", moving_square(40))), pipe_of()
    asked = {"video": path, "question": "Who?", "max_new_tokens": 1, "return_frame_times": True, "num_frames": 4}
    whole = pipe(**asked)[0]["frame_times"][0]
    part = pipe(**asked, videos_kwargs={"start": whole[1], "end": whole[3]})[0]["frame_times"][0]
    assert len(part) == 4 and whole[1] <= min(part) and max(part) < whole[3]
    assert pipe(**asked)[0]["frame_times"][0] == whole  # and not what was kept of the part
    with pytest.raises(ValueError, match="videos_kwargs has begin; known are"):
        pipe(**asked, videos_kwargs={"begin": 1})


@torch.no_grad()
def test_what_was_encoded_is_forgotten_where_it_would_be_otherwise_now(tmp_path):
    pipe = copy.deepcopy(pipe_of())
    model, processor, path = pipe.model, pipe.processor, str(write_video(tmp_path / "v.mp4", moving_square(40)))
    encoded, encode_videos = [], model.encode_videos
    model.encode_videos = lambda streams, progress: encoded.append(len(streams)) or encode_videos(streams, progress)

    def ask(**sampling):
        encoded.clear()
        answers = [pipe(video=path, question="Who?", return_frame_times=True, **SETTINGS, **sampling)[0] for _ in "12"]
        assert answers[0] == answers[1]
        return answers[0]

    changes = {
        "nothing": lambda: None,
        "frames": lambda: setattr(processor, "num_frames", 3),
        "pixels": lambda: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
        "stored": lambda: setattr(model.config, "num_stored_tokens", 7),
        "encoder": lambda: model.base.get_encoder("image").encoder.layer[0].layernorm_before.weight.mul_(2),
        "projector": lambda: [w.mul_(2) for w in model.base.model.multi_modal_projector.parameters()],
        "scorer": lambda: [w.add_(0.1 * torch.randn_like(w)) for w in model.video_tokenizer.scorer.parameters()],
    }
    ask()
    for name, change in changes.items():
        change()
        ask()
        assert encoded == ([0, 0] if name == "nothing" else [1, 0]), name
    model.base.get_decoder().layers[0].input_layernorm.weight.mul_(2)  # it comes later
    ask()
    assert encoded == [0, 0]
    for other in (10, 20):  # in the middle of what numpy does not print
        index = np.full(1200, 30)
        index[600] = other
        assert ask(videos_kwargs={"indices": index})["frame_times"][0][600] == pytest.approx(other / 8)


def test_a_prompt_longer_than_the_model_reads(monkeypatch):
    pipe, said = pipe_of(), []
    monkeypatch.setattr(pipeline_linvt.logger, "warning", said.append)
    pipe(video=VIDEOS[0], question="Who?", max_new_tokens=1)
    assert not said
    monkeypatch.setattr(pipe.model.config.get_text_config(), "max_position_embeddings", 10)
    pipe(video=VIDEOS[0], question="Who?", max_new_tokens=1)
    assert "and the model reads 10: its answer means little" in said[0]
