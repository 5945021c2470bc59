"""
What training adds to a LinVT model, and how to take it away again: a LoRA on the language model, a trained projector.

The LoRA is injected in place, so the class stays `LinVTForConditionalGeneration` and everything it can do works.
`adapter_files.py` writes and reads what was trained.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..image_llm import image_llm_of
from ..modeling_linvt import LinVTForConditionalGeneration

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "default"  # PEFT's name for the one adapter there is


# ---- which of a base's modules ----


def language_model_blocks(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a base's language model, and their name in the base. Never those of its vision tower."""
    decoder = base.get_decoder()
    lists = [(name, module) for name, module in decoder.named_children() if isinstance(module, nn.ModuleList)]
    path = next((name for name, module in base.named_modules() if module is decoder), None)
    if not lists or path is None:
        raise ValueError(f"{type(base).__name__} has no list of decoder blocks, so a LoRA has nowhere to go.")
    name, blocks = max(lists, key=lambda item: len(item[1]))
    return f"{path}.{name}" if path else name, blocks


def lora_targets(base: PreTrainedModel, names: list[str] | None = None) -> str:
    """
    The layers of a LoRA as the regular expression PEFT takes: the linear layers of the language model's blocks.

    Args:
        names: only those called so ("q_proj", "fc1"); None for all. A name that no layer has is a `ValueError`.
    """
    path, blocks = language_model_blocks(base)
    linear = {name for block in blocks for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    linear = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}  # a LoRA may be there
    if names is not None:
        known = {name.rpartition(".")[2] for name in linear}
        if unknown := sorted(set(names) - known):
            raise ValueError(
                f"lora.targets names {', '.join(unknown)}, which the language model of {type(base).__name__} lacks; "
                f"it has {', '.join(sorted(known))}."
            )
        linear = {name for name in linear if name.rpartition(".")[2] in names}
    return rf"{re.escape(path)}\.\d+\.({'|'.join(re.escape(name) for name in sorted(linear))})"


def projector_modules(base: PreTrainedModel) -> tuple[str, ...]:
    """Names, in the base, of what lies between its vision encoder and its language model."""
    known = image_llm_of(base.config).projectors
    names = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in known]
    if not names:
        raise ValueError(
            f"{type(base).__name__} has no module called {' or '.join(known)}, so its projector is not known; take "
            "train_projector out."
        )
    return tuple(names)


# ---- adding and removing ----


def part_of(name: str) -> str:
    """Which of what can learn a parameter of a LinVT model belongs to, by its name."""
    return "LoRA" if ".lora_" in name else "projector" if name.startswith("base.") else "LinVT"


def has_lora(model: LinVTForConditionalGeneration) -> bool:
    return hasattr(model.base, "peft_config")


def add_lora(
    model: LinVTForConditionalGeneration,
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    targets: list[str] | None = None,
) -> None:
    """A fresh LoRA, which changes nothing yet, on the base's language model. Everything else of the base is frozen."""
    targets = lora_targets(model.base, targets)
    inject_lora(model, lora_config()(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))


def lora_config() -> type["LoraConfig"]:
    """PEFT's class, asked for only where a LoRA is: models without one do without PEFT."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("A LoRA needs peft: pip install 'linvt_hf[train]'.") from error
    return LoraConfig


def inject_lora(model: LinVTForConditionalGeneration, settings: "LoraConfig") -> None:
    """Puts a LoRA with PEFT's settings on the base, in float32."""
    if has_lora(model):
        raise ValueError("The model has a LoRA already; merge(model) first.")
    from peft import inject_adapter_in_model

    # Not by `add_adapter` of transformers, whose version 5.24 asks for PEFT 0.22 before there is one.
    inject_adapter_in_model(settings, model.base, ADAPTER)
    for name, parameter in model.base.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # steps this small would be lost in half precision
    model.train(model.training)  # the new layers too: their dropout is on when they are made


def add_projector(model: LinVTForConditionalGeneration, names: tuple[str, ...] | None = None) -> None:
    """Marks the base's projector as trained with the adapters, and keeps its own weights for `adapters_off`."""
    names = tuple(f"base.{name}" for name in projector_modules(model.base)) if names is None else tuple(names)
    model.trained_projector = names
    model._untrained_projector = {
        name: {key: value.detach().clone() for key, value in model.get_submodule(name).state_dict().items()}
        for name in names
    }


@contextlib.contextmanager
def adapters_off(model: LinVTForConditionalGeneration) -> Iterator[None]:
    """Inside, the base is the image-LLM as it was: still images give its own logits bit for bit."""
    trained = {name: _copy(model.get_submodule(name)) for name in model.trained_projector}
    _switch_lora(model, on=False)
    try:
        for name in trained:
            _restore(model.get_submodule(name), model._untrained_projector[name])
        yield
    finally:
        for name, weights in trained.items():
            _restore(model.get_submodule(name), weights)
        _switch_lora(model, on=True)


def _switch_lora(model: LinVTForConditionalGeneration, on: bool) -> None:
    for _, layer in _lora_layers(model):
        layer.enable_adapters(on)


def _lora_layers(model: LinVTForConditionalGeneration) -> list[tuple[str, "BaseTunerLayer"]]:
    """The layers of the base that have a LoRA, and their names."""
    if not has_lora(model):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in model.base.named_modules() if isinstance(layer, BaseTunerLayer)]


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def _restore(module: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        value.copy_(weights[name])


@torch.no_grad()
def merge(model: LinVTForConditionalGeneration) -> LinVTForConditionalGeneration:
    """
    Folds the LoRA into the language model's weights, in place: an ordinary LinVT model in the base's dtype, whose
    `save_pretrained` writes the usual Hub folder. Equal up to rounding; the adapters cannot be switched off any more.
    """
    if has_lora(model) or model.trained_projector:
        model.name_or_path = model.base.name_or_path = ""  # these weights are no longer where they came from
    for name, layer in _lora_layers(model):
        layer.merge()
        model.base.set_submodule(name, layer.get_base_layer())
    if has_lora(model):
        del model.base.peft_config
    for name in ("video_tokenizer", *model.trained_projector):
        model.get_submodule(name).to(model.base.dtype)
    model.trained_projector, model._untrained_projector = (), {}
    return model.requires_grad_(True)


__all__ = [
    "adapters_off",
    "add_lora",
    "add_projector",
    "has_lora",
    "inject_lora",
    "language_model_blocks",
    "lora_config",
    "lora_targets",
    "merge",
    "part_of",
    "projector_modules",
]
