"""The world of moving shapes: what is asked about it can be seen in its pixels, and its splits share nothing."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image

from linvt_hf import video_reading
from linvt_hf.shapes.questions import LONG_KINDS, PLACES, TEMPLATES, VIDEO_KINDS, ask, place_name
from linvt_hf.shapes.videos import chosen_questions, write_split
from linvt_hf.shapes.world import COLOURS, LONG, SHAPES, SHORT, SPLITS, draw, draw_video, make_scene

KINDS = ("image", "video", "long")


def scenes(kind: str, split: str = "train", count: int = 40):
    return [make_scene(kind, split, number) for number in range(count)]


def colour_mask(frame: np.ndarray, colour: str) -> np.ndarray:
    """Where a frame has a colour, up to its smooth edges."""
    return np.abs(frame.astype(int) - np.array(COLOURS[colour])).max(axis=-1) < 12


def without(scene, thing):
    return replace(scene, things=tuple(other for other in scene.things if other != thing))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_comes_from_its_split_and_number_alone(kind):
    assert scenes(kind, count=5) == scenes(kind, count=5)
    assert len(set(scenes(kind, count=20))) == 20
    with pytest.raises(ValueError, match="no split 'dev'"):
        make_scene(kind, "dev", 0)


def test_unknown_kind_of_scene():
    with pytest.raises(ValueError, match="no kind of scene 'film'"):
        make_scene("film", "train", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_scene(kind):
    found = {split: set(scenes(kind, split, 30)) for split in SPLITS}
    assert not found["train"] & found["test"] and not found["train"] & found["validation"]
    # Not by chance: a scene's own content says which split it may be in.
    assert all(scene.split == split for split, several in found.items() for scene in several)


@pytest.mark.parametrize("kind", KINDS)
def test_things_are_inside_the_picture_and_apart(kind):
    for scene in scenes(kind, count=20):
        for frame in range(0, scene.frames, 5):
            places = scene.at(frame)
            for thing, (x, y) in places:
                assert 7 <= thing.radius <= 9
                assert thing.radius <= x <= 64 - thing.radius and thing.radius <= y <= 64 - thing.radius
            for i, (one, a) in enumerate(places):
                for other, b in places[:i]:
                    assert np.hypot(a[0] - b[0], a[1] - b[1]) > one.radius + other.radius


def test_every_thing_can_be_seen_in_its_colour_where_the_scene_says():
    for scene in scenes("image", count=60):
        frame = draw(scene, 0)
        for thing in scene.things:
            x, y = (round(value) for value in thing.start)
            reach = round(thing.radius)
            part = frame[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach]
            assert colour_mask(part, thing.colour).sum() > 20, thing


def test_direction_can_be_seen():
    checked = Counter()
    for scene in scenes("video", count=80):
        frames = draw_video(scene)
        for thing in scene.things:
            if not thing.moves or thing.later:
                continue
            first, last = frames[thing.appears], frames[thing.leaves - 1]
            (y0, x0), (y1, x1) = (
                np.argwhere(colour_mask(frame, thing.colour)).mean(axis=0) for frame in (first, last)
            )
            wide, high = x1 - x0, y1 - y0
            seen = ("right" if wide > 0 else "left") if abs(wide) > abs(high) else ("down" if high > 0 else "up")
            assert seen == thing.direction
            checked[seen] += 1
    assert min(checked[direction] for direction in ("left", "right", "up", "down")) >= 5


def check_caption(scene, caption: str) -> None:
    """Each thing is told once, in the order of appearance, with what it does."""
    parts = caption.split(", ")
    assert len(parts) == len(scene.things)
    told = {shape: part for part in parts for shape in SHAPES if shape in part}
    for thing in scene.things:
        part = told[thing.shape]
        assert part.startswith(thing.name)
        does = "flashes up" if thing.is_brief else f"moves {thing.direction}" if thing.moves else "stays at"
        assert does in part and (thing.later is None) == ("turns" not in part)
        assert part.endswith(place_name(thing.start)) or thing.moves or thing.later
    appeared = [next(t.appears for t in scene.things if t.shape in part) for part in parts]
    assert appeared == sorted(appeared)


def test_answers_about_time_agree_with_the_frames():
    asked = Counter()
    for scene in scenes("video", count=80):
        frames = draw_video(scene)
        by_shape = {thing.shape: thing for thing in scene.things}
        for question in ask(scene, Random(0)):
            asked[question.kind] += 1
            if question.kind == "caption":
                check_caption(scene, question.answer)
                continue
            assert question.answer in question.options
            if question.kind == "colour in time":
                thing = next(by_shape[word] for word in re.findall(r"\w+", question.text) if word in by_shape)
                frame = 0 if "start" in question.text else SHORT - 1
                assert thing.is_there(frame) and thing.colour_at(frame) == question.answer
                assert colour_mask(frames[frame], question.answer).any()
            elif question.kind == "flash colour":
                there = [colour_mask(frame, question.answer).any() for frame in frames]
                assert 1 <= sum(there) <= 2
            elif question.kind == "total":
                colours = {c for thing in scene.things for c in (thing.colour, thing.later) if c}
                changes = sum(thing.later is not None for thing in scene.things)
                assert int(question.answer) == len(colours) - changes
                assert all(any(colour_mask(frame, c).any() for frame in frames) for c in colours)
    assert set(asked) == {*VIDEO_KINDS, "caption"}


def test_a_long_video_shows_the_event_in_two_to_four_frames():
    for scene in scenes("long", "test", 10):
        assert scene.frames == LONG
        brief = [thing for thing in scene.things if thing.is_brief]
        assert len(brief) == 1 and 2 <= brief[0].leaves - brief[0].appears <= 4
        asked = {question.kind: question.answer for question in ask(scene, Random(0)) if question.kind in LONG_KINDS}
        assert asked == {
            "flash": brief[0].shape,
            "flash colour": brief[0].colour,
            "flash place": place_name(brief[0].start),
        }


@pytest.mark.parametrize("kind", ["image", "video", "long"])
def test_neither_words_nor_habit_give_the_answer_away(kind):
    texts, answers = defaultdict(set), defaultdict(Counter)
    for scene in scenes(kind, count=300 if kind != "long" else 60):
        for question in chosen_questions(scene, Random(repr(scene))):
            texts[question.kind].add(question.text)
            answers[question.kind][question.answer] += 1
            if question.kind not in ("motion", "caption"):
                assert question.answer not in question.text.rstrip("?").split()
    for asked, counts in answers.items():
        assert len(texts[asked]) >= len(TEMPLATES[asked])
        if asked not in ("description", "caption", "motion"):
            assert max(counts.values()) / sum(counts.values()) < 0.45, (asked, counts)


def test_place_names_divide_the_picture():
    assert [place_name((x, y)) for y in (5, 32, 60) for x in (5, 32, 60)] == list(PLACES)


@pytest.mark.parametrize(("kind", "count"), [("video", 3), ("image", 3), ("long", 1)])
def test_written_files_hold_the_scene(tmp_path, kind, count):
    records = write_split(tmp_path, kind, "validation", count)
    before = [file.read_bytes() for file in records]
    again = write_split(tmp_path, kind, "validation", count)
    assert again == records and [file.read_bytes() for file in again] == before
    names = [f"{kind}-validation{end}.jsonl" for end in ("-captions", "")]
    assert [file.name for file in records] == (names[1:] if kind == "image" else names)
    lines = [json.loads(line) for file in records for line in file.read_text().splitlines()]
    files = {
        block[block["type"]] for line in lines for block in line["messages"][0]["content"] if block["type"] != "text"
    }
    assert len(files) == count
    for number, name in enumerate(sorted(files)):
        scene = make_scene(kind, "validation", number)
        if kind == "image":
            assert np.array_equal(np.asarray(Image.open(tmp_path / name)), draw(scene, 0))
            continue
        clip = video_reading.read_video(tmp_path / name, num_frames=None)
        assert clip.frames.shape == (LONG if kind == "long" else SHORT, 64, 64, 3)
        difference = np.abs(clip.frames.numpy().astype(int) - draw_video(scene))
        assert difference.mean() < 4  # H.264 keeps colour at half the resolution
        for thing in scene.things:  # and the whole of what is there for a moment only
            if thing.is_brief:
                shown = draw_video(scene).astype(int) - draw_video(without(scene, thing))
                inside = np.abs(shown).max(axis=-1) > 60  # [T, H, W]
                assert inside.any(axis=(1, 2)).nonzero()[0].tolist() == list(range(thing.appears, thing.leaves))
                assert difference[inside].mean() < 20 < np.abs(shown[inside]).mean() / 2


def test_for_training_everything_is_asked_and_else_one_question_of_each_kind(tmp_path):
    for split in ("train", "test"):
        write_split(tmp_path, "video", split, 3)
        asked = [json.loads(line) for line in (tmp_path / f"video-{split}.jsonl").read_text().splitlines()]
        every = [question for scene in scenes("video", split, 3) for question in ask(scene, Random(0))]
        kinds = [question.kind for question in every if question.kind != "caption"]
        if split == "train":
            assert sorted(record["kind"] for record in asked) == sorted(kinds)
        else:
            assert len(asked) < len(kinds)
