"""
Molmo from allenai/Molmo-7B-D-0924, Molmo-7B-O-0924 and MolmoE-1B-0924: one vision encoder and adapter, and three
language models under the names of one code, which become Qwen2, OLMo2 and OLMoE.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, Olmo2Config, OlmoeConfig, PreTrainedConfig, Qwen2Config

from ..configuration_molmo import MolmoConfig
from ..processing_molmo import MOLMO_CHAT_TEMPLATE, MolmoImageProcessor
from .checkpoint import Checkpoint
from .original import Original, ProcessorParts, layers, taken
from .rules import Rule, cut, join

_TRANSFORMER = "model.transformer"
_VISION = "model.vision_backbone"
_VIT = f"{_VISION}.image_vit"
_HEADS = 16  # of the vision encoder and of its pooling: the published configs leave them to code
_IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")


class Molmo(Original):
    name = "Molmo"
    end_of_turn = "<|endoftext|>"

    def claims(self, config):
        return config.get("model_type") == "molmo"

    def config(self, checkpoint, tokenizer):
        shapes = checkpoint.shapes
        rows, _ = shapes[f"{_TRANSFORMER}.wte.embedding"]
        added, _ = shapes[f"{_TRANSFORMER}.wte.new_embedding"]
        patch_token = _fields(checkpoint)["vocab_size"] + _IMAGE_TOKENS.index("<im_patch>")
        return MolmoConfig(
            vision_config=_vision_config(checkpoint),
            text_config=_text_config(checkpoint, rows + added),
            image_token_id=patch_token if tokenizer is None else tokenizer.convert_tokens_to_ids("<im_patch>"),
            projector_hidden_size=shapes[f"{_VISION}.image_projector.w1.weight"][0],
            output_vocab_size=rows,
            tie_word_embeddings=False,
        )

    def rules(self, checkpoint) -> Iterable[Rule]:
        text = _fields(checkpoint)
        return (*_vision_rules(), *_text_rules(text, _is_moe(checkpoint)))

    def tokenizer(self, checkpoint):
        """The ids of what Molmo added must be where its tables have them; some files number them from elsewhere."""
        tokenizer = self.load_tokenizer(checkpoint)
        first = _fields(checkpoint)["vocab_size"]
        found = tokenizer.convert_tokens_to_ids(list(_IMAGE_TOKENS))
        if found != list(range(first, first + len(_IMAGE_TOKENS))):
            raise ValueError(
                f"The tokenizer of {checkpoint.path} numbers {', '.join(_IMAGE_TOKENS)} as {found}, but the "
                f"model's tables have them from {first} on; take the tokenizer files of another revision."
            )
        return tokenizer

    def parts(self, checkpoint, config, tokenizer):
        published, vision = checkpoint.json("preprocessor_config.json"), config.vision_config
        height, width = published.get("base_image_input_size", [vision.image_size] * 2)
        image_processor = MolmoImageProcessor(
            size={"height": height, "width": width},
            patch_size=vision.patch_size,
            pooling_size=config.pooling_size,
            **taken(published, "max_crops", "overlap_margins", "image_mean", "image_std"),
        )
        return ProcessorParts(image_processor, tokenizer, {"processor_class": "MolmoProcessor"}, MOLMO_CHAT_TEMPLATE)


def _fields(checkpoint: Checkpoint) -> dict:
    """The language model's sizes under one set of names: MolmoE's config has those of the training code."""
    config = checkpoint.config
    if "d_model" not in config:
        return config
    return {
        **config,
        "hidden_size": config["d_model"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config.get("n_kv_heads") or config["n_heads"],
        "num_hidden_layers": config["n_layers"],
        "max_position_embeddings": config.get("max_position_embeddings") or config["max_sequence_length"],
    }


def _is_moe(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.get("moe_num_experts"))


def _text_config(checkpoint: Checkpoint, rows: int) -> PreTrainedConfig:
    fields = _fields(checkpoint)
    common = {
        "vocab_size": rows,
        "hidden_size": fields["hidden_size"],
        "num_hidden_layers": fields["num_hidden_layers"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_key_value_heads": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "rms_norm_eps": fields["layer_norm_eps"],
        "rope_theta": fields["rope_theta"],
        "tie_word_embeddings": False,
    }
    if _is_moe(checkpoint):
        down = next(shape for name, shape in checkpoint.shapes.items() if name.endswith("experts.0.down_proj.weight"))
        return OlmoeConfig(
            **common,
            intermediate_size=down[1],
            num_experts=fields["moe_num_experts"],
            num_experts_per_tok=fields["moe_top_k"],
            norm_topk_prob=False,
        )
    common["intermediate_size"] = fields["intermediate_size"] // 2  # gate and up together
    if fields["qkv_bias"] and not fields["attention_layer_norm"] and not fields["norm_after"]:
        return Qwen2Config(**common)
    if fields["attention_layer_norm"] and fields["norm_after"] and not fields["qkv_bias"]:
        return Olmo2Config(**common)
    flags = {name: fields[name] for name in ("qkv_bias", "attention_layer_norm", "norm_after")}
    raise ValueError(f"This Molmo's language model is neither Qwen2's nor OLMo2's, by {flags}.")


def _vision_config(checkpoint: Checkpoint) -> CLIPVisionConfig:
    shapes = checkpoint.shapes
    width, pixels = shapes[f"{_VIT}.patch_embedding.weight"]
    patch = round((pixels // 3) ** 0.5)
    places, _ = shapes[f"{_VIT}.positional_embedding"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{_VIT}.transformer.resblocks.0.feed_forward.w1.weight"][0],
        num_hidden_layers=layers(checkpoint, f"{_VIT}.transformer.resblocks."),
        num_attention_heads=_HEADS,
        image_size=patch * round((places - 1) ** 0.5),
        patch_size=patch,
    )


def _vision_rules() -> Iterable[Rule]:
    tower, projector = "model.vision_tower", "model.multi_modal_projector"
    layer, native = f"{_VIT}.transformer.resblocks.{{n}}", f"{tower}.encoder.layers.{{n}}"
    renamed = {
        f"{_VIT}.class_embedding": f"{tower}.embeddings.class_embedding",
        f"{_VIT}.positional_embedding": f"{tower}.embeddings.position_embedding.weight",
        f"{_VIT}.pre_ln.{{kind}}": f"{tower}.pre_layrnorm.{{kind}}",
        f"{layer}.attention_norm.{{kind}}": f"{native}.layer_norm1.{{kind}}",
        f"{layer}.ffn_norm.{{kind}}": f"{native}.layer_norm2.{{kind}}",
        f"{layer}.feed_forward.w1.{{kind}}": f"{native}.mlp.fc1.{{kind}}",
        f"{layer}.feed_forward.w2.{{kind}}": f"{native}.mlp.fc2.{{kind}}",
        f"{_VISION}.pad_embed": f"{projector}.pad_embed",
        f"{_VISION}.image_projector.w1.weight": f"{projector}.gate_proj.weight",
        f"{_VISION}.image_projector.w3.weight": f"{projector}.up_proj.weight",
        f"{_VISION}.image_projector.w2.weight": f"{projector}.down_proj.weight",
    }
    for old, new in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
        renamed[f"{layer}.attention.w{old}.{{kind}}"] = f"{native}.self_attn.{new}.{{kind}}"
        renamed[f"{_VISION}.image_pooling_2d.w{old}.{{kind}}"] = f"{projector}.pooling.{old}_proj.{{kind}}"
    yield from (Rule(old, new) for old, new in renamed.items())
    yield Rule(f"{_VIT}.patch_embedding.weight", f"{tower}.embeddings.patch_embedding.weight", _as_convolution)


def _as_convolution(weight: Tensor) -> Tensor:
    """A linear map of a patch's pixels, rows then columns then colours, to a convolution."""
    side = round((weight.shape[1] // 3) ** 0.5)
    return weight.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)


def _text_rules(fields: dict, moe: bool) -> Iterable[Rule]:
    block, layer = f"{_TRANSFORMER}.blocks.{{n}}", "model.language_model.layers.{n}"
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    keys = hidden // heads * (fields.get("num_key_value_heads") or heads)
    # OLMo2 normalises what attention and feed-forward give; the others what they take.
    after = fields["norm_after"]
    attention_norm = "post_attention_layernorm" if after else "input_layernorm"
    feed_forward_norm = "post_feedforward_layernorm" if after else "post_attention_layernorm"
    qkv = tuple(f"{layer}.self_attn.{part}_proj.{{kind}}" for part in "qkv")
    tables = (f"{_TRANSFORMER}.wte.embedding", f"{_TRANSFORMER}.wte.new_embedding")
    yield Rule(tables, "model.language_model.embed_tokens.weight", join)
    yield Rule(f"{_TRANSFORMER}.ln_f.weight", "model.language_model.norm.weight")
    yield Rule(f"{_TRANSFORMER}.ff_out.weight", "lm_head.weight")
    yield Rule("lm_head.weight", "lm_head.weight")  # where MolmoE has it
    for inner in ("", "attn."):  # MolmoE's blocks have one level more
        yield Rule(f"{block}.{inner}att_proj.{{kind}}", qkv, cut(hidden, keys, keys))
        yield Rule(f"{block}.{inner}attn_out.weight", f"{layer}.self_attn.o_proj.weight")
        yield Rule(f"{block}.{inner}q_norm.weight", f"{layer}.self_attn.q_norm.weight")
        yield Rule(f"{block}.{inner}k_norm.weight", f"{layer}.self_attn.k_norm.weight")
        yield Rule(f"{block}.{inner}attn_norm.weight", f"{layer}.{attention_norm}.weight")
    for inner in ("", "mlp."):
        yield Rule(f"{block}.{inner}ff_norm.weight", f"{layer}.{feed_forward_norm}.weight")
    if moe:
        experts = tuple(f"{block}.mlp.experts.{{m}}.{part}_proj.weight" for part in ("gate", "up"))
        yield Rule(f"{block}.mlp.gate.weight", f"{layer}.mlp.gate.weight")
        yield Rule(experts, f"{layer}.mlp.experts.gate_up_proj", _stack_pairs)
        yield Rule(f"{block}.mlp.experts.{{m}}.down_proj.weight", f"{layer}.mlp.experts.down_proj", _stack)
    else:
        # Its rows are those of what is multiplied first, then of what is gated.
        halves = (f"{layer}.mlp.up_proj.weight", f"{layer}.mlp.gate_proj.weight")
        yield Rule(f"{block}.ff_proj.weight", halves, lambda fused: fused.chunk(2))
        yield Rule(f"{block}.ff_out.weight", f"{layer}.mlp.down_proj.weight")


def _stack(*experts: Tensor) -> Tensor:
    return torch.stack(experts)


def _stack_pairs(*experts: Tensor) -> Tensor:
    """All experts' gates, then all their ups, to [experts, gate and up, D]."""
    half = len(experts) // 2
    return torch.stack([torch.cat(pair) for pair in zip(experts[:half], experts[half:], strict=True)])
