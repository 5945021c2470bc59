"""A model that many ask at once: every question gets its own answer, whatever becomes of the others."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("av", reason="reading video files needs PyAV")

from linvt_hf.asking.loading import load_pipeline
from linvt_hf.serving.engine import Engine
from linvt_hf.serving.questions import Asked, Busy, End, Failure, Piece, Question
from linvt_hf.serving.rows import GrowingText

MODEL = Path(__file__).parents[1] / "examples/linvt-shapes"
VIDEO = str(MODEL / "example.mp4")
ASKED = ("What shape flashes up?", "Which way does the yellow cross move?", "Does the yellow cross move?")


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(MODEL)


@pytest.fixture(scope="module")
def expected(pipeline):
    return {words: pipeline(video=VIDEO, question=words, max_new_tokens=20)[0]["answer"] for words in ASKED}


@pytest.fixture
def engine(pipeline):
    engine = Engine(pipeline)
    yield engine
    engine.close()


def chat(words, video=VIDEO, **block):
    content = [{"type": "video", "video": video, **block}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


def question(words=ASKED[0], video=VIDEO, key=None, **settings):
    block = {} if key is None else {"key": key}
    return Question(chat(words, video, **block), **{"max_new_tokens": 20, "temperature": 0.0, **settings})


def said(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


def test_an_answer_word_by_word(engine, expected):
    *pieces, end = engine.stream(question())
    assert said(pieces) == expected[ASKED[0]]
    assert isinstance(end, End) and end.reason == "stop" and 1 < end.new_tokens < 20
    assert end.prompt_tokens > engine.pipeline.model.config.num_video_tokens


def test_many_at_once_and_none_mixed_up(engine, expected, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    answers, rng = {}, random.Random(0)

    def ask(number):
        words = rng.choice((*ASKED, None))
        try:
            asked = question(words or "What?", VIDEO if words else str(broken), key=number % 3 if words else None)
            answers[number] = (words, said(engine.stream(asked)))
        except ValueError as error:
            answers[number] = (words, str(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 40
    for words, answer in answers.values():
        assert answer == expected[words] if words else "cannot be read as a video" in answer


def test_a_video_is_encoded_once_while_it_is_remembered(pipeline, expected, monkeypatch):
    encoded = []
    encode = type(pipeline.model).encode_video
    monkeypatch.setattr(
        type(pipeline.model), "encode_video", lambda self, v, *args: encoded.append(v) or encode(self, v, *args)
    )
    engine = Engine(pipeline)
    for words in ASKED:
        assert said(engine.stream(question(words, key="one"))) == expected[words]
    assert len(encoded) == 1
    list(engine.stream(question(key="one", num_frames=8)))
    list(engine.stream(question()))
    assert len(encoded) == 3
    engine.close()
    small = Engine(pipeline, cache_bytes=engine._cache["one", None, None].nbytes)
    for key in ("one", "two", "one"):
        list(small.stream(question(key=key)))
    assert len(encoded) == 6
    small.close()


def test_rows_end_by_rules_of_their_own(engine, expected):
    """In one batch: a length, a stop text, and a plain one."""
    hold, released = threading.Event(), threading.Event()
    engine.run(lambda pipeline: (released.set(), hold.wait()))
    released.wait()
    events = {name: [] for name in ("short", "stopped", "plain")}
    whole = expected[ASKED[1]]
    settings = {"short": {"max_new_tokens": 1}, "stopped": {"stop": (whole[1:3],)}, "plain": {}}
    for name, given in settings.items():
        engine.ask(question(ASKED[1], **given), events[name].append)
    hold.set()
    engine.close()
    reasons = {name: events[name][-1].reason for name in events}
    assert reasons == {"short": "length", "stopped": "stop", "plain": "stop"}
    assert events["short"][-1].new_tokens == 1
    assert said(events["stopped"]) == whole[:1] and said(events["plain"]) == whole


def test_sampling(engine):
    """A seed decides, whatever the temperature allows; questions of different sampling are no batch."""
    same = [said(engine.stream(question(temperature=5.0, seed=3))) for _ in range(2)]
    assert same[0] == same[1]
    others = {said(engine.stream(question(temperature=5.0, seed=seed))) for seed in range(5)}
    assert len(others) > 1
    kinds = [question(temperature=0.0), question(temperature=0.7), question(temperature=0.0), question(seed=1)]
    with engine._change:
        engine._line.extend(Asked(each, lambda event: None) for each in kinds)
        assert [each.question for each in engine._take()] == [kinds[0], kinds[2]]
        assert [each.question for each in engine._take()] == [kinds[1]]
        assert [each.question for each in engine._take()] == [kinds[3]]


def test_who_waits_too_long_or_is_one_too_many(pipeline):
    engine = Engine(pipeline, max_waiting=1)
    hold, released = threading.Event(), threading.Event()
    engine.run(lambda pipeline: (released.set(), hold.wait()))
    released.wait()
    late = []
    engine.ask(question(seconds=0.05), late.append)
    with pytest.raises(Busy, match="1 questions wait already"):
        engine.ask(question(), late.append)
    time.sleep(0.1)
    hold.set()
    engine.close()
    assert len(late) == 1 and str(late[0].error) == "There was no whole answer within 0.05 s."
    with pytest.raises(RuntimeError, match="takes no more questions"):
        engine.ask(question(), late.append)


def test_who_goes_away_is_not_answered(engine):
    events = []
    asked = engine.ask(question(max_new_tokens=20), events.append)
    asked.cancel()
    engine.close()
    assert not events


def test_who_goes_away_between_two_videos_keeps_nobody_waiting(pipeline, monkeypatch):
    engine, events, encoded = Engine(pipeline), [], []
    encode = pipeline.model.encode_video

    def slowly(*arguments):
        encoded.append(1)
        asked.cancel()
        return encode(*arguments)

    monkeypatch.setattr(pipeline.model, "encode_video", slowly)
    begun = threading.Event()
    engine.run(lambda pipeline: begun.wait())
    asked = engine.ask(Question([turn for _ in range(5) for turn in chat("Who?")]), events.append)
    begun.set()
    engine.close()
    assert len(encoded) == 1 and not events


def test_closing_answers_what_waits_and_gives_up_in_the_end(pipeline, expected, monkeypatch):
    engine, events = Engine(pipeline), []
    engine.ask(question(), events.append)
    engine.close()
    assert said(events) == expected[ASKED[0]] and isinstance(events[-1], End)

    engine, events = Engine(pipeline, batch_size=1), []
    monkeypatch.setattr(type(pipeline.model), "encode_video", lambda *args: time.sleep(0.3) or 1 / 0)
    for _ in range(3):
        engine.ask(question(), events.append)
    engine.close(0.1)
    assert [type(event) for event in events] == [Failure] * 3
    assert isinstance(events[0].error, ZeroDivisionError) and "stopped before" in str(events[2].error)


def test_a_batch_that_does_not_fit_is_answered_by_halves(engine, expected, monkeypatch):
    generate, sizes = type(engine.pipeline.model).generate, []

    def little_memory(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, **inputs)

    monkeypatch.setattr(type(engine.pipeline.model), "generate", little_memory)
    hold = threading.Event()
    engine.run(lambda pipeline: hold.wait())
    events = {words: [] for words in ASKED}
    for words in ASKED:
        engine.ask(question(words), events[words].append)
    hold.set()
    engine.close()
    assert {words: said(events[words]) for words in ASKED} == expected and sizes == [3, 2, 1, 1, 1]


def test_a_prompt_that_is_too_long_is_said_to_be(engine):
    with pytest.raises(ValueError, match="the model reads .* in all"):
        list(engine.stream(question(max_new_tokens=10**6)))
    with pytest.raises(ValueError, match="has 1,000,000 characters, and the model reads .* tokens. Ask for less"):
        list(engine.stream(question("a" * 10**6)))
    with pytest.raises(ValueError, match="A question has no words"):
        list(engine.stream(question(" ")))


class Characters:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "whole"),
    [
        ("  Äpfel 🍎 und Birnen \n", (), "Äpfel 🍎 und Birnen"),
        ("one two three", ("two",), "one"),
        ("one tw", ("two",), "one tw"),
        ("a\n\nb", ("\n\n",), "a"),
        ("stop", ("stop",), ""),
        ("xaxab", ("xab", "zz"), "xa"),
    ],
)
def test_growing_text(text, stop, whole):
    growing = GrowingText(Characters(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(growing.add(token))
        if growing.stopped:
            break
    pieces.append(growing.end())
    assert "".join(pieces) == whole and not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1 or len(whole) < 3
