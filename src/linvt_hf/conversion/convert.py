"""
`convert`: an image-LLM as its makers published it, to one that `from_pretrained` takes.

    config.json -> which base -> its config and rules -> a plan, checked on shapes -> shards -> processor

Nothing is written before the plan is whole, and the folder takes its name when all of it is there.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..configuration_linvt import is_hub_id
from ..hub_folder import copy_code
from ..image_llm import OWN_MODELS, build_image_llm
from ..processing_linvt import OWN_PROCESSORS
from .aquila import Aquila
from .blip3 import Blip3
from .checkpoint import Checkpoint
from .internvl2 import InternVL2
from .mipha import Mipha
from .molmo import Molmo
from .original import TOKENIZER_FILES, Original, ProcessorParts
from .qwen2_vl import Qwen2VL
from .rules import Plan, Step, make_plan

logger = logging.get_logger(__name__)

ORIGINALS: tuple[Original, ...] = (Blip3(), Molmo(), Mipha(), InternVL2(), Qwen2VL(), Aquila())
KNOWN = ", ".join(original.name for original in ORIGINALS)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": None}
SHARD_BYTES = 10**9  # of what is written; about twice as much is held in memory, beside the file that is read


@dataclass
class Conversion:
    """A checkpoint and how it becomes a model. Each part is made when it is first asked for."""

    checkpoint: Checkpoint
    original: Original

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """None, after a warning, where the checkpoint has no files of one."""
        try:
            return self.original.tokenizer(self.checkpoint)
        except (OSError, ValueError) as error:
            if any(map(self.checkpoint.file, TOKENIZER_FILES)):
                raise
            logger.warning(
                f"{self.checkpoint.path} has no tokenizer files ({str(error).splitlines()[0]}): its weights are "
                "converted, and its processor is not, so add tokenizer.json or its like before asking it anything."
            )
            return None

    @cached_property
    def config(self) -> PreTrainedConfig:
        try:
            return self.original.config(self.checkpoint, self.tokenizer)
        except KeyError as error:
            raise ValueError(
                f"{self.checkpoint.path} says it is {self.original.name}, but its config.json or its tensors lack "
                f"{error.args[0]}."
            ) from error

    @cached_property
    def empty_model(self) -> PreTrainedModel:
        with torch.device("meta"):
            return build_image_llm(self.config)

    @cached_property
    def plan(self) -> Plan:
        model = self.empty_model
        tied = model.all_tied_weights_keys if self.config.tie_word_embeddings else {}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
        return make_plan(self.original.rules(self.checkpoint), self.checkpoint.shapes, shapes)

    @cached_property
    def parts(self) -> ProcessorParts:
        return self.original.parts(self.checkpoint, self.config, self.tokenizer)

    def generation(self) -> dict:
        """Greedy, and the base's own stops."""
        if self.tokenizer is None:
            return {}
        stops = self.original.stops(self.tokenizer)
        pad = self.tokenizer.pad_token_id
        values = {"eos_token_id": stops, "pad_token_id": stops[0] if pad is None else pad}
        if self.tokenizer.bos_token_id is not None:
            values["bos_token_id"] = self.tokenizer.bos_token_id
        return values

    def run(self, steps: list[Step], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The model's tensors of some steps."""
        made = {}
        for step in steps:
            sources = (self.checkpoint.read(name) for name in step.sources)
            # Before anything is done to them: rules only move numbers, and half the width is half the memory.
            made.update(step.run(source.to(dtype or source.dtype) for source in sources))
        return made


def find_original(path: str | Path, revision: str | None = None) -> Conversion | None:
    """The conversion of a checkpoint that one of the six makers published; None if it is none of theirs."""
    try:
        checkpoint = Checkpoint(path, revision)
    except (OSError, ValueError):  # there is none, or it is unreadable: whoever loads it says so
        return None
    original = next((original for original in ORIGINALS if original.claims(checkpoint.config)), None)
    return original and Conversion(checkpoint, original)


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    dry_run: bool = False,
) -> Plan:
    """
    Writes a published image-LLM as a folder of transformers' layout: safetensors shards, config, processor, and the
    code of bases that transformers lacks. A run that was killed goes on with the shards it has.

    Args:
        checkpoint: a folder or Hub id in the makers' own layout.
        out: the folder to write; must not be there yet, or be empty.
        revision: of a Hub id.
        dtype: of the weights that are written, or "auto" for their own.
        dry_run: only find out, from the files' headers, what each tensor becomes.

    Returns the plan. Raises `ValueError` for a checkpoint that is none of the known ones or does not fit its own
    config, `OSError` for missing or broken files and where there is no room.
    """
    conversion = find_original(checkpoint, revision)
    if conversion is None:
        Checkpoint(checkpoint, revision)  # says what is wrong if it cannot be read at all
        raise ValueError(f"{checkpoint} is no image-LLM as its makers published it; those known are {KNOWN}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    if not dry_run:
        check_free(Path(out))
    plan = conversion.plan
    if not dry_run:
        _write(conversion, Path(out), DTYPES[dtype])
    return plan


def load_original(conversion: Conversion, dtype: str | torch.dtype | None = "auto", **kwargs) -> PreTrainedModel:
    """The converted model, without writing it anywhere. Beside `dtype`, arguments of `from_pretrained`."""
    state = conversion.run(conversion.plan.steps, None)
    if dtype in (None, "auto"):
        dtype = next(iter(state.values())).dtype
    model_class = type(conversion.empty_model)
    kwargs.pop("revision", None)
    model = model_class.from_pretrained(None, config=conversion.config, state_dict=state, dtype=dtype, **kwargs)
    for name, value in conversion.generation().items():
        setattr(model.generation_config, name, value)
    model.config._name_or_path = conversion.checkpoint.path
    model.config._commit_hash = conversion.checkpoint.commit
    return model


def is_own(conversion: Conversion) -> bool:
    """Whether transformers lacks this base, so that a folder must bring its code."""
    return conversion.config.model_type in OWN_MODELS


def check_free(folder: Path) -> None:
    """Raises `ValueError` if a folder to write is there already, with something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another, nothing was written.")


# ---- writing ----


def _write(conversion: Conversion, out: Path, dtype: torch.dtype | None) -> None:
    begun = out.with_name(f"{out.name}.unfinished")
    shards = list(_shards(conversion, dtype))
    files = sorted({file.resolve() for file in conversion.checkpoint.files_of_tensors.values()})
    what = {
        "shards": [[step.targets for step in steps] for steps, _ in shards],
        "dtype": str(dtype),
        "from": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    _begin(begun, json.dumps(what))
    try:
        _check_room(begun, sum(size for _, size in shards))
        index = {}
        for number, (steps, _) in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            index.update(dict.fromkeys((target for step in steps for target in step.targets), name))
            _write_shard(conversion, steps, dtype, begun / name)
        total = {"total_size": sum(size for _, size in shards)}
        text = json.dumps({"metadata": total, "weight_map": index}, indent=2)
        (begun / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        _write_rest(conversion, begun, dtype)
        (begun / _BEGUN).unlink()
        if out.exists():
            out.rmdir()  # it is empty
        begun.rename(out)
    except Exception as error:  # what a killed run leaves is kept, for the next one to go on with
        shutil.rmtree(begun, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"{out} could not be written: {error}; nothing of it was left there.") from error
        raise
    finally:
        conversion.checkpoint.close()


_BEGUN = "conversion.json"  # what a run writes, so that another knows whether it can go on with it


def _begin(folder: Path, what: str) -> None:
    """An unfinished folder, empty unless it was begun for the same."""
    file = folder / _BEGUN
    if folder.exists() and not (file.is_file() and file.read_text(encoding="utf-8") == what):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(what, encoding="utf-8")


def _check_room(folder: Path, size: int) -> None:
    there = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if size - there > free:
        raise OSError(f"it takes {(size - there) / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free")


def _shards(conversion: Conversion, dtype: torch.dtype | None) -> Iterator[tuple[list[Step], int]]:
    """Steps that go to one file each, and the bytes they make."""
    steps, size = [], 0
    for step in conversion.plan.steps:
        width = (dtype or conversion.checkpoint.read(step.sources[0]).dtype).itemsize
        added = sum(torch.Size(conversion.plan.shapes[target]).numel() * width for target in step.targets)
        if steps and size + added > SHARD_BYTES:
            yield steps, size
            steps, size = [], 0
        steps, size = [*steps, step], size + added
    yield steps, size


def _write_shard(conversion: Conversion, steps: list[Step], dtype: torch.dtype | None, file: Path) -> None:
    if file.exists():
        return
    tensors = {name: tensor.contiguous() for name, tensor in conversion.run(steps, dtype).items()}
    unfinished = file.with_suffix(".part")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.rename(file)


def _write_rest(conversion: Conversion, folder: Path, dtype: torch.dtype | None) -> None:
    model, parts = conversion.empty_model, conversion.parts
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    if is_hub_id(conversion.checkpoint.path):
        model.config._name_or_path = conversion.checkpoint.path
    for name, value in conversion.generation().items():
        setattr(model.generation_config, name, value)
    _write_processor(parts, folder)
    if is_own(conversion):
        module = type(model).__module__.rpartition(".")[2]
        copy_code(folder, module)
        code = f"{module}.{type(model).__name__}"
        config = f"{type(model.config).__module__.rpartition('.')[2]}.{type(model.config).__name__}"
        model.config.auto_map = {"AutoConfig": config, "AutoModel": code, "AutoModelForImageTextToText": code}
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "README.md").write_text(_card(conversion), encoding="utf-8")


def _card(conversion: Conversion) -> str:
    source = conversion.checkpoint.path
    named = is_hub_id(source)
    base = f"base_model: {source}\n" if named else ""
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
{base}---

# {conversion.original.name} for transformers

{source if named else "A checkpoint"} as its makers published it, converted by linvt_hf to the layout of transformers:
`AutoModelForImageTextToText.from_pretrained(FOLDER{", trust_remote_code=True" if is_own(conversion) else ""})`. Its
weights are the same numbers, and have the same licence.
"""


def _write_processor(parts: ProcessorParts, folder: Path) -> None:
    """In parts, as transformers' own processors cannot all be made without torchvision."""
    parts.image_processor.save_pretrained(folder)
    if parts.tokenizer is None:
        return
    settings = dict(parts.settings)
    own = OWN_PROCESSORS.get(settings["processor_class"])
    if own is not None:  # brings its code
        del settings["processor_class"]
        own(parts.image_processor, parts.tokenizer, chat_template=parts.chat_template, **settings).save_pretrained(
            folder
        )
        return
    parts.tokenizer.chat_template = None  # it has a file of its own
    parts.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(parts.chat_template, encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


__all__ = ["Conversion", "convert", "find_original", "load_original"]
