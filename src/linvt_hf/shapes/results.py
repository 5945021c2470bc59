"""
Tables that compare LinVT with simpler ways: every row trained and measured in the same way, from several seeds.

A result is a JSON file of its own, so a run that was killed goes on where it was.
"""

import dataclasses
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import set_seed

from ..conversion import wrap
from ..training.adapters import adapters_off
from ..training.dataset import ChatDataset
from ..training.feature_cache import FeatureCache
from ..training.recipe import train
from ..training.settings import TrainingSettings, read_settings
from .evaluate import Score, Test
from .rows import CURVES, KEPT, ROWS, TABLE, Row
from .world import LONG, SHORT

FRAMES = {"video": SHORT, "long": LONG, "image": None}  # of each test


def run_all(jobs: list[tuple[Row, int]], out: Path, workers: int) -> None:
    """Runs what is not there yet, `workers` at a time with one thread each: faster than one after another with all."""
    missing = [(row.name, seed) for row, seed in jobs if not result_file(out, row, seed).exists()]
    if not missing:
        return
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_one_thread) as pool:
        for name, seed, seconds in pool.map(_run_job, *zip(*missing, strict=True), [out] * len(missing)):
            print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)


def result_file(out: Path, row: Row, seed: int) -> Path:
    return out / f"{row.name.replace(' ', '-')}-{seed}.json"


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run_job(name: str, seed: int, out: Path) -> tuple[str, int, float]:
    row = next(row for row in ROWS if row.name == name)
    started = time.monotonic()
    result = run_row(row, seed, out)
    file = result_file(out, row, seed)
    file.with_suffix(".part").write_text(json.dumps(result, indent=1))
    file.with_suffix(".part").replace(file)
    return name, seed, time.monotonic() - started


@cache
def features_in_memory() -> FeatureCache:
    """One for all rows of a process: the frozen encoder gives all of them the same tokens."""
    return FeatureCache(memory=True)


def run_row(row: Row, seed: int, out: Path) -> dict:
    """Trains a row in the stages of `make shapes`, and measures it before and after."""
    stages = [_settings(stage, row, seed, out) for stage in (1, 2)]
    set_seed(seed)
    model, processor = wrap(stages[0].model, num_frames=stages[0].num_frames, **stages[0].linvt)
    row.apply(model, processor)
    model.base.requires_grad_(False)  # as it stays, so that its visual tokens can be kept
    features = features_in_memory()
    folder = Path(stages[0].data[0].path).parent
    tests = {
        kind: Test(folder / f"{kind}-test.jsonl", processor, features, model, num_frames=frames)
        for kind, frames in FRAMES.items()
    }
    result = {"row": row.name, "seed": seed, "untrained": _report(tests, model)}
    if row.frozen:
        stages[1] = dataclasses.replace(stages[1], freeze_linvt=True)
    for settings in stages if row.learns else stages[1:]:
        data = ChatDataset(settings.data, processor, num_frames=settings.num_frames, features=features, seed=seed)
        features.fill(model, data, progress=False)
        run = train(settings, model=model, processor=processor, data=data)
        result[Path(settings.output).name] = [entry["loss"] for entry in run.history if "loss" in entry]
    result["trained"] = _report(tests, model)
    with adapters_off(model):
        result["images with adapters off"] = _report({"image": tests["image"]}, model)["image"]
    return result


def _settings(stage: int, row: Row, seed: int, out: Path) -> TrainingSettings:
    settings = read_settings(f"shapes/stage{stage}")
    return dataclasses.replace(
        settings,
        seed=seed,
        output=str(out / "runs" / f"{row.name.replace(' ', '-')}-{seed}" / f"stage{stage}"),
        eval_data=[],
        feature_cache=None,
        save_every=10**6,
        linvt={**settings.linvt, **row.settings},
    )


def _report(tests: dict[str, Test], model) -> dict:
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


def read_results(out: Path) -> dict[str, list[dict]]:
    """What is there, by row."""
    found: dict[str, list[dict]] = {row.name: [] for row in ROWS}
    for file in sorted(out.glob("*.json")):
        result = json.loads(file.read_text())
        found[result["row"]].append(result)
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
        "| | tokens | no video training | trained | long videos | pictures |",
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


def _percent(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
