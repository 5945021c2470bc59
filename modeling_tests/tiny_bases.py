"""Tiny random image-LLMs of every architecture LinVT names or promises, as folders in transformers' native layout."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from linvt_hf.configuration_linvt import OWN_CONFIGS
from linvt_hf.image_llm import build_image_llm
from linvt_hf.processing_blip3 import CHAT_TEMPLATE as BLIP3_CHAT_TEMPLATE
from linvt_hf.processing_molmo import MOLMO_CHAT_TEMPLATE

VOCAB = 320
LLM = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}IMAGE{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for block in message['content'] %}{% if block['type'] == 'image' %}IMAGE\n{% endif %}{% endfor %}"
    "{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass
class TinyBase:
    """One architecture: its config class and fields, its image processor's file, its processor's file, its prompts."""

    config: str
    fields: dict
    image_processor: dict
    processor: dict
    image_token: str = "<image>"
    special: dict = field(default_factory=dict)  # named special tokens beside the usual ones
    chat_template: str = CHATML

    @property
    def end_of_turn(self) -> str:
        marks = {"eos_token": "</s>", "</s>": "</s>", "<|end|>": "<|end|>", "<|im_end|>": "<|im_end|>"}
        return next(end for mark, end in marks.items() if mark in self.chat_template)


def tiny_tokenizer(base: TinyBase) -> PreTrainedTokenizerFast:
    """Every byte a token; ids 256 to 261 as in LLM above, then the image tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    plain = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<img>", "</img>"]
    named = {"image_token": base.image_token, **base.special}
    tokens = dict.fromkeys(["<pad>", "<s>", "</s>", *plain, *named.values()])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens]
    )  # 256, 257, ...
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=plain,
        extra_special_tokens=named,
    )
    assert len(fast) <= VOCAB
    return fast


def _ids(base: TinyBase) -> dict:
    tokenizer = tiny_tokenizer(base)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_added_vocab()}


def _clip_like(kind: str, **more) -> dict:
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": 28, "width": 28},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        **more,
    }


def _internvl(text: dict) -> TinyBase:
    return TinyBase(
        config="InternVLConfig",
        fields={
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": [28, 28],
                "patch_size": [7, 7],
                "norm_type": "layer_norm",
            },
            "text_config": text,
            "tie_word_embeddings": False,
            "image_token_id": "<IMG_CONTEXT>",
        },
        image_processor=_clip_like("GotOcr2ImageProcessor", crop_to_patches=False, min_patches=1, max_patches=4),
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 4},
        image_token="<IMG_CONTEXT>",
        special={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_QWEN_TOKENS = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "video_token": "<|video_pad|>",
}
_IDEFICS_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    "video_token": "<video>",
}

TINY_BASES: dict[str, TinyBase] = {
    "qwen2_vl": TinyBase(
        config="Qwen2VLConfig",
        fields={
            "text_config": {**LLM, "model_type": "qwen2_vl_text", "rope_parameters": _MROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
            "tie_word_embeddings": True,
        },
        image_processor=_QWEN_IMAGES,
        processor={"processor_class": "Qwen2VLProcessor"},
        image_token="<|image_pad|>",
        special=_QWEN_TOKENS,
        chat_template=CHATML.replace("IMAGE", "<|vision_start|>IMAGE<|vision_end|>"),
    ),
    "qwen2_5_vl": TinyBase(
        config="Qwen2_5_VLConfig",
        fields={
            "text_config": {**LLM, "model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        image_processor=_QWEN_IMAGES,
        processor={"processor_class": "Qwen2_5_VLProcessor"},
        image_token="<|image_pad|>",
        special=_QWEN_TOKENS,
        chat_template=CHATML.replace("IMAGE", "<|vision_start|>IMAGE<|vision_end|>"),
    ),
    "internvl_qwen2": _internvl({**LLM, "model_type": "qwen2"}),
    "internvl_llama": _internvl({**LLM, "model_type": "llama"}),
    "internvl_phi3": _internvl({**LLM, "model_type": "phi3", "num_key_value_heads": 4}),
    "llava_onevision": TinyBase(
        config="LlavaOnevisionConfig",
        fields={
            "vision_config": SIGLIP,
            "text_config": {**LLM, "model_type": "qwen2"},
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]],
            "tie_word_embeddings": False,
        },
        image_processor=_clip_like(
            "LlavaOnevisionImageProcessor", image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]]
        ),
        processor={
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
        },
        special={"video_token": "<video>"},
    ),
    "mipha": TinyBase(
        config="MiphaConfig",
        fields={
            "vision_config": SIGLIP,
            "text_config": {**LLM, "model_type": "phi", "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
            "image_token_index": "<image>",
            "image_seq_length": 16,
        },
        image_processor=_clip_like("SiglipImageProcessor"),
        processor={"processor_class": "LlavaProcessor", "patch_size": 7, "vision_feature_select_strategy": "full"},
        chat_template=VICUNA,
    ),
    "blip3": TinyBase(
        config="Blip3Config",
        fields={
            "vision_config": SIGLIP,
            "text_config": {**LLM, "model_type": "phi3", "num_key_value_heads": 4},
            "image_token_id": "<image>",
            "num_image_tokens": 4,
            "resampler_depth": 2,
            "resampler_heads": 2,
            "resampler_head_dim": 12,
        },
        image_processor={"image_processor_type": "Blip3ImageProcessor", "size": {"height": 28, "width": 28}},
        processor={"processor_class": "Blip3Processor", "num_image_tokens": 4},
        special={"end": "<|end|>"},
        chat_template=BLIP3_CHAT_TEMPLATE,
    ),
    "molmo": TinyBase(
        config="MolmoConfig",
        fields={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 7,
            },
            "text_config": {**LLM, "model_type": "qwen2"},
            "image_token_id": "<im_patch>",
            "vision_feature_layers": [-2, -3],
            "projector_hidden_size": 24,
            "output_vocab_size": VOCAB - 8,
        },
        image_processor={
            "image_processor_type": "MolmoImageProcessor",
            "size": {"height": 28, "width": 28},
            "patch_size": 7,
            "max_crops": 4,
            "overlap_margins": [0, 2],
        },
        processor={"processor_class": "MolmoProcessor"},
        image_token="<|image|>",
        special={token: f"<{token}>" for token in ("im_start", "im_end", "im_patch", "im_col")},
        chat_template=MOLMO_CHAT_TEMPLATE,
    ),
    "llava": TinyBase(
        config="LlavaConfig",
        fields={
            "vision_config": {**SIGLIP, "model_type": "clip_vision_model"},
            "text_config": {**LLM, "model_type": "llama"},
            "image_token_index": "<image>",
            "image_seq_length": 16,
        },
        image_processor=_clip_like("CLIPImageProcessor", crop_size={"height": 28, "width": 28}),
        processor={
            "processor_class": "LlavaProcessor",
            "patch_size": 7,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        chat_template=VICUNA,
    ),
    "smolvlm": TinyBase(
        config="SmolVLMConfig",
        fields={
            "vision_config": {**SIGLIP, "model_type": "smolvlm_vision"},
            "text_config": {**LLM, "model_type": "llama"},
            "scale_factor": 2,
            "image_token_id": "<image>",
            "tie_word_embeddings": False,
        },
        image_processor=_clip_like(
            "SmolVLMImageProcessor",
            size={"longest_edge": 28},
            max_image_size={"longest_edge": 28},
            do_image_splitting=False,
        ),
        processor={"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        special=_IDEFICS_TOKENS,
    ),
    "idefics3": TinyBase(
        config="Idefics3Config",
        fields={
            "vision_config": {**SIGLIP, "model_type": "idefics3_vision"},
            "text_config": {**LLM, "model_type": "llama"},
            "scale_factor": 2,
            "image_token_id": "<image>",
            "tie_word_embeddings": False,
        },
        image_processor=_clip_like(
            "Idefics3ImageProcessor",
            size={"longest_edge": 28},
            max_image_size={"longest_edge": 28},
            do_image_splitting=False,
        ),
        processor={"processor_class": "Idefics3Processor", "image_seq_len": 4},
        special=_IDEFICS_TOKENS,
    ),
    "gemma3": TinyBase(
        config="Gemma3Config",
        fields={
            "vision_config": SIGLIP,
            "text_config": {**LLM, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 1024},
            "mm_tokens_per_image": 4,
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        image_processor=_clip_like("Gemma3ImageProcessor"),
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 4},
        image_token="<image_soft_token>",
        special={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        chat_template=CHATML.replace("IMAGE", "<start_of_image>"),
    ),
    "paligemma": TinyBase(
        config="PaliGemmaConfig",
        fields={
            "vision_config": {**SIGLIP, "projection_dim": 32},
            "text_config": {**LLM, "model_type": "gemma", "head_dim": 8},
            "projection_dim": 32,
            "hidden_size": 32,
            "image_token_index": "<image>",
        },
        image_processor=_clip_like("SiglipImageProcessor", image_seq_length=16),
        processor={"processor_class": "PaliGemmaProcessor"},
        chat_template=VICUNA,
    ),
    "mistral3": TinyBase(
        config="Mistral3Config",
        fields={
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 7,
                "head_dim": 8,
            },
            "text_config": {**LLM, "model_type": "mistral", "head_dim": 8},
            "image_token_index": "[IMG]",
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        image_processor={
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 56},
            "patch_size": {"height": 14, "width": 14},
        },
        processor={
            "processor_class": "PixtralProcessor",
            "patch_size": 7,
            "spatial_merge_size": 2,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        image_token="[IMG]",
        special={"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    ),
    "qwen3_vl": TinyBase(
        config="Qwen3VLConfig",
        fields={
            "text_config": {**LLM, "model_type": "qwen3_vl_text", "head_dim": 8, "rope_parameters": _MROPE},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 14,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        image_processor=_QWEN_IMAGES,
        processor={"processor_class": "Qwen3VLProcessor"},
        image_token="<|image_pad|>",
        special=_QWEN_TOKENS,
        chat_template=CHATML.replace("IMAGE", "<|vision_start|>IMAGE<|vision_end|>"),
    ),
}
NAMED = ["qwen2_vl", "internvl_qwen2", "internvl_llama", "internvl_phi3", "llava_onevision", "mipha", "blip3", "molmo"]
UNNAMED = ["qwen2_5_vl", "llava", "smolvlm", "idefics3", "gemma3", "paligemma", "mistral3"]

# LinVT at toy size; k below the tokens of a test video, so that top-k has something to leave out.
TINY_LINVT = {
    "bottleneck_size": 16,
    "num_heads": 2,
    "num_scoring_layers": 1,
    "num_aggregation_layers": 1,
    "num_selected_tokens": 12,
    "queries_per_scale": [4, 2, 2],
    "frames_per_chunk": 3,
}
# Frame sizes below the base's own least, to keep tests quick.
_QWEN_FRAMES = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 84}}
TINY_FRAMES = {"qwen2_vl": _QWEN_FRAMES, "qwen2_5_vl": _QWEN_FRAMES, "qwen3_vl": _QWEN_FRAMES}


def tiny_config(name: str):
    base = TINY_BASES[name]
    ids = _ids(base)
    fields = {key: ids.get(value, value) if isinstance(value, str) else value for key, value in base.fields.items()}
    own = {config.__name__: config for config in OWN_CONFIGS.values()}
    return (own.get(base.config) or getattr(transformers, base.config))(**fields)


def save_tiny_base(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes the folder that `wrap` takes: weights, config, tokenizer, image processor, processor, chat template."""
    base = TINY_BASES[name]
    torch.manual_seed(seed)
    model = build_image_llm(tiny_config(name))
    # Freshly made language models answer everything with nearly the same logits; larger weights tell inputs apart.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 256, 258
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(base)
    tokenizer.save_pretrained(folder)
    template = base.chat_template.replace("IMAGE", base.image_token)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "preprocessor_config.json").write_text(json.dumps(base.image_processor))
    (folder / "processor_config.json").write_text(json.dumps(base.processor))
    return folder
