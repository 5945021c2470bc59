"""
The paper's six image-LLMs, each with about two million parameters and 16 visual tokens a picture of 64 x 64, to be
trained from nothing on `shapes`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import reduce, repeat
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration_linvt import read_base_config
from ..image_llm import build_image_llm, image_llm_of
from .world import CANVAS

VOCABULARY = 640
SIDE = 4  # visual tokens a side of a picture
PATCH = CANVAS // SIDE // 2  # where 2 x 2 patches are joined to a visual token
# What each language model has, under the names that most of them use.
LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": CANVAS,
    "patch_size": PATCH,
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
NORMED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": CANVAS, "width": CANVAS}}


@dataclass(frozen=True)
class Base:
    """
    One of the six.

    Args:
        config: of its transformers config; values in <> are tokens, of which the config gets the id.
        image_processor, processor: what their files hold.
        tokens: special ones, by the names that its processor has for them.
        place: stands for one visual token in a prompt.
        before, after: what stands around the visual tokens of a prompt's pictures.
        block: what an image is in the chat template.
        inputs: pixels [P, 3, 64, 64] to what its vision encoder takes.
        encoder: model and pixels to what its vision encoder knows of each of the 16 parts of a picture, [P, 16, C],
            for a base whose projector keeps no grid; that is taught first.
    """

    config: dict
    image_processor: dict
    processor: dict
    tokens: dict
    place: str = "<image>"
    before: str = ""
    after: str = "\n"
    block: str = "<image>\n"
    inputs: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda pixels: {"pixel_values": pixels})
    encoder: Callable[[PreTrainedModel, Tensor], Tensor] | None = None

    def build(self, tokenizer) -> PreTrainedModel:
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in self.tokens.values()}
        values = {
            name: ids.get(value, value) if isinstance(value, str) else value for name, value in self.config.items()
        }
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        values["text_config"] = {**LLM, **values["text_config"], **ends}
        return build_image_llm(read_base_config(values))

    def visual_tokens(self, model: PreTrainedModel, pixels: Tensor) -> Tensor:
        """Pixels [P, 3, 64, 64] in -1..1 to [P, 16, D], as a frame of a video has them."""
        tokens = image_llm_of(model.config).features(model, **self.inputs(pixels))
        return (tokens if isinstance(tokens, Tensor) else torch.stack(tuple(tokens))).float()


def _qwen_patches(pixels: Tensor) -> dict[str, Tensor]:
    layout = "p c (h a i) (w b j) -> (p h w a b) (c t i j)"
    grid = torch.tensor([[1, 2 * SIDE, 2 * SIDE]], device=pixels.device).expand(len(pixels), -1)
    return {"pixel_values": repeat(pixels, layout, a=2, b=2, i=PATCH, j=PATCH, t=2), "image_grid_thw": grid}


def _one_tile(pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels[:, None]}


def _crop_without_padding(pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels, "image_masks": pixels.new_ones(len(pixels), (CANVAS // PATCH) ** 2)}


def _patches_of_parts(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    patches = model.model.vision_tower(pixel_values=pixels).last_hidden_state  # [P, 64, C]
    return reduce(patches, "p (h a w b) c -> p (h w) c", "mean", h=SIDE, a=2, w=SIDE, b=2).float()


_IMAGE = {"image_token": "<image>", "video_token": "<video>"}
BASES = {
    "internvl2": Base(
        config={
            "model_type": "internvl",
            "vision_config": {
                **VISION,
                "image_size": [CANVAS, CANVAS],
                "patch_size": [PATCH, PATCH],
                "norm_type": "layer_norm",
                # For a shallow encoder that starts from nothing; InternVL's own are for fine-tuning a deep one.
                "layer_scale_init_value": 1.0,
                "initializer_range": 0.06,
            },
            "text_config": {"model_type": "qwen2", "tie_word_embeddings": True},
            "image_token_id": "<IMG_CONTEXT>",
            "image_seq_length": SIDE**2,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": True,
        },
        image_processor={"image_processor_type": "GotOcr2ImageProcessor", **NORMED, "crop_to_patches": False},
        processor={"processor_class": "InternVLProcessor", "image_seq_length": SIDE**2},
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        place="<IMG_CONTEXT>",
        before="<img>",
        after="</img>\n",
        block="<IMG_CONTEXT>\n",
    ),
    "qwen2_vl": Base(
        config={
            "model_type": "qwen2_vl",
            "vision_config": {
                "depth": 4,
                "embed_dim": 128,
                "hidden_size": 128,
                "num_heads": 4,
                "mlp_ratio": 3,
                "patch_size": PATCH,
            },
            "text_config": {
                "model_type": "qwen2_vl_text",
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
                "tie_word_embeddings": True,
            },
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
            "tie_word_embeddings": True,
        },
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            **NORMED,
            "size": {"shortest_edge": CANVAS**2, "longest_edge": CANVAS**2},
            "patch_size": PATCH,
        },
        processor={"processor_class": "Qwen2VLProcessor"},
        tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        place="<|image_pad|>",
        before="<|vision_start|>",
        after="<|vision_end|>",
        block="<|vision_start|><|image_pad|><|vision_end|>",
        inputs=_qwen_patches,
    ),
    "mipha": Base(
        config={
            "model_type": "mipha",
            # Features of the last layer but one, so it has one more.
            "vision_config": {**SIGLIP, "patch_size": 2 * PATCH, "num_hidden_layers": 5},
            "text_config": {"model_type": "phi", "partial_rotary_factor": 0.5},
            "image_token_index": "<image>",
            "image_seq_length": SIDE**2,
        },
        image_processor={
            "image_processor_type": "LlavaImageProcessor",
            **NORMED,
            "crop_size": NORMED["size"],
            "do_pad": True,
            "do_center_crop": False,
        },
        processor={
            "processor_class": "LlavaProcessor",
            "patch_size": 2 * PATCH,
            "vision_feature_select_strategy": "full",
        },
        tokens=_IMAGE,
    ),
    "aquila": Base(
        config={
            "model_type": "llava_onevision",
            "vision_config": SIGLIP,
            "text_config": {"model_type": "qwen2"},
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": [[CANVAS, CANVAS]],
            "tie_word_embeddings": False,
        },
        image_processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            **NORMED,
            "image_grid_pinpoints": [[CANVAS, CANVAS]],
        },
        processor={
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (CANVAS // PATCH) ** 2,
            "vision_feature_select_strategy": "full",
        },
        tokens=_IMAGE,
    ),
    "blip3": Base(
        config={
            "model_type": "blip3",
            "vision_config": SIGLIP,
            "text_config": {"model_type": "phi3"},
            "image_token_id": "<image>",
            "num_image_tokens": SIDE**2,
            "resampler_depth": 2,
            "resampler_heads": 4,
            "resampler_head_dim": 32,
            "initializer_range": 0.1,  # about one over the root of the width
        },
        image_processor={"image_processor_type": "Blip3ImageProcessor", **NORMED, "image_aspect_ratio": "squash"},
        processor={"processor_class": "Blip3Processor", "num_image_tokens": SIDE**2},
        tokens=_IMAGE,
        inputs=_one_tile,
        # Its resampler finds the places of what the encoder tells apart, and learns nothing of one that tells nothing.
        encoder=_patches_of_parts,
    ),
    "molmo": Base(
        config={
            "model_type": "molmo_v1",
            "vision_config": {**VISION, "num_hidden_layers": 5},
            "text_config": {"model_type": "qwen2"},
            "image_token_id": "<im_patch>",
            "vision_feature_layers": [-2, -4],
            "projector_hidden_size": 384,
            "output_vocab_size": VOCABULARY,
        },
        image_processor={
            "image_processor_type": "MolmoImageProcessor",
            **NORMED,
            "patch_size": PATCH,
            "overlap_margins": [0, 0],
            "overlapping_crops": False,
        },
        processor={"processor_class": "MolmoProcessor"},
        tokens={
            token.strip("<|>"): token for token in ("<|image|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>")
        },
        place="<im_patch>",
        before="<im_start>",
        after="<im_end>",
        block="<|image|>",
        inputs=_crop_without_padding,
    ),
}

INTERNVL2 = BASES["internvl2"]  # the one that ships
