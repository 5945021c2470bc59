"""
Folders of adapters: what training changes, apart from the base it changes.

`save_adapter` writes the video tokenizer, the LoRA and a trained projector with the name of the base; `load_adapter`
puts them together again. Files of a folder:

    linvt.safetensors           the video tokenizer and, if it was trained, the projector, under the model's own names
    adapter_model.safetensors, adapter_config.json    the LoRA as PEFT writes it for the image-LLM alone
    linvt_adapter.json          which base (on the Hub, or where it lies from this folder), which of its modules were
                                trained, and whether there is a LoRA
    config.json, generation_config.json, the processor's files, README.md
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from ..configuration_linvt import LinVTConfig, is_hub_id
from ..conversion.loading import load_base, naming_damage
from ..modeling_linvt import LinVTForConditionalGeneration
from ..processing_linvt import LinVTProcessor
from .adapters import ADAPTER, add_projector, inject_lora, lora_config
from .card import adapter_card

ADAPTER_FILE = "linvt_adapter.json"
WEIGHTS_FILE = "linvt.safetensors"
LORA_FILE, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # what PEFT puts before the image-LLM's own names


def is_adapter(folder: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or a repo of the Hub holds adapters rather than a whole model."""
    return _find(folder, ADAPTER_FILE, revision) is not None


def saved_parameters(model: LinVTForConditionalGeneration) -> list[nn.Parameter]:
    """Those a checkpoint holds, whether or not they learn."""
    modules = [model.get_submodule(prefix) for prefix in ("video_tokenizer", *model.trained_projector)]
    return [*(value for module in modules for value in module.parameters()), *_lora_parameters(model).values()]


def trained_tensors(model: LinVTForConditionalGeneration) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    What a checkpoint holds, as CPU tensors: `linvt.safetensors` and `adapter_model.safetensors`, under their names
    there. Every process must call this where parameters are sharded; each then gets whole tensors.
    """
    linvt = {
        f"{prefix}.{name}": _whole(value)
        for prefix in ("video_tokenizer", *model.trained_projector)
        for name, value in model.get_submodule(prefix).state_dict().items()
    }
    lora = {_lora_key(name): _whole(value) for name, value in _lora_parameters(model).items()}
    return linvt, lora


def save_adapter(
    model: LinVTForConditionalGeneration,
    folder: str | Path,
    processor: LinVTProcessor | None = None,
    *,
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None,
    training: str | None = None,
) -> None:
    """
    Writes the video tokenizer, LoRA and trained projector, in the dtypes they are in (float32 in training).

    Args:
        processor: saved too; without it the folder cannot be asked about a video.
        tensors: what `trained_tensors` gave, if it was called already.
        training: how this was trained, in Markdown, for the model card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    linvt, lora = trained_tensors(model) if tensors is None else tensors
    base = _origin(model, folder)
    save_file(linvt, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if lora:
        save_file(lora, folder / LORA_FILE, metadata={"format": "pt"})
        settings = model.base.peft_config[ADAPTER]
        settings.base_model_name_or_path, settings.revision = base["base_model"], base["revision"]
        settings.inference_mode = True
        settings.save_pretrained(folder)
        settings.inference_mode = False
    else:  # those of an earlier save would be loaded with these
        for name in (LORA_FILE, LORA_CONFIG):
            (folder / name).unlink(missing_ok=True)
    config = LinVTConfig.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    for name in ("auto_map", "custom_pipelines", "use_cache"):  # of a whole model; and the Trainer's own note
        if hasattr(config, name):
            delattr(config, name)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor._auto_class = None  # a whole model brings its code, an adapter does not
        try:
            processor.save_pretrained(folder)
        finally:
            del processor._auto_class
    content = {**base, "projector": list(model.trained_projector), "lora": bool(lora), "training": training}
    (folder / ADAPTER_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(adapter_card(model.config, base, bool(lora), training), encoding="utf-8")


def load_adapter(
    folder: str | Path,
    base: PreTrainedModel | str | Path | None = None,
    *,
    revision: str | None = None,
    trainable: bool = False,
    **model_kwargs,
) -> tuple[LinVTForConditionalGeneration, LinVTProcessor | None]:
    """
    A base with the adapters of a folder (or a repo of the Hub) on it, and the processor if the folder has one.

    Args:
        base: the image-LLM or LinVT model to use, itself or where it is; by default the one the folder names.
        revision: of the folder, if it is a repo of the Hub. That of the base is the folder's to say.
        trainable: keep LinVT and projector in float32, to go on training; else they take the base's dtype.
        model_kwargs: for the base's `from_pretrained`, e.g. `dtype` or `device_map`.

    Raises `ValueError` for another base than they were trained on, for a damaged file, and naming each tensor that is
    missing, unexpected or of another shape.
    """
    content = _content(folder, revision)
    saved = LinVTConfig.from_pretrained(folder, revision=revision)
    base = _base(base, content, folder, model_kwargs)
    fields = {name: getattr(saved, name) for name in LinVTConfig.__annotations__ if hasattr(saved, name)}
    for name in ("base_config", "hidden_size"):
        fields.pop(name, None)
    whole = isinstance(base, LinVTForConditionalGeneration)
    _check_base(saved, base.base if whole else base, folder)
    model = LinVTForConditionalGeneration.from_image_llm(base.base if whole else base, **fields)
    if whole:  # where its base came from, for adapters that are trained on from here
        model.name_or_path = base.name_or_path
        model.config._commit_hash = getattr(base.config, "_commit_hash", None)
    model.training_text = content["training"]
    model.generation_config = GenerationConfig.from_pretrained(folder, revision=revision)
    if (files := _lora_files(folder, revision)) is not None:
        _read_json(files[0], "peft_type", "target_modules")  # what PEFT says of a damaged one names no file
        settings = lora_config().from_pretrained(str(files[0].parent))
        settings.inference_mode = not trainable
        inject_lora(model, settings)
    if content["projector"]:
        add_projector(model, content["projector"])
    if trainable:
        for name in ("video_tokenizer", *model.trained_projector):
            model.get_submodule(name).float()
    load_weights(model, folder, revision)
    if _find(folder, "processor_config.json", revision) is None:
        return model.eval(), None
    return model.eval(), LinVTProcessor.from_pretrained(folder, revision=revision)


@torch.no_grad()
def load_weights(model: LinVTForConditionalGeneration, folder: str | Path, revision: str | None = None) -> None:
    """
    Puts a folder's tensors into a model that has a place for each. Parameters may be sharded (then every process
    calls this). Raises `ValueError` naming each that is missing, unexpected or of another shape.
    """
    with naming_damage(folder):
        found = load_file(_need(folder, WEIGHTS_FILE, revision))
    places = {
        f"{prefix}.{name}": value
        for prefix in ("video_tokenizer", *model.trained_projector)
        for name, value in model.get_submodule(prefix).state_dict().items()
    }
    if (files := _lora_files(folder, revision)) is not None:
        with naming_damage(folder):
            found.update(load_file(files[1]))
    places.update({_lora_key(name): value for name, value in _lora_parameters(model).items()})
    problems = {
        "missing": sorted(places.keys() - found.keys()),
        "unexpected": sorted(found.keys() - places.keys()),
        "of another shape": sorted(k for k in places.keys() & found.keys() if places[k].shape != found[k].shape),
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"The tensors in {folder} do not fit this model ({listed}).")
    for name, place in places.items():
        tensor = found[name].to(place.device)
        if hasattr(place, "full_tensor"):  # sharded: each process keeps its part
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor.to(place.dtype), place.device_mesh, place.placements)
        place.copy_(tensor)


def _base(base, content: dict, folder, model_kwargs: dict) -> PreTrainedModel:
    """The image-LLM the adapters go on, or the LinVT model that holds it."""
    if isinstance(base, PreTrainedModel):
        return base
    name = str(base or content["base_model"] or "")
    if not name and content.get("local_base"):
        name = os.path.normpath(Path(folder).resolve() / content["local_base"])  # as `_origin` saw it
    if not name:
        raise ValueError(f"{folder} does not name its base; pass base= (--base), the image-LLM it was trained on.")
    if base is None and content["revision"]:
        model_kwargs = {"revision": content["revision"], **model_kwargs}
    model_kwargs.setdefault("dtype", "auto")
    try:
        return load_base(name, **model_kwargs)
    except OSError as error:
        raise OSError(
            f"The base of {folder}, {name}, cannot be loaded; pass base= (--base), where it is now "
            f"({str(error).splitlines()[0]})."
        ) from error


def _check_base(saved: LinVTConfig, base: PreTrainedModel, folder: str | Path) -> None:
    """Raises `ValueError` for a base of another kind: tensors of the same shapes would go onto it without a word."""
    if saved.base_config is None:
        raise ValueError(f"{folder} has no config.json with a base_config; copy or download the whole folder again.")

    def kind(config) -> str:
        text = config.get_text_config()
        words = getattr(text, "vocab_size", "unknown")
        return (
            f"of type {config.model_type} (language model {text.model_type}, {text.hidden_size} wide, {words} words)"
        )

    trained, given = kind(saved.base_config), kind(base.config)
    if trained != given:
        name = base.name_or_path or "the base given"
        raise ValueError(
            f"The adapters in {folder} were trained on a base {trained}, and {name} is {given}; give the base they "
            "were trained on."
        )


def _origin(model: LinVTForConditionalGeneration, folder: Path) -> dict:
    """
    Where the base came from: the LinVT model that was loaded, or the image-LLM that was wrapped.

    A base that lies here is named as seen from the adapters' folder: both can move together, and nothing of this
    machine is told to those who get the adapters alone.
    """
    source = model if model.name_or_path else model.base
    name = source.name_or_path
    if not name or is_hub_id(name):
        return {"base_model": name or None, "revision": getattr(source.config, "_commit_hash", None)}
    local = Path(os.path.relpath(Path(name).resolve(), folder.resolve())).as_posix()
    return {"base_model": None, "revision": None, "local_base": local}


def _lora_parameters(model) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def _lora_key(name: str) -> str:
    return _PREFIX + name.removeprefix("base.").replace(f".{ADAPTER}.", ".")


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.cpu().contiguous()


def _find(folder: str | Path, name: str, revision: str | None = None) -> Path | None:
    if Path(folder).is_dir():
        return Path(folder) / name if (Path(folder) / name).is_file() else None
    if not is_hub_id(str(folder)):
        return None
    found = cached_file(
        str(folder),
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _content(folder: str | Path, revision: str | None = None) -> dict:
    return _read_json(_need(folder, ADAPTER_FILE, revision), "base_model", "revision", "projector", "training")


def _read_json(file: Path, *fields: str) -> dict:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); copy or download the whole folder again.") from error
    missing = [name for name in fields if name not in held] if isinstance(held, dict) else fields
    if missing:
        raise ValueError(
            f"{file} is damaged: it has no {', '.join(missing)}; copy or download the whole folder again."
        )
    return held


def _lora_files(folder: str | Path, revision: str | None = None) -> list[Path] | None:
    """The LoRA's settings and tensors, or None. A file that the Hub does not give looks absent, so the folder says."""
    said = _content(folder, revision).get("lora")  # None in older folders
    if said is False:
        return None
    files = [_find(folder, name, revision) for name in (LORA_CONFIG, LORA_FILE)]
    if all(files):
        return files
    if said or any(files):
        raise ValueError(
            f"{folder} holds adapters with a LoRA, but not both of its files, {LORA_CONFIG} and {LORA_FILE}; copy or "
            "download the whole folder again."
        )
    return None


def _need(folder: str | Path, name: str, revision: str | None = None) -> Path:
    found = _find(folder, name, revision)
    if found is None:
        raise ValueError(
            f"{folder} has no {name}, so it holds no adapters of LinVT; a whole model loads as any other."
        )
    return found


__all__ = ["is_adapter", "load_adapter", "load_weights", "save_adapter", "saved_parameters", "trained_tensors"]
