"""
A world of coloured shapes that appear, move, change colour, flash up and vanish, and how it is drawn.

A scene is everything there is to know about a video; whatever is asked about the video is answered from it. Scenes
come from a seed: the same split and number always give the same scene, and a scene belongs to one split only, because
its own content decides which.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 64  # the unit of all places and sizes: a scene is this high and wide, at whatever size it is drawn
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "cyan": (60, 215, 225),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPLITS = ("train", "validation", "test")
SHORT, LONG = 16, 256  # frames
FPS = 8


@dataclass(frozen=True)
class Thing:
    """
    One shape and what becomes of it. It is there in frames `appears` <= f < `leaves`, goes evenly from `start` to
    `end` (centres, in units of the canvas, x to the right, y down) while it is there, and from frame `changes` on it
    has colour `later`.
    """

    shape: str
    colour: str
    radius: float
    start: tuple[float, float]
    end: tuple[float, float]
    appears: int
    leaves: int
    later: str | None = None
    changes: int | None = None

    def is_there(self, frame: int) -> bool:
        return self.appears <= frame < self.leaves

    def place(self, frame: int) -> tuple[float, float]:
        share = (frame - self.appears) / max(self.leaves - self.appears - 1, 1)
        return tuple(a + share * (b - a) for a, b in zip(self.start, self.end, strict=True))

    def colour_at(self, frame: int) -> str:
        return self.later if self.later is not None and frame >= self.changes else self.colour

    @property
    def name(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"

    @property
    def moves(self) -> bool:
        return self.start != self.end

    @property
    def direction(self) -> str | None:
        """Where it moves, as a key of `DIRECTIONS`; None if it stays."""
        return direction_between(self.start, self.end)

    @property
    def is_brief(self) -> bool:
        return self.leaves - self.appears <= 4


@dataclass(frozen=True)
class Scene:
    """A video (or, with one frame, a picture) before it is drawn: its things, in drawing order, and its background."""

    things: tuple[Thing, ...]
    frames: int
    background: tuple[int, int, int]

    def at(self, frame: int) -> list[tuple[Thing, tuple[float, float]]]:
        """The things of a frame and the places of their centres."""
        return [(thing, thing.place(frame)) for thing in self.things if thing.is_there(frame)]

    @property
    def split(self) -> str:
        """The only split this scene can be in: 80 % of all scenes are for training, 10 % each for the others."""
        digit = int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:4], "big") % 10
        return {0: "test", 1: "validation"}.get(digit, "train")


def draw(scene: Scene, frame: int, size: int = CANVAS) -> np.ndarray:
    """One frame, uint8 [size, size, 3], with smooth edges."""
    fine = 4  # drawn four times as large, then averaged
    unit = size * fine / CANVAS
    image = Image.new("RGB", (size * fine, size * fine), scene.background)
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in scene.at(frame):
        _draw_shape(pen, thing.shape, x * unit, y * unit, thing.radius * unit, COLOURS[thing.colour_at(frame)])
    return np.asarray(image.reduce(fine))


def draw_video(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """All frames, uint8 [T, size, size, 3]."""
    return np.stack([draw(scene, frame, size) for frame in range(scene.frames)])


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]):
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.42 * r))
    elif shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=colour)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=colour)
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=colour)
    elif shape == "star":
        corners = [(r * (1.08 if i % 2 == 0 else 0.42), math.pi * (i / 5 - 0.5)) for i in range(10)]
        pen.polygon([(x + d * math.cos(a), y + d * math.sin(a)) for d, a in corners], fill=colour)


# ---- how scenes come about ----


def make_scene(kind: str, split: str, number: int) -> Scene:
    """
    Scene `number` of a split. Kinds: "image" (one frame), "video" (16 frames), "long" (256 frames, in 2 to 4 of which
    something flashes up).
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split '{split}'; splits are {', '.join(SPLITS)}.")
    makers = {"image": _image, "video": _video, "long": _long}
    if kind not in makers:
        raise ValueError(f"There is no kind of scene '{kind}'; kinds are {', '.join(makers)}.")
    random = Random(f"{kind} {split} {number}")  # seeded by the text's hash, the same in every process
    while True:
        scene = makers[kind](random)
        if scene is not None and scene.split == split:
            return scene


def _background(random: Random) -> tuple[int, int, int]:
    grey = random.randint(10, 60)
    return tuple(grey + random.randint(-8, 8) for _ in range(3))


def direction_between(start: tuple[float, float], end: tuple[float, float]) -> str | None:
    """The key of `DIRECTIONS` for a way from `start` to `end`; None if they are the same, or it goes aslant."""
    way = (end[0] - start[0], end[1] - start[1])
    along, aside = sorted((abs(part) for part in way), reverse=True)
    if along == 0 or along < 2 * aside:
        return None
    return max(DIRECTIONS, key=lambda name: sum(a * b for a, b in zip(DIRECTIONS[name], way, strict=True)))


def _anywhere(random: Random, radius: float) -> tuple[float, float]:
    """A centre inside the canvas, and not on the border between two of its thirds, which have names."""
    edge = radius + 1
    while True:
        place = tuple(round(random.uniform(edge, CANVAS - edge), 1) for _ in range(2))
        if all(abs(value - border) >= 1.5 for value in place for border in (CANVAS / 3, 2 * CANVAS / 3)):
            return place


def _collide(a: Thing, b: Thing) -> bool:
    """Whether two things touch in any frame that has both."""
    frames = range(max(a.appears, b.appears), min(a.leaves, b.leaves))
    return any(math.dist(a.place(frame), b.place(frame)) < a.radius + b.radius + 1 for frame in frames)


def _fits(thing: Thing, others: list[Thing]) -> bool:
    return not any(_collide(thing, other) for other in others)


def moved(thing: Thing, others: list[Thing], been: list[tuple[float, float]], random: Random) -> Thing | None:
    """
    The same thing, still, clearly away from all places where it has been, and where it touches no other; None if no
    place was found.
    """
    for _ in range(20):
        place = _anywhere(random, thing.radius)
        elsewhere = replace(thing, start=place, end=place)
        if all(math.dist(place, before) >= 0.3 * CANVAS for before in been) and _fits(elsewhere, others):
            return elsewhere
    return None


def _image(random: Random) -> Scene | None:
    """One to five things, no two of the same shape and colour."""
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    things: list[Thing] = []
    for shape, colour in random.sample(kinds, random.randint(1, 5)):
        for _ in range(20):
            radius = random.uniform(7, 9)
            place = _anywhere(random, radius)
            thing = Thing(shape, colour, round(radius, 1), place, place, 0, 1)
            if _fits(thing, things):
                things.append(thing)
                break
        else:
            return None
    return Scene(tuple(things), 1, _background(random))


def _path(random: Random, radius: float, moves: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where a thing starts and ends; a way of at least 40 % of the canvas if it moves."""
    start = _anywhere(random, radius)
    if not moves:
        return start, start
    while True:
        x, y = DIRECTIONS[random.choice(list(DIRECTIONS))]
        way = round(random.uniform(0.4, 0.7) * CANVAS, 1)
        end = (round(start[0] + way * x, 1), round(start[1] + way * y, 1))
        if all(radius < place < CANVAS - radius for place in end):
            return start, end
        start = _anywhere(random, radius)


def _add(random: Random, things: list[Thing], lifetime: tuple[int, int], shape: str, colour: str, moves: bool) -> bool:
    """Puts one more thing where it touches none of the others; False if no place was found."""
    for _ in range(30):
        radius = round(random.uniform(7, 9), 1)
        start, end = _path(random, radius, moves)
        thing = Thing(shape, colour, radius, start, end, *lifetime)
        if _fits(thing, things):
            things.append(thing)
            return True
    return False


def _video(random: Random) -> Scene | None:
    """
    One to four things of different shapes that stay for a while, and sometimes one that flashes up. Their entrances
    are spread over the video or all at the start; each may move, and one may change its colour.
    """
    count = random.randint(1, 4)
    shapes, colours = random.sample(SHAPES, count + 1), random.sample(list(COLOURS), count + 2)
    one_by_one = count > 1 and random.random() < 0.6
    things: list[Thing] = []
    for index in range(count):
        appears = 0
        if one_by_one and index:
            appears = index * 12 // count + random.randint(-1, 1)
        stays = random.random() < 0.5
        leaves = SHORT if stays else random.randint(min(appears + 6, SHORT), SHORT)
        if leaves - appears < 5 or not _add(
            random, things, (appears, leaves), shapes[index], colours[index], moves=random.random() < 0.5
        ):
            return None
    if random.random() < 0.6:
        index = random.choice([i for i, thing in enumerate(things) if thing.leaves - thing.appears >= 6] or [-1])
        if index < 0:
            return None
        changes = random.randint(things[index].appears + 3, things[index].leaves - 3)
        things[index] = replace(things[index], later=colours[-1], changes=changes)
    if random.random() < 0.6:
        appears, length = random.randint(1, SHORT - 3), random.randint(1, 2)
        if not _add(random, things, (appears, appears + length), shapes[-1], colours[-2], moves=False):
            return None
    random.shuffle(things)
    return Scene(tuple(things), SHORT, _background(random))


def _long(random: Random) -> Scene | None:
    """Two or three things that stay, and one more that is there for 2 to 4 of the 256 frames."""
    count = random.randint(2, 3)
    shapes, colours = random.sample(SHAPES, count + 1), random.sample(list(COLOURS), count + 1)
    things: list[Thing] = []
    for shape, colour in zip(shapes[:count], colours, strict=False):
        if not _add(random, things, (0, LONG), shape, colour, moves=random.random() < 0.5):
            return None
    appears, length = random.randint(1, LONG - 5), random.randint(2, 4)
    if not _add(random, things, (appears, appears + length), shapes[-1], colours[-1], moves=False):
        return None
    return Scene(tuple(things), LONG, _background(random))
