"""Which frames of a video are taken: by number, by rate, by index or by time, of all of it or of a part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """
    What `read_video` was asked for.

    num_frames: the centres of as many equal stretches; None for every frame. With `fps`, the most that are taken.
    fps: the frames nearest to 0, 1/fps, 2/fps, ... seconds.
    indices: instead, these frames; those beyond the last are the last.
    times: instead, the frames shown at these seconds; before the first the first, after the last the last.
    start, end: seconds; only frames shown in between count, and the times of `fps` begin there.
    """

    num_frames: int | None = 32
    fps: float | None = None
    indices: Sequence[int] | None = None
    times: Sequence[float] | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self):
        sample_indices(1, self.num_frames)  # refuses a bad num_frames before any work
        for name in ("fps", "start", "end"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not hasattr(value, "__float__")):
                raise ValueError(f"{name} must be a number or None, not {value!r}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be a positive number of frames per second or None, not {self.fps}.")
        chosen = [name for name in ("indices", "times") if getattr(self, name) is not None]
        if len(chosen) + (self.fps is not None) > 1:
            given = " and ".join([*chosen, *(["fps"] if self.fps is not None else [])])
            raise ValueError(f"{given} say in different ways which frames are meant; give one of them.")
        for name in chosen:
            values = list(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or any(not math.isfinite(value) or value < 0 for value in values):
                raise ValueError(f"{name} must be numbers from 0 on, at least one; got {values[:10]}.")
        if self.start is not None and self.end is not None and not self.start < self.end:
            raise ValueError(f"start must be before end; got {self.start} and {self.end} seconds.")

    @property
    def needs_times(self) -> str | None:
        """The name of an argument that only makes sense where frames have times, if one is given."""
        return next((name for name in ("fps", "times", "start", "end") if getattr(self, name) is not None), None)

    @property
    def in_order(self) -> bool:
        """Whether the frames come in the order they are shown."""
        values = self.indices or self.times or []
        return values == sorted(values)

    def choose(self, name: str, total: int, times: np.ndarray | None, duration: float | None) -> list[int]:
        """
        Frames of a video called `name`, out of `total` that are shown at `times`, seconds, ascending.

        Raises `ValueError` where there are none, or no times that are needed.
        """
        if total == 0:
            raise ValueError(f"{name} holds no frames.")
        if times is None and (needed := self.needs_times):
            raise ValueError(
                f"{needed}={getattr(self, needed)} needs a video with known times, and {name} has none: use "
                "num_frames or indices instead."
            )
        if self.indices is not None:
            return [min(int(index), total - 1) for index in self.indices]
        if self.times is not None:
            return (np.searchsorted(times, np.array(self.times) + 1e-6, "right") - 1).clip(0).tolist()
        first, last = self._part(name, total, times, duration)
        if self.fps is None:
            return [first + i for i in sample_indices(last - first, self.num_frames)]
        begin = self.start or 0.0
        end = max(duration or 0, float(times[-1])) if last == total else float(times[last])
        kept = _at_rate(times[first:last] - begin, end - begin, self.fps)
        return [first + kept[i] for i in sample_indices(len(kept), self.num_frames)]

    def _part(self, name: str, total: int, times: np.ndarray | None, duration: float | None) -> tuple[int, int]:
        """The frames shown between start and end, as a range."""
        first, last = 0, total
        if self.start is not None:  # the frame that is on screen then
            first = max(int(np.searchsorted(times, self.start + 1e-6, "right")) - 1, 0)
        if self.end is not None:
            last = int(np.searchsorted(times, self.end - 1e-6, "left"))
        length = duration or float(times[-1]) if times is not None else 0.0
        if first >= last or (self.start is not None and self.start > length):
            raise ValueError(
                f"{name} lasts {length:.3f} seconds, and nothing of it is shown from start={self.start} to "
                f"end={self.end}; choose a part within it."
            )
        return first, last


def sample_indices(total: int, num_frames: int | None) -> list[int]:
    """The centres of `num_frames` equal segments of `total` frames; every index once if there are no more frames."""
    if num_frames is not None and (
        not isinstance(num_frames, Integral) or isinstance(num_frames, bool) or num_frames < 1
    ):
        raise ValueError(f"num_frames must be at least 1 or None for every frame, not {num_frames!r}.")
    if num_frames is None or num_frames >= total:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * num_frames) for i in range(num_frames)]


def _at_rate(times: np.ndarray, end: float, fps: float) -> list[int]:
    """
    The frames nearest to the multiples of 1/fps, each once.

    Frame i is nearest to the moments between the midpoints to its neighbours; the last one is shown to the end. It is
    kept if a multiple of 1/fps lies there, so the work does not grow with fps.
    """
    fps = min(fps, 1e9)  # at which every frame is taken
    ticks = np.floor((times[:-1] + times[1:]) / 2 * fps)  # the last multiple of 1/fps before each midpoint
    reached = np.maximum.accumulate(np.concatenate([[-1.0], ticks]))
    kept = np.flatnonzero(ticks > reached[:-1]).tolist()
    if math.ceil(end * fps - 1e-6) - 1 > reached[-1] or not kept:
        kept.append(len(times) - 1)
    return kept


__all__ = ["Sampling", "sample_indices"]
