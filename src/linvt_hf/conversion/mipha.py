"""Mipha from zhumj34/Mipha-3B and Mipha-phi1_5-1.6B: LLaVA under other names, Phi-1.5 with its attention fused."""

from collections.abc import Callable, Iterable

from torch import Tensor
from transformers import PhiConfig, SiglipVisionConfig

from ..configuration_mipha import MiphaConfig
from .checkpoint import Checkpoint
from .original import WORDS, Original, ProcessorParts, make_image_processor, taken
from .rules import Drop, Rule

_PHI = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "layer_norm_eps",
    "partial_rotary_factor",
    "rope_theta",
    "rope_scaling",
    "qk_layernorm",
)
_SIGLIP = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
CHAT_TEMPLATE = (
    WORDS
    + """\
{%- if messages[0]['role'] == 'system' -%}{{ words(messages[0]['content'], '') }}
{%- else -%}{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
detailed, and polite answers to the user's questions." }}
{%- endif -%}
{{ ' ' }}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + words(message['content'], '<image>\\n') + ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + words(message['content'], '') + '<|endoftext|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
)


class Mipha(Original):
    name = "Mipha"
    end_of_turn = "<|endoftext|>"

    def claims(self, config):
        return str(config.get("model_type")).replace("-", "_") == "mipha_phi"

    def config(self, checkpoint, tokenizer):
        published = checkpoint.config
        vision = published["vision_config"]["vision_tower"]
        text = PhiConfig(**taken(published, *_PHI), tie_word_embeddings=False)
        # The published bos and eos, 1 and 2, are PhiConfig's old defaults; its prompts know one special token.
        text.bos_token_id = text.eos_token_id = 50256 if tokenizer is None else self.stops(tokenizer)[0]
        # No id stands for an image in the original; any row of the table without a token does, as none is looked up.
        image_token = text.vocab_size - 1 if tokenizer is None else tokenizer.convert_tokens_to_ids("<image>")
        side = vision["image_size"] // vision["patch_size"]
        return MiphaConfig(
            vision_config=SiglipVisionConfig(**taken(vision, *_SIGLIP), vision_use_head=self._has_head(checkpoint)),
            text_config=text,
            image_token_index=image_token,
            image_seq_length=side * side,
            vision_feature_layer=vision.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="full",  # the last patch too, whatever mm_vision_select_feature says
            projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )

    def _has_head(self, checkpoint: Checkpoint) -> bool:
        return any(name.startswith("model.vision_tower.vision_model.head.") for name in checkpoint.shapes)

    def rules(self, checkpoint) -> Iterable[Rule | Drop]:
        heads = checkpoint.config["num_attention_heads"]
        layer = "model.layers.{n}.self_attn"
        native = "model.language_model.layers.{n}.self_attn"
        return (
            Rule("model.vision_tower.vision_model.{rest*}", "model.vision_tower.{rest*}"),
            Rule("model.mm_projector.0.{kind}", "model.multi_modal_projector.linear_1.{kind}"),
            Rule("model.mm_projector.2.{kind}", "model.multi_modal_projector.linear_2.{kind}"),
            Rule(
                f"{layer}.query_key_value.{{kind}}",
                tuple(f"{native}.{part}_proj.{{kind}}" for part in "qkv"),
                _head_by_head(heads),
            ),
            Rule("model.{rest*}", "model.language_model.{rest*}"),
            Rule("lm_head.{kind}", "lm_head.{kind}"),
        )

    def tokenizer(self, checkpoint):
        tokenizer = self.load_tokenizer(checkpoint)
        # As a token of its own it cuts the prompt where the original does: what stands before and after an image is
        # made into tokens apart.
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
        return tokenizer

    def parts(self, checkpoint, config, tokenizer):
        vision = config.vision_config
        published = checkpoint.json("preprocessor_config.json")
        size = {"height": vision.image_size, "width": vision.image_size}
        image_processor = make_image_processor(
            "LlavaImageProcessor",
            do_pad=True,  # to a square, in the colour of the mean, before the SigLIP processor squashes it
            size=size,
            crop_size=size,
            do_center_crop=False,
            image_mean=published.get("image_mean", [0.5] * 3),
            image_std=published.get("image_std", [0.5] * 3),
            resample=published.get("resample", 3),
        )
        settings = {
            "processor_class": "LlavaProcessor",
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
            "image_token": "<image>",
        }
        return ProcessorParts(image_processor, tokenizer, settings, CHAT_TEMPLATE)


def _head_by_head(heads: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Phi-1.5's fused rows, a head's query, key and value after one another, to queries, keys and values."""

    def part(fused: Tensor) -> tuple[Tensor, ...]:
        each = fused.unflatten(0, (heads, 3, -1))  # [heads, 3, head size, ...]
        return tuple(each[:, place].flatten(0, 1) for place in range(3))

    return part
