"""A run's scores for people and for the Hub: tables, `.eval_results`, and what others have published beside them."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from .scores import Answered, Score
from .statistics import Difference, compare

PUBLISHED = Path(__file__).parent / "published.yaml"
_NO_SHARES = {"mse", "judge_score"}  # of which 1 is not 100 %


def table(scores: Sequence[Score]) -> str:
    """Markdown. Shares of questions are in percent."""
    lines = [
        "| task | metric | score | 95 % | questions | without an answer | unclear |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for score in scores:
        mean, low, high = (in_unit(score.metric, value) for value in _values(score))
        counts = f"{score.questions:,} | {score.unanswered:,} | {score.unclear:,}"
        lines.append(f"| {score.task} | {score.metric} | {mean} | {low} to {high} | {counts} |")
    return "\n".join(lines)


def in_unit(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric in _NO_SHARES else f"{100 * value:.1f}"


def _values(score: Score) -> tuple[float, float, float]:
    return score.interval.mean, score.interval.low, score.interval.high


# ---- the Hub ----


def write_eval_results(scores: Sequence[Score], datasets: dict[str, str], notes: str, folder: Path) -> list[Path]:
    """
    `.eval_results/TASK.yaml` of each task whose questions are a dataset of the Hub, for a model's repo. The Hub shows
    those whose dataset it knows as a benchmark.

    Args:
        datasets: by task, the dataset's id. notes: how the run was made.
    """
    written = []
    for task in dict.fromkeys(score.task for score in scores if score.task in datasets):
        first = next(score for score in scores if score.task == task)  # by the task's first metric
        mean, low, high = (in_unit(first.metric, value) for value in _values(first))
        entry = EvalResultEntry(
            dataset_id=datasets[task],
            task_id=task,
            value=float(mean),
            date=datetime.date.today().isoformat(),
            notes=f"{first.metric}, 95 %: {low} to {high}, {first.questions:,} questions; {notes}",
        )
        file = folder / ".eval_results" / f"{task}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        written.append(file)
    return written


# ---- beside others ----


@dataclass(frozen=True)
class Published:
    """
    A figure that others have published.

    value: in percent, or in the unit of `metric`. primary: whether `source` is its makers' own.
    """

    task: str
    benchmark: str
    model: str
    value: float
    metric: str
    primary: bool
    source: str
    note: str = ""


def published() -> list[Published]:
    return [Published(**entry) for entry in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))]


def beside_published(scores: Sequence[Score]) -> str:
    """Markdown: each task's score, and under it the published figures of that benchmark."""
    lines = ["| benchmark | model | score | |", "|---|---|---:|---|"]
    for task in dict.fromkeys(score.task for score in scores):
        others = [figure for figure in published() if figure.task == task]
        for metric in dict.fromkeys(figure.metric for figure in others):
            ours = [score for score in scores if score.task == task and _same_metric(score.metric, metric)]
            for score in ours[:1]:
                mean, low, high = (in_unit(score.metric, value) for value in _values(score))
                count = f"{low} to {high}, {score.questions:,} questions"
                lines.append(f"| {others[0].benchmark} | **this run**, {score.metric} | {mean} | {count} |")
            for figure in others:
                if figure.metric == metric:
                    about = [] if figure.primary else ["second hand"]
                    about += [figure.note] if figure.note else []
                    lines.append(
                        f"| | {figure.model}, {metric} | {figure.value} | {'; '.join([*about, figure.source])} |"
                    )
    if len(lines) == 2:
        return "No figures are published, that this package knows of, for these tasks."
    return "\n".join(lines)


def _same_metric(ours: str, theirs: str) -> bool:
    """Tasks have names of their own for the share of right answers; a judge's figures are a judge's alone."""
    return ours == theirs if theirs.startswith("judge") else not ours.startswith("judge") and ours not in _NO_SHARES


@dataclass(frozen=True)
class Compared:
    task: str
    metric: str
    first: float
    second: float
    found: Difference


def compare_runs(first: Sequence[Answered], second: Sequence[Answered]) -> list[Compared]:
    """
    Two runs, by each metric of each task, on the questions that both were asked. Raises `ValueError` if that is none.
    """
    pairs: dict[tuple[str, str], list[tuple[float, float, tuple]]] = {}
    others = {(answer.task, answer.doc_id): answer for answer in second}
    for answer in first:
        other = others.get((answer.task, answer.doc_id))
        for metric in answer.scores if other is not None and other.question == answer.question else ():
            if metric in other.scores:
                video = tuple(answer.videos) or (answer.doc_id,)
                pairs.setdefault((answer.task, metric), []).append(
                    (answer.scores[metric], other.scores[metric], video)
                )
    if not pairs:
        raise ValueError("The two runs have no question in common.")
    compared = []
    for (task, metric), rows in pairs.items():
        a, b, videos = zip(*rows, strict=True)
        compared.append(Compared(task, metric, sum(a) / len(a), sum(b) / len(b), compare(a, b, videos)))
    return compared


def comparison_table(compared: Sequence[Compared]) -> str:
    lines = [
        "| task | metric | first | second | difference | 95 % | p | questions |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in compared:
        change = one.found.difference
        values = [in_unit(one.metric, v) for v in (one.first, one.second, change.mean, change.low, change.high)]
        first, second, mean, low, high = values
        p = f"{one.found.p_value:.4f} | {one.found.questions:,}"
        lines.append(f"| {one.task} | {one.metric} | {first} | {second} | {mean} | {low} to {high} | {p} |")
    return "\n".join(lines)
