"""What the benchmarks share: times and memory of a device, where numbers come from, and tables of them."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def environment(device: str) -> dict:
    """Which device, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, repeats: int = 3, warm_up: int = 1) -> float:
    """Median seconds of some runs, after others that warm up."""
    times = []
    for number in range(warm_up + repeats):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        if number >= warm_up:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_megabytes(work: Callable[[], object], device: str) -> float:
    """The most memory that a run takes beside what is there before it: the GPU's, or on a CPU the process's."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is there now
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0) / 2**10


def _status(name: str) -> int:
    """Kilobytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def show(rows: list[dict], columns: dict[str, str]) -> None:
    """A table; `columns` gives each column's heading, and how its numbers are written."""

    def text(value, form: str) -> str:
        return "-" if value is None else value if isinstance(value, str) else format(value, form)

    lines = [list(columns)] + [[text(row.get(name), form) for name, form in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def save(path: Path | None, result: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
