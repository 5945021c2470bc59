"""Image-LLMs and LinVT models from wherever they are, in transformers' layout or as their makers published them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

# From its module: the name in transformers 5.17 itself asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..configuration_linvt import LinVTConfig
from ..image_llm import OWN_MODELS, check_loaded
from ..modeling_linvt import LinVTForConditionalGeneration
from ..processing_linvt import processor_class_of
from .convert import KNOWN, Conversion, find_original, load_original
from .original import ProcessorParts


@contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """For reading a model's weights: says which are damaged. Raises `OSError`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"The weights in {path} are cut short or damaged ({error}); fetch them again.") from error


def load_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """
    A model's config, with its commit if it lies on the Hub. Raises `OSError` for one that is not there, `ValueError`
    for one that needs code of its own.
    """
    if Path(path).is_dir() and not (Path(path) / CONFIG_NAME).exists():
        raise OSError(f"There is no model at {path} that can be loaded: it holds no {CONFIG_NAME}.")
    if conversion := _to_convert(path, revision):
        conversion.config._commit_hash = conversion.checkpoint.commit
        return conversion.config
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        # transformers 5.17 notes it, 5.23 does not.
        config._commit_hash = extract_commit_hash(cached_file(path, CONFIG_NAME, revision=revision), None)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        if "trust_remote_code" in str(error) or "custom code" in first:
            raise ValueError(
                f"{path} runs only with code of its own, which is not run here, and it is none of those that can be "
                f"converted: {KNOWN}."
            ) from error
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"There is no model at {path} that can be loaded: {first}") from error
    return config


def load_base(path: str | Path, **model_kwargs) -> PreTrainedModel:
    """
    An image-LLM or a LinVT model, from a Hub id or a folder, and converted on the way if it is as its makers published
    it. A tensor too few or too many is an error naming it.
    """
    if conversion := _to_convert(path, model_kwargs.get("revision")):
        return load_original(conversion, **model_kwargs)
    config = load_config(path, model_kwargs.get("revision"))
    own_models = {**OWN_MODELS, LinVTConfig.model_type: LinVTForConditionalGeneration}
    model_class = own_models.get(config.model_type, AutoModelForImageTextToText)
    with naming_damage(path):
        model, info = model_class.from_pretrained(path, output_loading_info=True, **model_kwargs)
    check_loaded(info, path)
    model.config._commit_hash = config._commit_hash
    return model


def load_processor_parts(processor, model: PreTrainedModel, revision: str | None = None) -> ProcessorParts:
    """Of a base's processor, or of one that is in a folder or on the Hub."""
    if isinstance(processor, ProcessorMixin):
        image_processor, tokenizer = processor.image_processor, processor.tokenizer
        name, saved, chat_template = type(processor).__name__, processor.to_dict(), processor.chat_template
    elif conversion := _to_convert(processor, revision):
        if conversion.tokenizer is None:
            raise ValueError(f"{processor} holds no tokenizer, so no prompt can be made for it; pass processor=.")
        return conversion.parts
    else:
        # In parts, because many processors drag in a video processor that cannot exist without torchvision.
        image_processor = AutoImageProcessor.from_pretrained(processor, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(processor, revision=revision)
        saved, _ = ProcessorMixin.get_processor_dict(processor, revision=revision)
        name = saved.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(model.config.model_type)
        chat_template = saved.get("chat_template")
    processor_class = processor_class_of(name)
    settings = None
    if processor_class is not None:
        given = inspect.signature(processor_class.__init__).parameters.keys()
        own = given - {"self", "args", "kwargs", "image_processor", "tokenizer", "video_processor", "chat_template"}
        settings = {"processor_class": name, **{key: saved[key] for key in sorted(own) if key in saved}}
    chat_template = chat_template or tokenizer.chat_template
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    return ProcessorParts(image_processor, tokenizer, settings, chat_template)


def _to_convert(path: str | Path, revision: str | None) -> Conversion | None:
    """The conversion of a checkpoint that transformers does not read as it is."""
    conversion = find_original(path, revision)
    return None if conversion is None or conversion.original.native else conversion


__all__ = ["load_base", "load_config", "load_processor_parts", "naming_damage"]
