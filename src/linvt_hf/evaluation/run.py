"""
`linvt eval`: lmms-eval's own command, once a task, and then what it says in scores with bounds.

A task is a process of its own, so that one without its data, or with one file too few, ends no other. A folder of
results holds a folder a task, with `answers.jsonl`, lmms-eval's files and its log; `results.json` and `report.md`.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..asking.settings_file import keep_settings
from . import MISSING
from .judge import Judge, Verdict, judged
from .report import table, write_eval_results
from .scores import (
    ANSWERS,
    Answered,
    Score,
    read_answers,
    read_lines,
    read_run,
    results_file,
    score_tasks,
    write_answers,
)

_JUDGED = ("judge", "task", "doc_id", "question", "target", "answer")  # what a verdict is of

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class EvalSettings:
    """
    What a result depends on, but for the task; see `linvt eval --help`.

    limit: questions of each task, the first ones. extra: further arguments for `lmms_eval`.
    """

    model: str
    base: str | None = None
    device: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    max_new_tokens: int | None = None
    letters: str = "generate"
    limit: int | None = None
    extra: tuple[str, ...] = ()

    def model_args(self, record: Path) -> str:
        given = {name: value for name, value in asdict(self).items() if name not in ("model", "limit", "extra")}
        given = {"pretrained": self.model, **given, "record": str(record)}
        for name, value in given.items():
            if isinstance(value, str) and "," in value:
                raise ValueError(f"{value!r} holds a comma, which lmms-eval cannot take in {name}; give another path.")
        return ",".join(f"{name}={value}" for name, value in given.items() if value is not None)


@dataclass
class Run:
    """What came of it: scores of the tasks that ended, and of the others the reason."""

    scores: list[Score]
    failed: dict[str, str]
    judge: dict[str, dict]


def evaluate(
    settings: EvalSettings,
    tasks: Sequence[str],
    output: Path,
    *,
    processes: int = 1,
    batch_size: int = 1,
    data: Path | None = None,
    judge: Judge | None = None,
    say: Callable[[str], None] = print,
) -> Run:
    """
    Asks a model the questions of tasks, and writes what came of it into a folder.

    A task that is done there is not run again, and one that was stopped goes on. Raises `ValueError` if the folder
    holds a run of other settings.

    Args:
        tasks: names of lmms-eval's tasks and groups, and of those in `TASKS`.
        output: the folder.
        processes: each with a device of its own, on one machine; batch_size: of each.
        data: where the benchmarks lie that are not of the Hub, a folder each.
        judge: for tasks with open answers.
        say: is told how it goes.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError(MISSING.format("lmms_eval"))
    keep_settings(output / "settings.json", asdict(settings))
    run = Run([], {}, {})
    datasets: dict[str, str] = {}
    for task in tasks:
        folder = output / task
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ANSWERS).exists():
            say(f"{task}: asking; the log is {folder / 'log.txt'}")
            reason = _run_task(settings, task, folder, processes, batch_size, data)
            answers = [] if reason else read_run(folder)
            if answers and all(answer.error is not None for answer in answers):
                reason = f"none of {len(answers)} questions could be answered: {answers[0].error}"
            if reason:
                run.failed[task] = reason
                say(f"{task}: {reason}")
                continue
            write_answers(answers, folder / ANSWERS)
        answers, results = read_answers(folder), json.loads(results_file(folder).read_text(encoding="utf-8"))
        if judge is not None and any(map(_is_open, answers)):
            say(f"{task}: asking the judge, {judge.model}")
            answers, run.judge[task] = judge_answers(judge, answers, folder / "judge.jsonl")
            write_answers(answers, folder / ANSWERS)
        run.scores += score_tasks(answers, results)
        datasets.update(
            {
                name: config["dataset_path"]
                for name, config in results["configs"].items()
                if "/" in str(config.get("dataset_path"))
            }
        )
    _write(settings, run, datasets, judge, output)
    return run


def _run_task(
    settings: EvalSettings, task: str, folder: Path, processes: int, batch_size: int, data: Path | None
) -> str | None:
    """Why a task has no results; None if it has."""
    command, before = lmms_eval_command(settings, task, folder, processes, batch_size), results_file(folder)
    environment = {"HF_HOME": str(Path("~/.cache/huggingface").expanduser()), **os.environ}  # some tasks need it
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "1"  # else each of several processes would be one by itself
    if data is not None:
        environment["LINVT_DATA"] = str(data.absolute())
    with (folder / "log.txt").open("wb") as log:
        log.write(f"{shlex.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE, env=environment)
        for chunk in iter(lambda: process.stderr.read1(4096), b""):  # progress bars, and accounts of errors
            log.write(chunk)
            log.flush()
            if sys.stderr.isatty():
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
        status = process.wait()
    if results_file(folder) != before:
        return None
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    # What was wrong first: what comes after it is an account of tries.
    reasons = re.findall(r"^[\w.]*(?:Error|Exception|Exit)\b: (.+)$", text, flags=re.MULTILINE)
    said = reasons[0].strip() if reasons else f"lmms_eval ended with status {status} and no results"
    return f"{said} ({folder / 'log.txt'})"


def lmms_eval_command(
    settings: EvalSettings, task: str, folder: Path, processes: int = 1, batch_size: int = 1
) -> list[str]:
    """What one could type as well."""
    # As `accelerate launch` does it on GPUs; on a CPU that would start one process only.
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    launch = several if processes > 1 else []
    limit = [] if settings.limit is None else ["--limit", str(settings.limit)]
    return [
        *(sys.executable, "-m", *launch, "lmms_eval", "--model", "linvt"),
        *("--model_args", settings.model_args(folder / "record.jsonl")),
        *("--tasks", task, "--include_path", str(TASKS), "--batch_size", str(batch_size), *limit),
        *("--log_samples", "--output_path", str(folder), *settings.extra),
    ]


def judge_answers(judge: Judge, answers: list[Answered], file: Path) -> tuple[list[Answered], dict]:
    """
    Answers with `judge_accuracy` and `judge_score` among their scores, where the judge said something, and what
    `judged` says of all. Verdicts are kept in a file, line by line, and not asked for again.
    """
    known = {}
    for row in read_lines(file) if file.exists() else ():
        if row["correct"] is not None:
            known[tuple(map(row.get, _JUDGED))] = Verdict(row["correct"], row["score"])

    def about(answer: Answered) -> dict:
        return {"judge": judge.model, **{name: getattr(answer, name) for name in _JUDGED[1:]}}

    def key(answer: Answered) -> tuple:
        return tuple(about(answer).values())

    def with_verdict(answer: Answered) -> Answered:
        scores = {name: score for name, score in answer.scores.items() if not name.startswith("judge_")}  # of another
        if _is_open(answer) and (verdict := known[key(answer)]).correct is not None:
            scores |= {"judge_accuracy": float(verdict.correct), "judge_score": float(verdict.score)}
        return replace(answer, scores=scores)

    open_ones = [answer for answer in answers if _is_open(answer)]
    asked = [answer for answer in open_ones if key(answer) not in known]
    with file.open("a", encoding="utf-8") as lines:
        verdicts = judge.verdicts((answer.question, answer.target, answer.answer) for answer in asked)
        for answer, verdict in zip(asked, verdicts, strict=True):
            known[key(answer)] = verdict
            lines.write(json.dumps({**about(answer), **asdict(verdict)}, ensure_ascii=False) + "\n")
    found = [known[key(answer)] for answer in open_ones]
    reasons = sorted({verdict.error for verdict in found if verdict.error is not None})
    return list(map(with_verdict, answers)), {"judge": judge.model, **judged(found), "reasons": reasons[:5]}


def _is_open(answer: Answered) -> bool:
    """Whether a judge is asked about it; others have rules that need none."""
    return "contains" in answer.scores


def _write(settings: EvalSettings, run: Run, datasets: dict[str, str], judge: Judge | None, output: Path) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("linvt_hf", "lmms_eval", "transformers", "torch")}
    made = {name: value for name, value in asdict(settings).items() if value not in (None, (), "auto", "generate")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    content = {
        "settings": asdict(settings),
        "versions": versions,
        "device": device,
        "scores": [asdict(score) for score in run.scores],
        "judge": run.judge,
        "failed": run.failed,
    }
    (output / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    how = "; ".join([", ".join(f"{name} {value}" for name, value in made.items() if name != "model"), about])
    lines = [table(run.scores), "", f"{settings.model}; {how}; {device}."]
    lines += [f"Judge: {judge.model}."] if run.judge else []
    lines += [f"No result for {task}: {reason}" for task, reason in run.failed.items()]
    (output / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_eval_results(run.scores, datasets, how.strip("; "), output)
