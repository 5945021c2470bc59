"""
Tables that compare LinVT with simpler ways: every row trained and measured in the same way, from several seeds.

A result is a JSON file of its own, so a run that was killed goes on where it was.
"""

import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers import set_seed

from ..conversion import wrap
from ..training.adapters import adapters_off
from ..training.dataset import ChatDataset
from ..training.feature_cache import FeatureCache
from ..training.recipe import FREE, train
from ..training.settings import TrainingSettings, read_settings
from .evaluate import FRAMES, QuestionSet, Score
from .rows import CURVES, EACH_BASE, KEPT, ROWS, TABLE, Row


@dataclass(frozen=True)
class Job:
    """One row from one seed. `overrides` are `key=value` for the recipes of both stages."""

    row: Row
    seed: int
    out: Path
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.row.name.replace(' ', '-')}-{self.seed}"

    @property
    def file(self) -> Path:
        return self.out / f"{self.name}.json"

    def settings(self) -> list[TrainingSettings]:
        """Of both stages."""
        return [self._settings("stage1"), self._settings("stage2")]

    def _settings(self, stage: str) -> TrainingSettings:
        settings = read_settings(f"shapes/{stage}", self.overrides)
        return dataclasses.replace(
            settings,
            seed=self.seed,
            output=str(self.out / "runs" / self.name / stage),
            eval_data=[],
            save_every=100,  # a row that was stopped goes on from there
            linvt={**settings.linvt, **self.row.settings},
            freeze_linvt=self.row.frozen and stage == "stage2",
        )

    def is_done(self) -> bool:
        """Whether its result is there, from the recipes as they are now."""
        return self.file.exists() and json.loads(self.file.read_text())["recipe"] == self.recipe()

    def recipe(self) -> list[dict]:
        """What the result rests on, as JSON holds it: the settings of both stages, and digests of what they read."""
        settings = [dataclasses.asdict(stage) for stage in self.settings()]
        files = [Path(settings[0]["model"]) / "model.safetensors", *(Path(s["path"]) for s in settings[1]["data"])]
        digests = {str(file): _digest(file, file.stat().st_mtime) for file in files if file.is_file()}
        for stage in settings:
            # How a step is divided changes no more than what is free to change.
            stage["samples a step"] = stage.pop("batch_size") * stage.pop("accumulation")
            for name in FREE:
                stage.pop(name, None)
        return json.loads(json.dumps([*settings, digests]))


@cache
def _digest(file: Path, changed: float) -> str:
    """Of a file's content, read again when it was written anew, at another time `changed`."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def all_jobs(out: Path, seeds: int, overrides: tuple[str, ...] = ()) -> list[Job]:
    """Every row, one seed after the other; what only the curve needs, which is there for its shape, from one seed."""
    return [Job(row, seed, out, overrides) for seed in range(seeds) for row in (TABLE if seed else ROWS)]


def run_all(jobs: list[Job], workers: int) -> None:
    """Runs what is not there yet, `workers` at a time with one thread each: faster than one after another with all."""
    missing = [job for job in jobs if not job.is_done()]
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(_run_job, job.row.name, job.seed, job.out, job.overrides): job for job in missing}
        for number, future in enumerate(as_completed(running), 1):
            job = running[future]
            print(f"{number}/{len(missing)}: {job.row.name}, seed {job.seed}: {future.result():.0f} s", flush=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run_job(name: str, seed: int, out: Path, overrides: tuple[str, ...]) -> float:
    """Writes the result of a job, of which only what can be pickled comes here, and returns the seconds it took."""
    job = Job(next(row for row in ROWS if row.name == name), seed, out, overrides)
    started = time.monotonic()
    result = json.dumps(run(job), indent=1)
    out.mkdir(parents=True, exist_ok=True)
    unfinished = job.file.with_suffix(".part")
    unfinished.write_text(result)
    unfinished.replace(job.file)
    shutil.rmtree(job.out / "runs" / job.name)  # checkpoints, of which nobody asks for so many
    return time.monotonic() - started


@cache
def _features(folder: str | None) -> FeatureCache:
    """One for all rows of a process: the frozen encoder gives all of them the same tokens."""
    return FeatureCache(folder, memory=True)


def run(job: Job) -> dict:
    """Trains a row in the stages of `make shapes`, and measures it before and after."""
    row, stages = job.row, job.settings()
    set_seed(job.seed)
    model, processor = wrap(stages[0].model, num_frames=stages[0].num_frames, **stages[0].linvt)
    row.apply(model, processor)
    model.base.requires_grad_(False)  # as it stays, so that its visual tokens can be kept
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # where it will be trained
    features = _features(stages[0].feature_cache)
    folder = Path(stages[0].data[0].path).parent
    tests = {
        kind: QuestionSet(folder / f"{kind}-test.jsonl", processor, features, model, num_frames=frames)
        for kind, frames in FRAMES.items()
    }
    result = {"row": row.name, "seed": job.seed, "recipe": job.recipe(), "made with": _made_with(model)}
    result["untrained"] = _report(tests, model)
    for settings in stages if row.learns else stages[1:]:
        data = ChatDataset(settings.data, processor, num_frames=settings.num_frames, features=features, seed=job.seed)
        features.fill(model, data, progress=False)
        settings = dataclasses.replace(settings, feature_cache=None)  # it is filled, and in `data`
        history = train(settings, model=model, processor=processor, data=data).history
        result[Path(settings.output).name] = [entry["loss"] for entry in history if "loss" in entry]
    result["trained"] = _report(tests, model)
    with adapters_off(model):
        result["pictures with adapters off"] = _report({"image": tests["image"]}, model)["image"]
    return result


def _made_with(model) -> dict[str, str]:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def _report(tests: dict[str, QuestionSet], model) -> dict:
    report = {}
    for name, test in tests.items():
        score = test.score(model)
        report[name] = {
            "exact": Score.mean(score.exact),
            "options": Score.mean(score.options),
            "by kind": score.by_kind(),
            "questions": sum(map(len, score.exact.values())),
        }
    return report


# ---- tables ----


def read_results(jobs: list[Job]) -> dict[str, list[dict]]:
    """What is there of them, by row; nothing from other recipes."""
    found: dict[str, list[dict]] = {row.name: [] for row in ROWS}
    for job in jobs:
        if job.is_done():
            found[job.row.name].append(json.loads(job.file.read_text()))
    return found


def tables(results: dict[str, list[dict]]) -> dict[str, str]:
    return {"table": table(results), "curve": curve(results)}


def write_tables(results: dict[str, list[dict]], file: Path) -> None:
    """Replaces the tables of a Markdown file; each stands between two comments that hold its name."""
    text = file.read_text(encoding="utf-8")
    for name, lines in tables(results).items():
        begin, end = f"<!-- shapes {name} -->", f"<!-- end of shapes {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{file} needs the lines '{begin}' and '{end}', once each, to hold that table.")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{lines}\n{end}{after}"
    file.write_text(text, encoding="utf-8")


def table(results: dict[str, list[dict]]) -> str:
    """Rows of the comparison, in Markdown."""
    lines = [
        "| | tokens | videos, untrained (options) | videos | long videos | pictures |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in TABLE:
        if several := results[row.name]:
            cells = [
                _percent([result["untrained"]["video"]["options"] for result in several]),
                *(_percent([result["trained"][kind]["exact"] for result in several]) for kind in FRAMES),
            ]
            lines.append(f"| {row.name} | {row.tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(results: dict[str, list[dict]]) -> str:
    """Accuracy against k, in Markdown."""
    lines = ["| tokens kept by top-k | " + " | ".join(map(str, KEPT)) + " |", "|---|" + "---:|" * len(KEPT)]
    for name, rows in CURVES.items():
        for kind in ("video", "long"):
            cells = []
            for row in rows:
                several = results[row.name]
                cells.append(_percent([result["trained"][kind]["exact"] for result in several]) if several else "")
            lines.append(f"| {name}, {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bases_table(results: dict[str, dict[str, list[dict]]]) -> str:
    """The same few ways on several image-LLMs, in Markdown; of each base, results by row."""
    names = [row.name for row in EACH_BASE]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for base, found in results.items():
        cells = [
            _percent([r["trained"]["video"]["exact"] for r in found[name]]) if found[name] else "" for name in names
        ]
        lines.append(f"| {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
