"""The model of a run: where it comes from, what of it learns, and how it is left behind."""

from torch import nn

from ..conversion import wrap
from ..conversion.loading import load_base, load_config
from ..modeling_linvt import LinVTForConditionalGeneration
from ..processing_linvt import LinVTProcessor
from .adapter_files import is_adapter, load_adapter
from .adapters import ADAPTER, add_lora, add_projector, has_lora, lora_targets, part_of
from .settings import SettingsError, TrainingSettings


def load_model(settings: TrainingSettings, autocast: bool) -> tuple[LinVTForConditionalGeneration, LinVTProcessor]:
    """`settings.model`: an image-LLM, which is wrapped, a whole LinVT model, or adapters."""
    name = settings.model
    if settings.dtype == "auto":
        dtype = "bfloat16" if autocast else "float32"  # without autocast, LinVT and the base must agree
    else:
        dtype = settings.dtype
        if dtype != "float32" and not autocast:
            raise SettingsError(f"dtype {dtype} needs bf16: true, since LinVT learns in float32.")
    model_kwargs = {"dtype": dtype}
    if settings.revision is not None:
        model_kwargs["revision"] = settings.revision
    if adapter := is_adapter(name, settings.revision):
        model, processor = load_adapter(name, settings.base, trainable=True, **model_kwargs)
    elif settings.base is not None:
        raise SettingsError(f"{name} holds no adapters, so there is no base to name; take base out.")
    else:
        try:
            kind = load_config(name, settings.revision).model_type
        except (OSError, ValueError) as error:
            raise SettingsError(str(error)) from error
        if kind != "linvt":
            sampling = {"fps": settings.fps}
            if settings.num_frames is not None:
                sampling["num_frames"] = settings.num_frames
            return wrap(name, model_kwargs=model_kwargs, **sampling, **settings.linvt)
        model = load_base(name, **model_kwargs)
        processor = LinVTProcessor.from_pretrained(name, revision=settings.revision)
    if settings.linvt:
        kind = "adapters" if adapter else "a LinVT model"
        raise SettingsError(f"{name} holds {kind}, which have their settings; take linvt: out of the recipe.")
    if processor is None:
        raise SettingsError(f"{name} holds no processor; save it there with processor.save_pretrained.")
    processor.answer_token_type = model.image_llm.answer_token_type  # older folders do not say it
    set_sampling(processor, settings)
    return model, processor


def set_sampling(processor: LinVTProcessor, settings: TrainingSettings) -> None:
    """What is trained on so many frames is asked with so many; a number without a rate is read without one."""
    if settings.num_frames is not None:
        processor.num_frames, processor.fps = settings.num_frames, None
    if settings.fps is not None:
        processor.fps = settings.fps


def prepare(model: LinVTForConditionalGeneration, settings: TrainingSettings) -> None:
    """Freezes what is not learned; what is learned becomes float32 and asks for gradients."""
    lora = settings.lora
    if lora is not None and not has_lora(model):
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
    elif lora is not None:
        have = model.base.peft_config[ADAPTER]
        there = (have.r, have.lora_alpha, have.lora_dropout, have.target_modules)
        wanted = (lora.rank, lora.alpha, lora.dropout, lora_targets(model.base, lora.targets))
        for name, one, other in zip(("rank", "alpha", "dropout", "targets"), there, wanted, strict=True):
            if one != other:
                raise SettingsError(
                    f"The model has a LoRA with {name} {one}, and lora: asks for {other}; merge it first "
                    "(linvt merge), or ask for the same."
                )
    if settings.train_projector and not model.trained_projector:
        add_projector(model)
    _still(model.base, 0.0 if lora is None else lora.dropout)
    model.requires_grad_(False)
    learned = [] if settings.freeze_linvt else [model.video_tokenizer]
    learned += [model.get_submodule(name) for name in model.trained_projector if settings.train_projector]
    for module in learned:
        module.float().requires_grad_(True)
    for name, parameter in model.named_parameters():
        if lora is not None and ".lora_" in name:
            parameter.requires_grad_(True)
    model.video_tokenizer.float()
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        # It makes embeddings ask for gradients, the vision tower's among them, which would then be kept and computed
        # through the whole frozen tower; LinVT and LoRA ask for those they need.
        model.disable_input_require_grads()


def _still(base: nn.Module, lora_dropout: float) -> None:
    """What is frozen drops nothing out: it learns nothing, and LinVT should see what it will see later."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = lora_dropout if "lora_dropout" in name else 0.0
        for rate in ("attention_dropout", "dropout"):  # the second of CLIP, SigLIP, Idefics and Pixtral
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def finish(model: LinVTForConditionalGeneration) -> None:
    """Ready to answer: LinVT and projector in the base's dtype, as `load_adapter` gives them."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    for name in ("video_tokenizer", *model.trained_projector):
        if not any(hasattr(p, "full_tensor") for p in model.get_submodule(name).parameters()):
            model.get_submodule(name).to(model.base.dtype)
    model.eval()


def count_parameters(model: nn.Module) -> str:
    """What learns and how large it is, as a sentence."""
    counts = {"LinVT": 0, "LoRA": 0, "projector": 0}
    frozen = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen += parameter.numel()
            continue
        counts[part_of(name)] += parameter.numel()
    learned = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    return f"parameters that learn: {learned}; frozen: {frozen:,}"


__all__ = ["count_parameters", "finish", "load_model", "prepare", "set_sampling"]
