"""
What the small image-LLM learns from: pictures of `shapes` and texts, and what is asked about them.

Targets are dense, so that little is needed: many questions and a full description a prompt, and what lies in each
visual token's part of the picture.
"""

from dataclasses import dataclass, field, replace
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image

from ..training.labels import IGNORED
from .bases import INTERNVL2, SIDE, Base
from .questions import COMPARING, PLACES, Question, ask, ask_about_pictures, place_name
from .world import CANVAS, COLOURS, SHAPES, Scene, Thing, draw, moved

CONTENTS = len(COLOURS) * len(SHAPES) + len(COLOURS) + len(SHAPES) + len(PLACES)


@dataclass
class Sample:
    """
    One prompt of pretraining: pictures or a text, and several questions of which each sees these and itself only.

    pixels: uint8 [P, 64, 64, 3]. contents: [P, tokens, what may lie there], see `contents`.
    ids, labels, block: [S]; block 0 is what all questions see, the others are a question and its answer each.
    """

    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, CANVAS, CANVAS, 3), dtype=np.uint8))
    contents: np.ndarray = field(default_factory=lambda: np.zeros((0, SIDE**2, CONTENTS), dtype=np.float32))
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)

    def add(self, ids: list[int], block: int, learn: bool = False) -> None:
        self.ids += ids
        self.labels += ids if learn else [IGNORED] * len(ids)
        self.block += [block] * len(ids)


def pictures_sample(scene: Scene, random: Random, tokenizer, albums: float, base: Base = INTERNVL2) -> Sample:
    """
    A scene in one to four pictures, each of which shows some of its things, or (`albums` of the time) several pictures
    in which they change, and what is asked about them.

    Image-LLMs of this architecture read large images as several tiles and several images a prompt, so they are used
    to any number of visual tokens and to a thing that is seen more than once; this one learns it here.
    """
    if random.random() >= albums:
        pictures = layered(scene, random)
        questions = ask(scene, random)
        if len(pictures) > 1:  # in which nothing moves, and whoever always says so learns nothing
            questions += [q for q in ask_about_pictures(pictures, random) if q.kind not in COMPARING]
    else:
        pictures = album(scene, random)
        questions = ask_about_pictures(pictures, random)
    sample = of_pictures([as_file(draw(picture, 0), random) for picture in pictures], pictures, tokenizer, base)
    ask_about(sample, _some(questions, random, always=COMPARING), tokenizer)
    return sample


def of_pictures(drawn: list[np.ndarray], pictures: list[Scene], tokenizer, base: Base = INTERNVL2) -> Sample:
    """The prompt up to the question."""
    sample = Sample(np.stack(drawn), np.stack([contents(picture) for picture in pictures]))
    places = base.place * SIDE**2 * len(drawn)
    sample.add(tokenizer(f"<|im_start|>user\n{base.before}{places}{base.after}")["input_ids"], 0)
    return sample


def story_sample(scene: Scene, random: Random, tokenizer) -> Sample:
    """
    What happens in a video, told in words, and what is asked about it: the language model has read of motion and
    change, as any language model has, before it is shown any.
    """
    questions = ask(scene, random)
    story = next(question.answer for question in questions if question.kind == "caption")
    sample = Sample()
    sample.add(tokenizer("<|im_start|>user\n")["input_ids"], 0)
    sample.add(tokenizer(f"{story}\n")["input_ids"], 0, learn=True)
    ask_about(sample, _some(questions, random), tokenizer)
    return sample


def _some(questions: list[Question], random: Random, count: int = 6, always: tuple[str, ...] = ()) -> list[Question]:
    """
    A few questions, and in half of the samples one whose answer is long, which outweighs the others; all of the kinds
    `always`: to compare pictures is learned late, and not at all where it is asked seldom.
    """
    asked = [question for question in questions if question.kind in always]
    long = [question for question in questions if not question.options]
    short = [question for question in questions if question.options and question not in asked]
    several = random.sample(short, min(count, len(short))) + random.sample(long, random.randint(0, min(len(long), 1)))
    return asked + several


def ask_about(sample: Sample, questions: list[Question], tokenizer) -> None:
    """Appends each question, with its answer, as a block of its own."""

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    for block, question in enumerate(questions, 1):
        sample.add(ids(f"{question.text}<|im_end|>\n<|im_start|>assistant\n"), block)
        sample.add(ids(f"{question.answer}<|im_end|>"), block, learn=True)


def layered(scene: Scene, random: Random) -> list[Scene]:
    """The scene as it is, or spread over two to four pictures: each thing is in at least one of them."""
    count = random.choice((1, 1, 2, 2, 3, 4))
    if count == 1:
        return [scene]
    layers: list[list[Thing]] = [[] for _ in range(count)]
    for thing in scene.things:
        for layer in random.sample(layers, random.randint(1, count)):
            layer.append(thing)
    return [replace(scene, things=tuple(things)) for things in layers]


def album(scene: Scene, random: Random) -> list[Scene]:
    """
    Two to four pictures of the scene's things, each shape once at most: what is in one may be missing in the next, or
    be at another place, or have another colour.
    """
    cast = {thing.shape: thing for thing in scene.things}.values()
    restless = {thing.shape for thing in cast if random.random() < 0.5}
    been = {thing.shape: [] for thing in cast}  # at which places
    colourful = {thing.shape for thing in cast if random.random() < 0.3}
    pictures = []
    for _ in range(random.randint(2, 4)):
        things: list[Thing] = []
        for thing in sorted(cast, key=lambda thing: thing.shape in restless):  # those that stay take their place first
            if random.random() < 0.25:
                continue
            if thing.shape in colourful:
                thing = replace(thing, colour=random.choice(list(COLOURS)))
            if thing.shape in restless:
                if (thing := moved(thing, things, been[thing.shape], random)) is None:
                    continue
                been[thing.shape].append(thing.start)
            things.append(thing)
        pictures.append(replace(scene, things=tuple(things)))
    return pictures


def as_file(picture: np.ndarray, random: Random) -> np.ndarray:
    """Half of the pictures as a JPEG file would give them back: colours in half the resolution, as in a video."""
    if random.random() < 0.5:
        return picture
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=random.randint(80, 95))
    return np.asarray(Image.open(file))


def contents(scene: Scene) -> np.ndarray:
    """
    What each visual token should know, 0 or 1, [16, colours * shapes + colours + shapes + places]: which things lie
    in its part of the picture or reach well into it, and by what name their places go.
    """
    part = CANVAS / SIDE
    centers = (np.arange(SIDE) + 0.5) * part
    kinds = np.zeros((SIDE, SIDE, len(COLOURS), len(SHAPES)), dtype=np.float32)
    places = np.zeros((SIDE, SIDE, len(PLACES)), dtype=np.float32)
    for thing in scene.things:
        x, y = thing.start
        reach = part / 2 + 0.35 * thing.radius
        inside = (abs(centers - y) < reach)[:, None] & (abs(centers - x) < reach)
        kinds[inside, list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)] = 1
        places[inside, PLACES.index(place_name(thing.start))] = 1
    each = [kinds.reshape(SIDE, SIDE, -1), kinds.max(axis=3), kinds.max(axis=2), places]
    return np.concatenate(each, axis=-1).reshape(SIDE**2, -1)
