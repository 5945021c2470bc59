"""Training: data files to labelled samples, and what trains on them. Stays at home; no model folder needs it."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter_files import load_adapter, save_adapter
    from .adapters import adapters_off, merge
    from .dataset import ChatDataset
    from .recipe import TrainingRun, train
    from .settings import LoraSettings, TrainingSettings, read_settings
    from .sources import DataSource, read_records

# Looked up when asked for: reading adapters should not need what only training does (`pip install linvt_hf[train]`).
_HOMES = {
    "adapter_files": ("load_adapter", "save_adapter"),
    "adapters": ("adapters_off", "merge"),
    "dataset": ("ChatDataset",),
    "recipe": ("TrainingRun", "train"),
    "settings": ("LoraSettings", "TrainingSettings", "read_settings"),
    "sources": ("DataSource", "read_records"),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ChatDataset",
    "DataSource",
    "LoraSettings",
    "TrainingRun",
    "TrainingSettings",
    "adapters_off",
    "load_adapter",
    "merge",
    "read_records",
    "read_settings",
    "save_adapter",
    "train",
]
