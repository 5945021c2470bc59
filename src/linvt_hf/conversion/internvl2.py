"""
InternVL2 from OpenGVLab/InternVL2-*: one vision encoder layout, four language models. InternLM2 is Llama with its
attention fused, so that is what it becomes; Qwen2, Phi-3 and Llama stay what they are.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Phi3Config, Qwen2Config

from .original import WORDS, Original, ProcessorParts, make_image_processor, taken
from .rules import Rule
from .sentencepiece import tokenizer_of_pieces

_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "original_max_position_embeddings",
)
_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
# What transformers' processor calls them. No prompt holds a video of the base's own; </quad> ends a box otherwise.
_NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "</quad>",
}
# The published code ends a turn with its separator and no new line, unlike that of later InternVLs.
_CHATML = ("<|im_start|>{role}\\n", "<|im_end|>")
_PHI3 = ("<|{role}|>\\n", "<|end|>", " ")  # the blank that its tokenizer put in front of everything


def _chat_template(begin: str, end: str, blank: str = "") -> str:
    before, after = begin.split("{role}")
    return (
        WORDS
        + f"""\
{{%- macro turn(role, text) -%}}{{{{ '{before}' + role + '{after}' + text + '{end}' }}}}{{%- endmacro -%}}
{{{{ '{blank}' }}}}
{{%- if messages[0]['role'] != 'system' -%}}{{{{ turn('system', '{_SYSTEM}') }}}}{{%- endif -%}}
{{%- for message in messages -%}}
{{{{ turn(message['role'], words(message['content'], '<IMG_CONTEXT>\\n')) }}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{ '{before}assistant{after}' }}}}{{%- endif -%}}
"""
    )


class InternVL2(Original):
    name = "InternVL2"
    end_of_turn = "<|im_end|>"

    def claims(self, config):
        return config.get("model_type") == "internvl_chat"

    def config(self, checkpoint, tokenizer):
        published = checkpoint.config
        vision, text = published["vision_config"], published["llm_config"]
        size, patch = vision["image_size"], vision["patch_size"]
        text_config = _text_config(text)
        image_token = text_config.vocab_size - 7  # where InternVL2's own additions put it, at the vocabulary's end
        if tokenizer is not None:
            image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        return InternVLConfig(
            vision_config=InternVLVisionConfig(
                **taken(vision, *_VISION),
                image_size=[size, size],
                patch_size=[patch, patch],
                attention_bias=vision["qkv_bias"],
                use_qk_norm=vision["qk_normalization"],
                norm_type=vision.get("norm_type", "layer_norm"),
            ),
            text_config=text_config,
            image_token_id=image_token,
            image_seq_length=round((size // patch * published["downsample_ratio"]) ** 2),
            downsample_ratio=published["downsample_ratio"],
            vision_feature_layer=published["select_layer"],
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,  # InternVLConfig's own default is True
        )

    def rules(self, checkpoint):
        text = checkpoint.config["llm_config"]
        encoder, native = "vision_model.encoder.layers.{n}", "model.vision_tower.encoder.layer.{n}"
        renamed = {
            "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
            "vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
            "vision_model.embeddings.patch_embedding.{kind}": (
                "model.vision_tower.embeddings.patch_embeddings.projection.{kind}"
            ),
            f"{encoder}.attn.proj.{{kind}}": f"{native}.attention.projection_layer.{{kind}}",
            f"{encoder}.attn.{{which}}_norm.weight": f"{native}.attention.{{which}}_norm.weight",
            f"{encoder}.norm1.{{kind}}": f"{native}.layernorm_before.{{kind}}",
            f"{encoder}.norm2.{{kind}}": f"{native}.layernorm_after.{{kind}}",
            f"{encoder}.ls{{which}}": f"{native}.lambda_{{which}}",
            f"{encoder}.mlp.{{rest*}}": f"{native}.mlp.{{rest*}}",
            "mlp1.0.{kind}": "model.multi_modal_projector.layer_norm.{kind}",
            "mlp1.1.{kind}": "model.multi_modal_projector.linear_1.{kind}",
            "mlp1.3.{kind}": "model.multi_modal_projector.linear_2.{kind}",
        }
        qkv = tuple(f"{native}.attention.{part}_proj.{{kind}}" for part in "qkv")
        fused = Rule(f"{encoder}.attn.qkv.{{kind}}", qkv, lambda tensor: tensor.chunk(3))
        return (*(Rule(old, new) for old, new in renamed.items()), fused, *_text_rules(text))

    def tokenizer(self, checkpoint):
        model = checkpoint.file("tokenizer.model")
        if model is None or checkpoint.file("tokenizer.json") is not None:
            return self.load_tokenizer(checkpoint, extra_special_tokens=_NAMED_TOKENS)
        return tokenizer_of_pieces(model, checkpoint.json("tokenizer_config.json"), extra_special_tokens=_NAMED_TOKENS)

    def parts(self, checkpoint, config, tokenizer):
        published = checkpoint.config
        side = published.get("force_image_size") or published["vision_config"]["image_size"]
        image_processor = make_image_processor(
            "GotOcr2ImageProcessor",
            size={"height": side, "width": side},
            image_mean=[0.485, 0.456, 0.406],  # ImageNet's, not the default, which is CLIP's
            image_std=[0.229, 0.224, 0.225],
            crop_to_patches=True,
            min_patches=published.get("min_dynamic_patch", 1),
            max_patches=published.get("max_dynamic_patch", 12),
        )
        settings = {"processor_class": "InternVLProcessor", "image_seq_length": config.image_seq_length}
        template = _chat_template(*(_PHI3 if _is_phi3(published["llm_config"]) else _CHATML))
        return ProcessorParts(image_processor, tokenizer, settings, template)

    def stops(self, tokenizer):
        end = "<|end|>" if "<|end|>" in tokenizer.get_vocab() else self.end_of_turn
        return [tokenizer.convert_tokens_to_ids(end)]


def _kind(text: dict) -> str:
    """InternLM2ForCausalLM, Qwen2ForCausalLM, Phi3ForCausalLM or LlamaForCausalLM."""
    return text["architectures"][0]


def _is_phi3(text: dict) -> bool:
    return _kind(text) == "Phi3ForCausalLM"


def _text_config(text: dict):
    kind = _kind(text)
    fields = {**taken(text, *_TEXT), "tie_word_embeddings": False}
    scaling = text.get("rope_scaling")
    if kind == "Qwen2ForCausalLM":
        return Qwen2Config(**fields)
    if kind == "Phi3ForCausalLM":
        if scaling:
            fields["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}  # "su" is its old name
        # Its code keeps one key more in the window than transformers 5 does.
        window = text.get("sliding_window")
        return Phi3Config(**fields, sliding_window=window and window + 1)
    if kind in ("InternLM2ForCausalLM", "LlamaForCausalLM"):
        if scaling:
            fields["rope_scaling"] = {**scaling, "rope_type": scaling.get("rope_type") or scaling["type"]}
        bias = {"attention_bias": bool(text.get("bias")), "mlp_bias": False} if kind.startswith("Intern") else {}
        return LlamaConfig(**fields, **bias)
    raise ValueError(f"This InternVL2 has a language model of class {kind}, which is not one of the published four.")


def _text_rules(text: dict) -> tuple[Rule, ...]:
    if _kind(text) != "InternLM2ForCausalLM":
        return (
            Rule("language_model.model.{rest*}", "model.language_model.{rest*}"),
            Rule("language_model.lm_head.weight", "lm_head.weight"),
        )
    layer, native = "language_model.model.layers.{n}", "model.language_model.layers.{n}"
    renamed = {
        "language_model.model.tok_embeddings.weight": "model.language_model.embed_tokens.weight",
        f"{layer}.attention.wo.weight": f"{native}.self_attn.o_proj.weight",
        f"{layer}.feed_forward.w1.weight": f"{native}.mlp.gate_proj.weight",
        f"{layer}.feed_forward.w2.weight": f"{native}.mlp.down_proj.weight",
        f"{layer}.feed_forward.w3.weight": f"{native}.mlp.up_proj.weight",
        f"{layer}.attention_norm.weight": f"{native}.input_layernorm.weight",
        f"{layer}.ffn_norm.weight": f"{native}.post_attention_layernorm.weight",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "language_model.output.weight": "lm_head.weight",
    }
    qkv = tuple(f"{native}.self_attn.{part}_proj.weight" for part in "qkv")
    groups = text.get("num_key_value_heads") or text["num_attention_heads"]
    size = text["hidden_size"] // text["num_attention_heads"]
    fused = Rule(f"{layer}.attention.wqkv.weight", qkv, _group_by_group(groups, size))
    return (*(Rule(old, new) for old, new in renamed.items()), fused)


def _group_by_group(groups: int, size: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """InternLM2's fused rows: for each key head its queries, then its key, then its value."""

    def part(fused: Tensor) -> tuple[Tensor, ...]:
        heads = fused.unflatten(0, (groups, -1, size))  # [groups, queries + 2, head size, D]
        return tuple(some.flatten(0, 2) for some in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:]))

    return part
