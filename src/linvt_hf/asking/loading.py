"""A model ready to answer: from a Hub id or a folder, whole or as adapters, on a device of choice."""

from pathlib import Path
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from ..conversion.loading import load_config, naming_damage
from ..modeling_linvt import LinVTForConditionalGeneration
from ..pipeline_linvt import VideoQuestionAnsweringPipeline
from ..processing_linvt import LinVTProcessor
from ..training.adapter_files import is_adapter, load_adapter


def load_pipeline(
    model: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    quantize: Literal["4bit", "8bit"] | None = None,
    base: str | None = None,
) -> VideoQuestionAnsweringPipeline:
    """
    A LinVT model, or adapters from training with their base, in a pipeline. None of a folder's code is run.

    Args:
        model: a Hub id or a folder.
        device: "cpu", "cuda", "cuda:1", ..., or "auto" for all there is; by default a GPU if there is one.
        dtype: type of the weights: "auto" (as stored), "bfloat16", "float16" or "float32".
        quantize: the image-LLM's weights, by bitsandbytes.
        base: the base of adapters, if it is not where they say.

    Raises `OSError` for a model that is not there, `ValueError` for one that is no LinVT model, and for a device that
    is not there or cannot do what is asked.
    """
    config = load_config(model)
    if config.model_type != "linvt":
        raise ValueError(
            f"{model} is a {config.model_type} model, not a LinVT one; wrap it first: linvt wrap {model} OUT."
        )
    place, loading = _placing(device, quantize)
    if is_adapter(model):
        loaded, processor = load_adapter(model, base, dtype=dtype, **loading)
        if processor is None:
            raise ValueError(f"{model} holds no processor; save it there with processor.save_pretrained.")
    elif base is not None:
        raise ValueError(f"{model} is a whole model and needs no base; leave {base} out.")
    else:
        with naming_damage(model):
            loaded = LinVTForConditionalGeneration.from_pretrained(model, dtype=dtype, **loading).eval()
        processor = LinVTProcessor.from_pretrained(model)
    return VideoQuestionAnsweringPipeline(model=loaded, processor=processor, device=place)


def _placing(device: str | None, quantize: str | None) -> tuple[torch.device | None, dict]:
    """The device for the pipeline, None where loading puts the model where it goes, and arguments for that."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = None if name == "auto" else torch.device(name)
    if place is not None and place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch finds no GPU here; use cpu.")
    loading = {}
    if quantize is not None:
        if quantize == "8bit" and not torch.cuda.is_available():  # as of 0.50, where an input is above 6
            raise ValueError("quantize 8bit needs a GPU: bitsandbytes fails in it on a CPU; use 4bit.")
        kinds = {
            "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
            "8bit": {"load_in_8bit": True},
        }
        if quantize not in kinds:
            raise ValueError(f"quantize is {quantize!r}; it is one of {', '.join(kinds)}.")
        loading["quantization_config"] = BitsAndBytesConfig(**kinds[quantize])
    if place is None or quantize is not None:
        loading["device_map"] = "auto" if place is None else {"": place}
        place = None
    return place, loading
