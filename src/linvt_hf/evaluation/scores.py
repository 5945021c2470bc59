"""What lmms-eval writes of a run, as a line a question, to which a score can be traced, and as scores with bounds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .lmms_model import read_record
from .statistics import Interval, bootstrap_macro

ANSWERS = "answers.jsonl"
# What lmms-eval says of a sample beside its metrics.
_BESIDE = {
    *("doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media", "resps", "filtered_resps"),
    *("token_counts", "parsed", "question"),
}


@dataclass(frozen=True)
class Answered:
    """
    One question of a task and what became of it.

    question, videos, frame_times: what was asked, of our tasks without what is said around it, and the seconds of the
        frames that were seen of each video.
    target: the right answer, as the task has it. answer: the model's, raw. parsed: what it was taken to say, where the
        task tells; unclear: whether that is nothing.
    scores: by metric; for most 1.0 where the answer is right and 0.0 where it is wrong.
    error: why there is no answer; it counts as a wrong one.
    """

    task: str
    doc_id: int
    question: str
    videos: list[str]
    frame_times: list
    target: str
    answer: str
    parsed: Any = None
    unclear: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Score:
    """
    Of one task, or the mean over a group of tasks, by one metric, over all questions, also those without an answer; by
    a judge over those that it judged.

    interval: its mean and where that lies with 95 % confidence, in the metric's own unit (0 to 1 for right or wrong).
    reported: what lmms-eval itself says, in its unit; a task may leave some questions out.
    """

    task: str
    metric: str
    interval: Interval
    questions: int
    unanswered: int
    unclear: int
    reported: float | None


def results_file(folder: Path) -> Path | None:
    """Of lmms-eval's runs with this `--output_path` the last one's results."""
    return max(folder.rglob("*_results.json"), default=None)


def read_run(folder: Path) -> list[Answered]:
    """
    The answers of one `lmms_eval` run with `--log_samples` and a `record`.

    Args:
        folder: its `--output_path`, which holds `record.jsonl` too. Of several runs the last counts.
    Raises `FileNotFoundError` if there are no results.
    """
    if (results := results_file(folder)) is None:
        raise FileNotFoundError(f"There are no results of lmms-eval in {folder}.")
    date = results.name.removesuffix("_results.json")
    said = {(line["task"], line["doc_id"]): line for line in read_record(folder / "record.jsonl")}
    answers = []
    for file in sorted(results.parent.glob(f"{date}_samples_*.jsonl")):
        task = file.name.removeprefix(f"{date}_samples_").removesuffix(".jsonl")
        for sample in sorted(read_lines(file), key=lambda sample: sample["doc_id"]):
            answers.append(_answered(task, sample, said.get((task, sample["doc_id"]), {})))
    return answers


def _answered(task: str, sample: dict, said: dict) -> Answered:
    metrics = {name: value for name, value in sample.items() if name not in _BESIDE}
    error = said.get("error")
    scores = {name: number for name, value in metrics.items() if (number := number_of(value)) is not None}
    raw = sample["filtered_resps"]
    told, parsed = _parsed(sample)
    return Answered(
        task=task,
        doc_id=sample["doc_id"],
        question=sample.get("question", said.get("question", str(sample.get("input", "")))),
        videos=said.get("videos", []),
        frame_times=said.get("frame_times", []),
        target=str(sample["target"]),
        answer=said.get("answer", raw if isinstance(raw, str) else json.dumps(raw)),
        parsed=parsed,
        unclear=error is None and told and parsed in (None, "", -1),
        # Some tasks take an option at random for an answer that is none.
        scores=dict.fromkeys(scores, 0.0) if error is not None and _is_share(scores) else scores,
        error=error,
    )


def _is_share(scores: dict[str, float]) -> bool:
    return all(0 <= score <= 1 for score in scores.values())


def number_of(value: Any) -> float | None:
    """
    What lmms-eval's tasks return of one question, as a number: it itself, or in a dict what says that an answer is
    right, or the answer and the right one. None for what is no score, such as a submission.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, dict):
        return None
    if "Correctness" in value:  # a judge's yes or no, beside its 0 to 5
        return float("yes" in str(value["Correctness"]).lower())
    for name in ("score", "rating"):
        if isinstance(value.get(name), bool | int | float):
            return float(value[name])
    for said, right in _PAIRS:
        if said in value and right in value:
            return float(str(value[said]).strip().lower() == str(value[right]).strip().lower())
    return None


# What an answer was taken to say, and the right one, in the tasks' several ways of saying it.
_PAIRS = (("pred", "ground_truth"), ("parsed_pred", "answer"), ("pred_answer", "answer"), ("pred_answer", "gt_answer"))


def _parsed(sample: dict) -> tuple[bool, Any]:
    """Whether a task tells what it took an answer to say, and that."""
    if "parsed" in sample:
        return True, sample["parsed"]
    for value in sample.values():
        for said, _ in _PAIRS if isinstance(value, dict) else ():
            if said in value:
                return True, value[said]
    return False, None


def write_answers(answers: Sequence[Answered], file: Path) -> None:
    lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    file.write_text("".join(lines), encoding="utf-8")


def read_answers(folder: Path) -> list[Answered]:
    """Of a task's folder, or of all in a folder. Raises `FileNotFoundError` if there are none."""
    files = sorted([*folder.glob(ANSWERS), *folder.glob(f"*/{ANSWERS}")])
    if not files:
        raise FileNotFoundError(f"There is no {ANSWERS} in {folder} or its folders; give what linvt eval wrote.")
    return [Answered(**row) for file in files for row in read_lines(file)]


def read_lines(file: Path) -> list[dict]:
    """Of a JSONL file; answers may hold what else `splitlines` takes for the end of a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def score_tasks(answers: Sequence[Answered], results: dict | None = None) -> list[Score]:
    """Every task's scores by each of its metrics, in order. Without `results`, what lmms-eval says is unknown."""
    scores = []
    for task in dict.fromkeys(answer.task for answer in answers):
        mine = [answer for answer in answers if answer.task == task]
        scores += [_score(task, metric, [mine], results) for metric in _metrics(mine)]
    for group, tasks in (results or {}).get("group_subtasks", {}).items():
        parts = [[answer for answer in answers if answer.task == task] for task in tasks]
        if parts and all(parts):
            shared = [metric for metric in _metrics(parts[0]) if all(metric in _metrics(part) for part in parts)]
            scores += [_score(group, metric, parts, results) for metric in shared]
    return scores


def _metrics(answers: Sequence[Answered]) -> list[str]:
    return list(dict.fromkeys(metric for answer in answers for metric in answer.scores))


def _score(name: str, metric: str, parts: list[list[Answered]], results: dict | None) -> Score:
    reported = (results or {}).get("results", {}).get(name, {}).get(f"{metric},none")
    scored = [[answer for answer in part if metric in answer.scores] for part in parts]
    every = [answer for part in scored for answer in part]
    return Score(
        task=name,
        metric=metric,
        interval=bootstrap_macro([([a.scores[metric] for a in part], _videos(part)) for part in scored]),
        questions=len(every),
        unanswered=sum(answer.error is not None for answer in every),
        unclear=sum(answer.unclear for answer in every),
        reported=reported if isinstance(reported, int | float) else None,
    )


def _videos(answers: Sequence[Answered]) -> list:
    """Which video each is about; of one that names none, its own."""
    return [tuple(answer.videos) or (answer.task, answer.doc_id) for answer in answers]
