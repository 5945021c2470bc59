"""Decoded frames to pixels, some at a time and in order, while the next are decoded."""

import atexit
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

import numpy as np

from .video_index import VideoReadError, import_av
from .video_limits import Deadline, Limits

# Chunks that are decoded ahead of the one that is looked at (ours).
_AHEAD = 2
# Decoded frames that wait for their conversion (ours).
_AT_ONCE = 4


class Misled(Exception):
    """The decoded frames are not what the packets said."""


class _Left(Exception):
    """Nobody waits for the frames any more."""


class Chunks:
    """
    The pixels of `count` frames, uint8 arrays [t, H, W, 3] of at most `size` frames, filled by several threads.

    Args:
        name, limits, deadline: of the file.
        resize: whether frames of other sizes get that of the first; else they are `Misled`, because which is the first
            only a reading in order tells.
        scale: height and width that upright frames are scaled to while they are converted.

    `decoded` counts the frames that were decoded so far.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        deadline: Deadline,
        count: int,
        size: int,
        resize: bool = False,
        scale: tuple[int, int] | None = None,
    ):
        self.name, self.limits, self.deadline = name, limits, deadline
        self.total, self.size, self.resize, self.scale, self.decoded = count, size, resize, scale, 0
        self._changed, self._own = threading.Condition(), threading.local()
        self._frame_size: tuple[int, int] | None = None
        self._shape: tuple[int, ...] | None = None
        self._pixels: dict[int, np.ndarray] = {}
        self._missing = [min(size, count - first) for first in range(0, count, size)]
        self._taken, self._failure, self._left = 0, None, False
        self._threads: _Threads | None = None
        self._spare = False
        self._few = threading.Semaphore(_AT_ONCE)

    @property
    def at_once(self) -> int:
        """How many frames have room before the first are taken."""
        return min((1 + _AHEAD) * self.size, self.total)

    # ---- whoever looks at them ----

    def filled_by(
        self, work: Sequence[Callable[[], None]], spare_thread: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """
        Each chunk with the number of frames before it, while `work`, each in a thread of its own, fills them; with a
        spare thread for the conversion of what they decode. Raises what one of these raises.
        """
        self._threads, self._spare = _Threads(len(work) + spare_thread), spare_thread
        _UNDER_WAY.add(self)
        try:
            for each in work:
                self._threads.submit(lambda each=each: self._run(each))
            for number in range(len(self._missing)):
                yield number * self.size, self._take(number)
        finally:
            self.leave()

    def leave(self) -> None:
        """Ends the work, and waits for its threads."""
        with self._changed:
            self._left = True
            self._changed.notify_all()
        self._threads.end()

    def _take(self, number: int) -> np.ndarray:
        with self._changed:
            self._changed.wait_for(lambda: not self._missing[number] or self._failure)
            if self._failure:
                raise self._failure
            self._taken = number + 1
            self._changed.notify_all()
            return self._pixels.pop(number)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _Left:
            pass
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._left = True  # the other threads need not go on
                self._changed.notify_all()

    # ---- the threads that fill them ----

    def check(self) -> None:
        """To be called now and then: ends the work that has lost its purpose, or its time."""
        if self._left:
            raise _Left
        self.deadline.check()

    def count(self) -> None:
        with self._changed:
            self.decoded += 1

    def put(self, slot: int, frame: Any) -> None:
        """Frame number `slot`; waits while there is no room for it."""
        number, place = divmod(slot, self.size)
        size = (frame.width, frame.height)
        check_size(self.name, *size, self.limits)
        with self._changed:
            self._frame_size = self._frame_size or size
            self._changed.wait_for(lambda: number <= self._taken + _AHEAD or self._left)
            if self._left:
                raise _Left
        if size != self._frame_size and not self.resize:
            raise Misled
        if not self._spare:
            self._fill(number, place, frame)
            return
        while not self._few.acquire(timeout=1):  # each holds one of the decoder's pictures
            self.check()
        self._threads.submit(lambda: self._run(lambda: self._fill(number, place, frame, self._few.release)))

    def _fill(self, number: int, place: int, frame: Any, done: Callable[[], None] = lambda: None) -> None:
        try:
            picture = self._picture(frame)
        finally:
            done()
        with self._changed:
            self._shape = self._shape or picture.shape
            if picture.shape != self._shape:
                raise Misled
            if number not in self._pixels:
                self._pixels[number] = np.empty((self._missing[number], *self._shape), np.uint8)
            pixels = self._pixels[number]
        pixels[place] = picture
        with self._changed:
            self._missing[number] -= 1
            self._changed.notify_all()

    def _picture(self, frame: Any) -> np.ndarray:
        if not hasattr(self._own, "convert"):  # one for all frames: each new one starts its own threads
            self._own.convert = import_av().video.reformatter.VideoReformatter()
        (width, height), how = self._frame_size, None
        if self.scale is not None:
            height, width = self.scale if _quarter_turns(frame)[0] % 2 == 0 else self.scale[::-1]
            how = "BICUBIC" if (width, height) != self._frame_size else None
        plane = self._own.convert.reformat(
            frame, format="rgb24", width=width, height=height, interpolation=how
        ).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return upright(rows[:, : 3 * width].reshape(height, width, 3), frame)


class _Threads:
    """
    Threads that do what is submitted, in turn. Python waits for those of a `ThreadPoolExecutor` before it ends, and
    these may wait for room that nobody will make.
    """

    def __init__(self, count: int):
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._all = [threading.Thread(target=self._run, name="linvt-decode", daemon=True) for _ in range(count)]
        for thread in self._all:
            thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def submit(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def end(self) -> None:
        for _ in self._all:
            self._work.put(None)
        # Python collects garbage wherever it is, and in one of these the others may wait for what it holds.
        if threading.current_thread() not in self._all:
            for thread in self._all:
                thread.join()


_UNDER_WAY: WeakSet[Chunks] = WeakSet()


@atexit.register
def _leave_all() -> None:
    """What nobody read to its end, before Python ends: a decoder's thread must not outlive it."""
    for chunks in list(_UNDER_WAY):
        chunks.leave()


def check_size(name: str, width: int, height: int, limits: Limits) -> None:
    """Raises `VideoReadError` for frames that are too large."""
    if limits.frame_pixels is not None and width * height > limits.frame_pixels:
        raise VideoReadError(
            f"{name} has frames of {width} x {height}, {width * height:,} pixels, and limits.frame_pixels is "
            f"{limits.frame_pixels:,}; raise it to read them."
        )


def check_count(name: str, frames: int, limits: Limits) -> None:
    """Raises `VideoReadError` for too many frames."""
    if limits.frames is not None and frames > limits.frames:
        raise VideoReadError(
            f"{name}: {frames:,} frames are asked for, and limits.frames is {limits.frames:,}; ask for fewer "
            "(num_frames), or raise it."
        )


def upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """A frame's picture [H, W, 3] mirrored and turned, as its display matrix says."""
    turns, mirrored = _quarter_turns(frame)
    return np.rot90(picture[:, ::-1] if mirrored else picture, turns)


def _quarter_turns(frame: Any) -> tuple[int, bool]:
    """How often it is turned by 90 degrees, counterclockwise, and whether it is mirrored from left to right before."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    right, down, _, x, y, *_ = np.frombuffer(matrix, np.int32).tolist()  # where the picture's axes point
    mirrored = right * y - down * x < 0
    if mirrored:  # then the axis points the other way
        right, down = -right, -down
    return round(-math.atan2(down, right) / (math.pi / 2)), mirrored


__all__ = ["Chunks", "Misled", "check_count", "check_size", "upright"]
