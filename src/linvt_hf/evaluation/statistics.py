"""
How sure a score is, and whether two runs differ. Questions on one video are not independent, so videos are resampled,
each with all its questions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000  # ours, as are the seed and the confidence of 95 %
_AT_ONCE = 2**24  # numbers in memory


@dataclass(frozen=True)
class Interval:
    """A mean over questions and the bounds between which it lies with 95 % confidence."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """
    Of two runs on the same questions, the second's mean less the first's.

    p_value: how often a difference as great comes about by chance if the runs are alike (two-sided).
    questions: that both were asked.
    """

    difference: Interval
    p_value: float
    questions: int


def bootstrap(scores: Sequence[float], videos: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """
    Percentile bootstrap of the mean, over videos with all their questions.

    Args:
        scores: one a question. videos: which one a question is about; None if each has its own.
    Raises `ValueError` if there are no scores, or not as many videos.
    """
    return bootstrap_macro([(scores, videos)], seed)


def bootstrap_macro(parts: Sequence[tuple[Sequence[float], Sequence[Hashable] | None]], seed: int = 0) -> Interval:
    """
    The same of the mean over several parts, each of which counts alike however many questions it has. Parts that ask
    about the same videos are resampled together.
    """
    generator = np.random.default_rng(seed)
    means = [_means(*_by_video_and_part(group), generator) for group in _sharing(parts)]
    resampled = np.concatenate(means).mean(axis=0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(np.mean([np.mean(scores) for scores, _ in parts])), float(low), float(high))


def _means(sums: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of sums and counts [P, V] of parts and videos: of each resample of the videos, [P, R]."""
    means, videos = [], sums.shape[1]
    for rows in _at_once(videos):
        picked = generator.integers(videos, size=(rows, videos))  # with replacement
        means.append([])
        for total, asked in zip(sums, counts, strict=True):
            often = asked[picked].sum(axis=1)
            # A part of whose few videos none is in a resample has its mean there.
            mean = np.divide(total[picked].sum(axis=1), often, where=often > 0, out=np.full(rows, np.nan))
            means[-1].append(np.where(often > 0, mean, total.sum() / asked.sum()))
    return np.concatenate(means, axis=1)


def _sharing(parts: Sequence[tuple]) -> list[list[tuple]]:
    """The parts in groups, of which no two ask about the same video."""
    groups: list[tuple[set, list[tuple]]] = []
    for part in parts:
        videos, together = set(part[1] or ()), [part]
        for other in [group for group in groups if group[0] & videos]:
            groups.remove(other)
            videos, together = other[0] | videos, other[1] + together
        groups.append((videos, together))
    return [together for _, together in groups]


def _by_video_and_part(parts: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of scores and numbers of questions, [P, V], of parts about the same videos."""
    numbers: dict[Hashable, int] = {}
    each = [_by_video(*part, numbers) for part in parts]
    most = max(len(sums) for sums, _ in each)
    sums, counts = (np.stack([np.pad(row, (0, most - len(row))) for row in rows]) for rows in zip(*each, strict=True))
    return sums, counts


def compare(
    first: Sequence[float], second: Sequence[float], videos: Sequence[Hashable] | None = None, seed: int = 0
) -> Difference:
    """
    Two runs' scores of the same questions, in the same order: bootstrap of the mean difference, and a permutation test
    that swaps the runs video by video.
    """
    if len(first) != len(second):
        raise ValueError(f"The runs have {len(first)} and {len(second)} scores; give those of the same questions.")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    interval = bootstrap(differences, videos, seed)
    sums, _ = _by_video(differences, videos)
    generator = np.random.default_rng(seed + 1)
    seen = abs(sums.sum()) - 1e-9  # sums of the same numbers in another order are not quite equal
    as_great = sum(
        int((abs(generator.choice([-1.0, 1.0], size=(rows, len(sums))) @ sums) >= seen).sum())
        for rows in _at_once(len(sums))
    )
    # The runs as they are, are one of the permutations.
    return Difference(interval, (as_great + 1) / (RESAMPLES + 1), len(differences))


def _by_video(
    scores: Sequence[float], videos: Sequence[Hashable] | None, numbers: dict[Hashable, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of scores [V] and number of questions [V] of each video; `numbers` are those that videos have already."""
    if len(scores) == 0:
        raise ValueError("There are no scores.")
    if videos is None:
        return np.asarray(scores, dtype=float), np.ones(len(scores))
    if len(videos) != len(scores):
        raise ValueError(f"There are {len(scores)} scores, but {len(videos)} videos; give one a score.")
    numbers = {} if numbers is None else numbers
    place = [numbers.setdefault(video, len(numbers)) for video in videos]
    return np.bincount(place, weights=np.asarray(scores, dtype=float)), np.bincount(place).astype(float)


def _at_once(videos: int) -> list[int]:
    """How many resamples at a time."""
    rows = max(min(_AT_ONCE // videos, RESAMPLES), 1)
    return [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
