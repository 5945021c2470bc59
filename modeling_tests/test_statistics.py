"""Intervals and comparisons, against what theory says of them."""

import numpy as np
import pytest

from linvt_hf.evaluation import statistics
from linvt_hf.evaluation.statistics import bootstrap, bootstrap_macro, compare


def test_the_interval_is_the_one_of_theory():
    scores = np.random.default_rng(0).random(400) < 0.7
    interval = bootstrap(scores)
    error = scores.std() / 20  # of the mean of 400
    assert interval.mean == scores.mean()
    assert interval.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap(scores) == interval  # from a seed


def test_the_true_mean_lies_in_it_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    generator, inside = np.random.default_rng(1), 0
    for _ in range(200):
        interval = bootstrap(generator.random(100) < 0.6)
        inside += interval.low <= 0.6 <= interval.high
    assert 0.88 <= inside / 200 <= 0.99


def test_questions_on_one_video_count_once():
    """A hundred questions that are all right or all wrong together say no more than ten."""
    apart = bootstrap([1.0] * 6 + [0.0] * 4)
    together = bootstrap([1.0] * 60 + [0.0] * 40, [f"video {n // 10}" for n in range(100)])
    alone = bootstrap([1.0] * 60 + [0.0] * 40)
    assert together.high - together.low == pytest.approx(apart.high - apart.low, abs=0.05)
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_videos_with_more_questions_count_more():
    assert bootstrap([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).mean == 0.75


def test_parts_count_alike():
    interval = bootstrap_macro([([1.0] * 2, None), ([0.0] * 6 + [1.0] * 2, None)])
    assert interval.mean == 0.625  # and not 0.4
    alone = bootstrap([0.0] * 6 + [1.0] * 2)
    assert interval.high - interval.low == pytest.approx((alone.high - alone.low) / 2, abs=0.07)


def test_parts_about_the_same_videos_say_no_more_than_one():
    scores, videos = np.random.default_rng(3).random(400) < 0.5, [f"video {n // 4}" for n in range(400)]
    one, four = bootstrap(scores, videos), bootstrap_macro([(scores, videos)] * 4)
    assert (four.mean, four.low, four.high) == pytest.approx((one.mean, one.low, one.high), abs=1e-12)
    apart = bootstrap_macro([(scores, [f"{part} {video}" for video in videos]) for part in range(4)])
    assert apart.high - apart.low == pytest.approx((one.high - one.low) / 2, rel=0.1)
    few = bootstrap_macro([([1.0], ["a"]), ([0.0, 1.0, 1.0], ["a", "b", "c"])])  # of which a resample may have no "a"
    assert 0.5 <= few.low <= few.mean <= few.high <= 1.0


def test_runs_that_differ_and_runs_that_do_not():
    generator = np.random.default_rng(2)
    first = generator.random(300) < 0.5
    better = np.where(generator.random(300) < 0.3, True, first)  # some of the wrong ones are right now
    found = compare(first, better)
    assert found.difference.low > 0 and found.p_value < 0.001 and found.questions == 300
    other = generator.random(300) < 0.5
    found = compare(first, other)
    assert found.difference.low < 0 < found.difference.high and found.p_value > 0.05
    same = compare(first, first)
    assert (same.difference.low, same.difference.high, same.p_value) == (0.0, 0.0, 1.0)


def test_by_hand():
    """Either sign of the one question on which two runs differ is as far from 0; of eight, 2 in 256 signs are."""
    found = compare([1, 1, 0, 0], [0, 1, 0, 0])
    assert found.difference.mean == -0.25 and found.p_value == 1.0
    found = compare([1] * 8, [0] * 8)
    assert found.p_value == pytest.approx(2 / 2**8, abs=0.003)


def test_in_parts(monkeypatch):
    scores, videos = list(np.random.default_rng(3).random(50)), list(range(50))
    whole = bootstrap(scores, videos)
    monkeypatch.setattr(statistics, "_AT_ONCE", 50 * 7)
    assert bootstrap(scores, videos) == whole


def test_one_sentence():
    with pytest.raises(ValueError, match="no scores"):
        bootstrap([])
    with pytest.raises(ValueError, match="2 scores, but 1 videos"):
        bootstrap([1, 0], ["a"])
    with pytest.raises(ValueError, match="2 and 1 scores"):
        compare([1, 0], [1])
