"""
The settings of a training run: typed, with visible defaults, read from YAML recipes that extend each other.

A mistake in a recipe is one sentence with its file and line, and with the nearest name where a name is wrong.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..configuration_linvt import LinVTConfig, check_fields
from .sources import DataSource

PRESETS = Path(__file__).parent / "presets"


class SettingsError(ValueError):
    """A recipe or an override that cannot be used, as one sentence."""


# Which values of settings make sense, where they are set.
_AT_LEAST_1 = {
    *("batch_size", "accumulation", "log_every", "eval_every", "save_every", "max_steps", "max_length", "num_frames"),
    "lora.rank",
}
_ABOVE_0 = {"learning_rate", "lora_learning_rate", "projector_learning_rate", "epochs", "fps", "lora.alpha"}
_NOT_NEGATIVE = {"weight_decay", "warmup", "workers", "max_grad_norm", "seed", "lora.dropout"}


@dataclass
class LoraSettings:
    """The LoRA on the language model."""

    rank: int = 16  # authors' code
    alpha: int = 32  # authors' code
    dropout: float = 0.05  # authors' code
    # Names of the linear layers that get one. Authors' code: q, k, v, o, gate, up, down; that is every linear layer of
    # a block, and so is None here, by whatever names the base has (qkv_proj and gate_up_proj, or fc1, fc2 and dense).
    targets: list[str] | None = None

    def __post_init__(self):
        if self.targets is not None:
            self.targets = list(self.targets)  # as a recipe gives them


@dataclass
class TrainingSettings:
    """
    Everything a run is made of. Each default names its source: "paper", "authors' code" (development runs), or "ours".

    `model` is an image-LLM (wrapped on the way), a LinVT model, or the adapters of an earlier stage: a Hub id or a
    folder. Paths are relative to where the command runs. Rates of None are `learning_rate`. Paths alone will do as
    `data` and `eval_data`.
    """

    model: str = ""
    output: str = ""
    data: list[DataSource] = field(default_factory=list)
    eval_data: list[DataSource] = field(default_factory=list)
    revision: str | None = None  # of `model` on the Hub
    base: str | None = None  # of adapters that `model` names, if it is not where they say
    linvt: dict = field(default_factory=dict)  # fields of LinVTConfig for an image-LLM that is wrapped here

    # What is learned
    freeze_linvt: bool = False  # authors' code: True in stage 2; ours: it goes on learning
    train_projector: bool = False  # paper: frozen
    lora: LoraSettings | None = None  # authors' code: in stage 2

    # How it is learned
    learning_rate: float = 6e-5  # LinVT's; authors' code: 5e-7 to 6e-5, the upper end for a fresh module is ours
    lora_learning_rate: float | None = None
    projector_learning_rate: float | None = None
    weight_decay: float = 0.01  # authors' code; none on norms, biases, queries, centres and widths is ours
    warmup: float = 0.03  # authors' code; a share of all steps
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"  # authors' code
    epochs: float = 1.0  # authors' code
    max_steps: int | None = None  # instead of epochs
    batch_size: int = 8  # ours; samples a process and a forward pass
    accumulation: int = 1  # ours; forward passes a step
    max_grad_norm: float = 1.0  # ours
    seed: int = 0

    # What is read; None for the processor's own sampling
    num_frames: int | None = None
    fps: float | None = None
    max_length: int | None = None  # ours; longer samples are the data set's to shorten
    turns: Literal["each", "all"] = "each"  # ours; samples of a conversation with several answers, see ChatDataset
    workers: int = 2  # ours; processes that read videos
    feature_cache: str | None = None  # folder for the frozen encoder's features, filled before training
    feature_memory: bool = False  # keep them in memory too, or, without a folder, there alone; for data that fits

    # How it runs
    # Of the frozen base. "auto": bfloat16 under bf16, in whatever it is stored, else float32
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    bf16: bool | None = None  # authors' code: True; None: on a GPU that has it
    gradient_checkpointing: bool = True  # ours; slower by about a third, and memory no longer grows with depth
    log_every: int = 10  # steps
    eval_every: int = 500  # steps
    save_every: int = 500  # steps
    resume: bool = True  # go on from the output folder's last checkpoint, if it has one

    def __post_init__(self):
        for name in ("model", "output", "base", "feature_cache"):
            if getattr(self, name) is not None:
                setattr(self, name, os.fspath(getattr(self, name)))
        for name in ("data", "eval_data"):
            given = getattr(self, name)
            sources = given if isinstance(given, (list, tuple)) else [given]
            setattr(self, name, [s if isinstance(s, DataSource) else DataSource(s) for s in sources])

    def check(self, places: dict[str, str] | None = None) -> None:
        """Raises `SettingsError` for a value out of range; `places` says where each key was set."""

        def fail(name: str, complaint: str):
            where = (places or {}).get(name)
            raise SettingsError(f"{where}: {name} {complaint}" if where else f"{name} {complaint}")

        for name in ("model", "output"):
            if not getattr(self, name):
                raise SettingsError(f"{name} is missing; say {name}=... or set it in the recipe.")
        values = dict(vars(self))
        if self.lora is not None:
            values.update({f"lora.{name}": value for name, value in vars(self.lora).items()})
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                fail(name, f"must be a finite number; got {value}.")
            if name in _AT_LEAST_1 and value < 1:
                fail(name, f"must be at least 1; got {value}.")
            if name in _ABOVE_0 and value <= 0:
                fail(name, f"must be above 0; got {value}.")
            if name in _NOT_NEGATIVE and value < 0:
                fail(name, f"must not be negative; got {value}.")
        if self.warmup >= 1:
            fail("warmup", f"is a share of all steps, below 1; got {self.warmup}.")
        if values.get("lora.dropout", 0) >= 1:
            fail("lora.dropout", f"is a share of the inputs, below 1; got {values['lora.dropout']}.")
        for name in self.linvt:
            if name not in LinVTConfig.__dataclass_fields__:
                fail(f"linvt.{name}", f"is no field of LinVTConfig; {_nearest(name, LinVTConfig.__annotations__)}")
        try:
            check_fields(self.linvt)
        except ValueError as error:
            wrong = next((f"linvt.{name}" for name in self.linvt if name in str(error)), "linvt")
            fail(wrong, f"does not fit: {error}")
        if self.freeze_linvt and not self.train_projector and self.lora is None:
            fail("freeze_linvt", "leaves nothing to learn; add lora: or train_projector: true, or take it out.")

    def to_dict(self) -> dict:
        """Plain values, as a recipe would hold them; defaults that were left alone included."""
        values = dataclasses.asdict(self)
        for name in ("data", "eval_data"):
            values[name] = [{k: v for k, v in source.items() if v is not None} for source in values[name]]
        return values


# ---- recipes: YAML files that extend each other ----


@dataclass
class _Node:
    """A piece of YAML: a dict or list of further nodes, or a plain value, and where it stands."""

    value: Any
    where: str


def read_settings(recipe: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> TrainingSettings:
    """
    A recipe's settings.

    Args:
        recipe: a YAML file, or the name of a shipped one such as "qwen2_vl/stage1"; None for the defaults.
        overrides: `key=value` with dotted keys and YAML values, e.g. "lora.rank=8"; the last one counts.

    Raises `SettingsError`, one sentence with file and line (or the override) and the nearest key.
    """
    tree = _Node({}, "the defaults") if recipe is None else _read(find_recipe(recipe), ())
    for override in overrides:
        tree = _merge(tree, _override(override))
    places: dict[str, str] = {}
    settings = _build(tree, TrainingSettings, "", places)
    settings.check(places)
    return settings


def find_recipe(recipe: str | Path, named_by: Path | None = None) -> Path:
    """The file of a recipe: a path (first beside the file that names it), or the name of a shipped preset."""
    name = str(recipe)
    folders = ([named_by.parent] if named_by else []) + [Path(), PRESETS]
    found = [path for folder in folders for path in (folder / name, folder / f"{name}.yaml") if path.is_file()]
    if found:
        # A recipe called stage1.yaml that extends stage1 means the shipped one.
        return next((path for path in found if named_by is None or not path.samefile(named_by)), found[0])
    shipped = sorted(str(path.relative_to(PRESETS).with_suffix("")) for path in PRESETS.rglob("*.yaml"))
    raise SettingsError(
        f"There is no recipe {name}, neither as a file nor among the shipped ones ({', '.join(shipped)})."
    )


def _read(path: Path, extended_by: tuple[Path, ...]) -> _Node:
    if path.resolve() in extended_by:
        raise SettingsError(f"{path}: extends itself, by way of {extended_by[-1]}; take one extends: out.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}).") from error
    tree = _parse(text, str(path))
    if tree.value is None:
        tree = _Node({}, tree.where)
    if not isinstance(tree.value, dict):
        raise SettingsError(f"{tree.where}: a recipe is a mapping of keys to values, not {_kind(tree.value)}.")
    parent = tree.value.pop("extends", None)
    if parent is None:
        return tree
    try:
        found = find_recipe(str(parent.value), named_by=path)
    except SettingsError as error:
        raise SettingsError(f"{parent.where}: {error}") from error
    return _merge(_read(found, (*extended_by, path.resolve())), tree)


def _parse(text: str, source: str) -> _Node:
    """YAML to nodes; `source` names the text in error messages."""
    loader = yaml.SafeLoader(text)

    def where(mark) -> str:
        return source if "=" in source else f"{source}, line {mark.line + 1}"

    def convert(node) -> _Node:
        if isinstance(node, yaml.MappingNode):
            items: dict = {}
            for key, value in node.value:
                name = str(loader.construct_object(key))
                if name in items:
                    raise SettingsError(f"{where(key.start_mark)}: {name} stands here twice; keep one.")
                items[name] = _Node(convert(value).value, where(key.start_mark))
            return _Node(items, where(node.start_mark))
        if isinstance(node, yaml.SequenceNode):
            return _Node([convert(item) for item in node.value], where(node.start_mark))
        return _Node(loader.construct_object(node), where(node.start_mark))

    try:
        root = loader.get_single_node()
        return _Node(None, source) if root is None else convert(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SettingsError(f"{where(mark)}: this is not YAML ({error.problem or error.context}).") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{source}: this is not YAML ({str(error).splitlines()[0]}).") from error
    finally:
        loader.dispose()


def _override(text: str) -> _Node:
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise SettingsError(f"'{text}' is not of the form key=value, for example learning_rate=1e-5.")
    node = _parse(value, text)
    for part in reversed(name.strip().split(".")):
        node = _Node({part: node}, text)
    return node


def _merge(low: _Node, high: _Node) -> _Node:
    """`high` over `low`: mappings key by key, everything else as a whole."""
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    merged = dict(low.value)
    for name, node in high.value.items():
        merged[name] = _merge(merged[name], node) if name in merged else node
    return _Node(merged, high.where)


# ---- nodes to typed values ----


def _build(node: _Node, cls: type, name: str, places: dict[str, str]):
    """An instance of a dataclass from a mapping. `places` collects where each key stands."""
    if not isinstance(node.value, dict):
        raise SettingsError(f"{node.where}: {name} must be a mapping of keys to values, not {_kind(node.value)}.")
    hints = typing.get_type_hints(cls)
    prefix = f"{name}." if name else ""
    values = {}
    for key, child in node.value.items():
        if key not in hints:
            raise SettingsError(f"{child.where}: there is no setting {prefix}{key}; {_nearest(key, hints, prefix)}")
        places[prefix + key] = child.where
        values[key] = _convert(child, hints[key], prefix + key, places)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for key in needed:
        if key not in values:
            raise SettingsError(f"{node.where}: {prefix}{key} is missing.")
    try:
        return cls(**values)
    except ValueError as error:
        raise SettingsError(f"{node.where}: {error}") from error


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}."


def _convert(node: _Node, hint, name: str, places: dict[str, str]):
    value, origin = node.value, typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        return _convert(node, options[0], name, places)
    if hint is DataSource and isinstance(value, str):
        return DataSource(path=value)
    if dataclasses.is_dataclass(hint):
        return _build(node, hint, name, places)
    if origin is list:
        nodes = value if isinstance(value, list) else [] if value is None else [node]  # one entry needs no brackets
        (item,) = typing.get_args(hint)
        return [_convert(child, item, f"{name}[{index}]", places) for index, child in enumerate(nodes)]
    if origin is Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise SettingsError(f"{node.where}: {name} is one of {choices}; got {value!r}.")
        return value
    if hint is dict or origin is dict:
        if isinstance(value, dict):
            places.update({f"{name}.{key}": child.where for key, child in value.items()})
            return _plain(node)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 6e-5, without a point, as text
            try:
                return float(value)
            except ValueError:
                pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    raise SettingsError(f"{node.where}: {name} must be {wanted.get(hint, hint)}, not {_kind(value)}.")


def _plain(node: _Node):
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value


def _kind(value) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "empty"}
    return names.get(type(value), f"{value!r}")


__all__ = ["LoraSettings", "SettingsError", "TrainingSettings", "find_recipe", "read_settings"]
