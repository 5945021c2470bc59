"""`wrap`: an image-LLM, wherever it is, to a LinVT model and its processor."""

import inspect
import re
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..chat_templates import VIDEO_TOKEN, chat_template_with_videos
from ..configuration_linvt import LinVTConfig, check_fields
from ..image_llm import ImageLLM, image_llm_of
from ..modeling_linvt import LinVTForConditionalGeneration
from ..processing_linvt import LinVTProcessor
from ..video_sampling import Sampling
from .convert import DTYPES
from .loading import load_base, load_processor_parts

logger = logging.get_logger(__name__)

# Names that tokenizers give to entries they keep free.
_RESERVED = re.compile(r"reserved|unused|placeholder|<SPECIAL_\d+>", re.IGNORECASE)
# For a base without a chat template (ours).
PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].capitalize() + ': ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'image' -%}{{ 'IMAGE_TOKEN' }}
{%- elif block['type'] == 'text' -%}{{ block['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""


def wrap(
    base: PreTrainedModel | str | Path,
    processor: ProcessorMixin | str | Path | None = None,
    *,
    video_token: str | None = None,
    num_frames: int | None = 32,
    fps: float | None = None,
    frame_kwargs: dict | None = None,
    times_in_prompt: str | None = None,
    model_kwargs: dict | None = None,
    **settings,
) -> tuple[LinVTForConditionalGeneration, LinVTProcessor]:
    """
    Gives an image-LLM a fresh LinVT video tokenizer. The base's weights stay as they are.

    Args:
        base: the image-LLM: a model, a Hub id, or a folder, in transformers' layout or as its makers published it.
        processor: the base's processor, or where it is; by default where `base` is. Needed if `base` is a model.
        video_token: the token that stands for a video. By default a new one, if the base's embedding table has a free
            row for it; otherwise one that the base's tokenizer keeps unused.
        num_frames, fps: how videos are sampled by default.
        frame_kwargs: arguments of the base's image processor for frames, beside those LinVT sets for this base; for
            example a smaller `size`, for fewer visual tokens.
        times_in_prompt: "duration" or "frames", for prompts that say so of each video (see `LinVTProcessor`).
        model_kwargs: for the base's `from_pretrained`, e.g. `{"dtype": "bfloat16", "device_map": "cuda"}`; `revision`
            is the processor's too, if that comes from the same place.
        settings: fields of `LinVTConfig`.

    Returns the model and its processor; `model.save_pretrained(folder, processor=processor)` makes a Hub folder of
    them. Raises `ValueError` for a base that LinVT cannot wrap, `OSError` for one that is not there.
    """
    check_fields(settings)
    Sampling(num_frames, fps)  # refuses what no video can be read by
    if video_token is not None and not video_token.strip():
        raise ValueError("video_token is empty; name a token that prompts never use, or leave it out.")
    dtype = (model_kwargs or {}).get("dtype")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    revision = None
    if isinstance(base, PreTrainedModel):
        if processor is None:
            raise ValueError(
                "A model alone does not say how its prompts are made; pass its processor too: wrap(model, processor)."
            )
        model = base
    else:
        if processor is None:
            processor, revision = base, (model_kwargs or {}).get("revision")
        model = load_base(base, **(model_kwargs or {}))
    if isinstance(model.config, LinVTConfig) or isinstance(processor, LinVTProcessor):
        raise ValueError("This is a LinVT model or processor already; wrap the image-LLM and its own processor.")
    image_llm = image_llm_of(model.config, settings.get("pool_frames", True))
    if not hasattr(model, "get_image_features"):
        raise ValueError(
            f"{type(model).__name__} has no get_image_features, so LinVT cannot reach its visual tokens; wrap a model "
            "of AutoModelForImageTextToText."
        )

    image_processor, tokenizer, base_processor, chat_template = load_processor_parts(processor, model, revision)
    video_token = _add_video_token(tokenizer, model, image_llm, video_token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Generation continues at the end of each row. init_kwargs too: only they are saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if chat_template is None:
        logger.warning("The base has no chat template; a plain one with 'User:' and 'Assistant:' is used.")
        token = base_processor and getattr(tokenizer, "image_token", "<image>")
        chat_template = PLAIN_CHAT_TEMPLATE.replace("IMAGE_TOKEN", token or "")

    linvt = LinVTForConditionalGeneration.from_image_llm(
        model, video_token_id=tokenizer.convert_tokens_to_ids(video_token), **settings
    )
    if linvt.generation_config.pad_token_id is None:
        linvt.generation_config.pad_token_id = tokenizer.pad_token_id
    return linvt, LinVTProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=chat_template_with_videos(chat_template, image_llm.video_prompt, video_token),
        base_processor=base_processor,
        video_token=video_token,
        num_video_tokens=linvt.config.num_video_tokens,
        num_frames=num_frames,
        fps=fps,
        frame_kwargs={**image_llm.frame_settings(image_processor), **(frame_kwargs or {})},
        frame_inputs=_frame_inputs(image_llm, model, image_processor),
        token_types="token_type_ids" in inspect.signature(model.forward).parameters,
        answer_token_type=image_llm.answer_token_type,
        times_in_prompt=times_in_prompt,
        time_forms={
            name: {**form, "after": image_llm.video_prompt.partition("{video}")[2]}
            for name, form in image_llm.time_forms.items()
        },
    )


def _add_video_token(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, image_llm: ImageLLM, wanted: str | None
) -> str:
    rows = len(model.get_input_embeddings().weight)  # the head may have fewer: no model is to say this token
    vocabulary = tokenizer.get_vocab()
    if wanted is None:
        if len(tokenizer) < rows or VIDEO_TOKEN in vocabulary:
            wanted = VIDEO_TOKEN
        else:
            spare = [token for token in image_llm.spare_tokens if token in vocabulary]
            spare += sorted((t for t in vocabulary if _RESERVED.search(t)), key=vocabulary.get, reverse=True)
            wanted = next((token for token in spare if vocabulary[token] < rows), None)
    if wanted is None or (wanted not in vocabulary and len(tokenizer) >= rows):
        raise ValueError(
            f"The base's embedding table has {rows} rows and its tokenizer {len(tokenizer)} tokens, so there is no "
            "free row for a video token; name a token that prompts never use with video_token=."
        )
    tokenizer.add_tokens(AddedToken(wanted, special=True, normalized=False))
    return wanted


def _frame_inputs(image_llm: ImageLLM, model: PreTrainedModel, image_processor) -> list[str]:
    """What the image processor gives beside the pixels and the base's vision encoder asks for."""
    parameters = inspect.signature(image_llm.features).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        parameters = inspect.signature(model.get_image_features).parameters
    return [name for name in image_processor.model_input_names if name != "pixel_values" and name in parameters]


__all__ = ["wrap"]
