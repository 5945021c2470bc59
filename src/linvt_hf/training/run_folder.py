"""
The folder of a run: what is in it already, what of it a run may go on from or write over, and on which data it began.

A folder that holds anything a run does not write itself is refused before anything is written to it.
"""

import hashlib
import json
import shutil
from collections.abc import Sized
from pathlib import Path

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from .adapter_files import ADAPTER_FILE, is_adapter
from .settings import SettingsError, TrainingSettings
from .trainer import last_checkpoint

SETTINGS_FILE, DATA_FILE, SKIPPED_FILE = "settings.yaml", "data.json", "skipped.jsonl"
REPORTS = "tensorboard"
_BLOCK, _MOST = 2**20, 2**28  # bytes of a data file, read at a time and at most (ours)
_LOGS = (".log", ".out", ".err", "log.txt")  # of whoever started the run; it has none of these names
# What changes how a run goes and not what it learns, so that it may differ when one is taken up again.
FREE = (
    *("output", "resume", "base", "workers", "log_every", "eval_every", "save_every"),
    *("feature_cache", "feature_memory"),
)


def earlier_run(settings: TrainingSettings, folder: Path) -> Path | None:
    """
    The checkpoint to go on from. Raises `SettingsError` if the folder holds what this run cannot go on with and would
    overwrite.
    """
    if folder.resolve() == Path(settings.model).resolve():
        raise SettingsError(f"{folder} is the model's own folder; choose another output.")
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        if (folder / CONFIG_NAME).exists():
            held = "finished adapters" if is_adapter(folder) else "a whole model"
            raise SettingsError(f"{folder} holds {held}; choose another output.")
        if (foreign := _foreign(settings, folder)) is not None:
            raise SettingsError(
                f"{folder} holds {foreign}, which no run of this wrote; choose another output, nothing was written."
            )
        return None
    if not settings.resume:
        raise SettingsError(f"{folder} holds a run already and resume is off; choose another output.")
    try:
        before = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(f"{folder} holds a run without its {SETTINGS_FILE}; choose another output.") from error
    now = settings.to_dict()
    differing = [name for name in now if name not in FREE and before.get(name) != now[name]]
    if differing:
        listed = ", ".join(f"{name} ({before.get(name)} there, {now[name]} here)" for name in differing)
        raise SettingsError(
            f"{folder} holds a run with other settings: {listed}; choose another output, or set them back to go on."
        )
    return checkpoint


def begin(settings: TrainingSettings, folder: Path, digests: dict[str, str | int]) -> None:
    """Writes down what a run is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
    (folder / DATA_FILE).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    (folder / SKIPPED_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint


def data_digests(settings: TrainingSettings, data: Sized, eval_data: Sized | None) -> dict[str, str | int]:
    """What would tell that a run's data is another: each file's content, and how many samples there are."""
    digests: dict[str, str | int] = {"samples of data": len(data)}
    if eval_data is not None:
        digests["samples of eval_data"] = len(eval_data)
    for kind, sources in (("data", settings.data), ("eval_data", settings.eval_data)):
        for number, source in enumerate(sources, 1):  # by name: a path tells about somebody's machine
            digests[f"{kind} {number}, {Path(source.path).name}"] = _digest(Path(source.path))
    return digests


def check_data(folder: Path, digests: dict[str, str | int]) -> None:
    """Raises `SettingsError` if a run began with other data; one of before there were digests goes on."""
    if not (folder / DATA_FILE).exists():
        return
    before = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
    differing = [name for name in {**before, **digests} if before.get(name) != digests.get(name)]
    if differing:
        raise SettingsError(
            f"{folder} holds a run on other data: {', '.join(differing)} changed since it began; choose another "
            "output, or put the data back to go on."
        )


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """Only what `load_adapter` needs, without the optimizer's state."""
    if (folder / ADAPTER_FILE).is_file():  # else nothing a run wrote whole
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    state = ("optimizer", "scheduler", "rng_state", "trainer_state", "scaler", "latest", "zero_to_fp32")
    for path in checkpoint.iterdir():
        if path.is_file() and not path.name.startswith(state):
            shutil.copy2(path, folder)


def _foreign(settings: TrainingSettings, folder: Path) -> str | None:
    """The name of something that no run before its first checkpoint writes."""
    if folder.is_file():
        raise SettingsError(f"{folder} is a file; choose another output.")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own: set[str] = set()
    if _is_ours(folder / SETTINGS_FILE):
        own = {SETTINGS_FILE, DATA_FILE, SKIPPED_FILE, REPORTS}
        own.update(name for name in names if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"))
    if settings.feature_cache is not None:  # which may lie in here
        cache = Path(settings.feature_cache).resolve()
        own.update(cache.relative_to(folder.resolve()).parts[:1] if folder.resolve() in cache.parents else ())
    return next((name for name in names if name not in own and not name.endswith(_LOGS)), None)


def _is_ours(file: Path) -> bool:
    """Whether a file of settings is one that `begin` wrote."""
    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(held, dict) and {"model", "output", "data", "learning_rate"} <= held.keys()


def _digest(path: Path) -> str:
    """
    Of a data file, or of those that hold the records in a folder of `datasets.save_to_disk`: their sizes, and all they
    hold, or of more than `_MOST` bytes evenly spread pieces.
    """
    digest = hashlib.sha256()
    files = [file for file in path.rglob("*.arrow") if not file.name.startswith("cache-")] if path.is_dir() else [path]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with file.open("rb") as opened:
            for at in range(0, size, _BLOCK * -(-max(size, 1) // _MOST)):
                opened.seek(at)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()


__all__ = [
    *("DATA_FILE", "FREE", "REPORTS", "SETTINGS_FILE", "SKIPPED_FILE"),
    *("begin", "check_data", "copy_adapter", "data_digests", "earlier_run"),
]
