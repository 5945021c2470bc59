"""
BLIP-3 from Salesforce/xgen-mm-phi3-mini-*-r-v1 and -r-v1.5: what was added to Phi-3's tables is put at their ends, and
r-v1's vision tower, OpenCLIP's, becomes transformers' CLIP.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import CLIPVisionConfig, Phi3Config, SiglipVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from ..configuration_blip3 import Blip3Config
from ..processing_blip3 import CHAT_TEMPLATE, Blip3ImageProcessor
from .checkpoint import Checkpoint
from .original import Original, ProcessorParts, layers, taken
from .rules import Drop, Rule, join

logger = logging.get_logger(__name__)

_VISION = "vlm.vision_encoder"
_RESAMPLER = "vlm.vision_tokenizer"
_LLM = "vlm.lang_model"
# Of both vision towers and the resampler: the config leaves them to code, and no tensor's shape tells.
_HEADS = 16
_ADDED = ("<image>", "<image placeholder>", "<|endofchunk|>")


class Blip3(Original):
    name = "BLIP-3"
    end_of_turn = "<|end|>"

    def claims(self, config):
        return config.get("model_type") in ("xgenmm", "blip_3")

    def config(self, checkpoint, tokenizer):
        shapes, text = checkpoint.shapes, checkpoint.config["text_config"]
        words = text["initial_tokenizer_len"]
        added, hidden = shapes[f"{_LLM}.model.embed_tokens.additional_embedding.weight"]
        latents, _ = shapes[f"{_RESAMPLER}.latents"]
        inner, _ = shapes[f"{_RESAMPLER}.layers.0.0.to_q.weight"]
        # Its code keeps one key more in the window than transformers 5 does.
        window = text.get("sliding_window")
        return Blip3Config(
            vision_config=_clip_config(checkpoint) if _is_open_clip(checkpoint) else _siglip_config(checkpoint),
            text_config=Phi3Config(
                **taken(text, "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta"),
                vocab_size=words + added,
                hidden_size=hidden,
                intermediate_size=shapes[f"{_LLM}.model.layers.0.mlp.down_proj.weight"][1],
                num_hidden_layers=layers(checkpoint, f"{_LLM}.model.layers."),
                sliding_window=window and window + 1,
                bos_token_id=1,
                eos_token_id=32007 if tokenizer is None else self.stops(tokenizer)[0],
                pad_token_id=words - 1,
                tie_word_embeddings=False,
            ),
            num_image_tokens=latents,
            resampler_depth=layers(checkpoint, f"{_RESAMPLER}.layers."),
            resampler_heads=_HEADS,
            resampler_head_dim=inner // _HEADS,
            resampler_reads_text=f"{_RESAMPLER}.text_projection.0.weight" in shapes,
            image_token_id=words,
            image_aspect_ratio=_image_aspect_ratio(checkpoint),
            tie_word_embeddings=False,
        )

    def rules(self, checkpoint):
        words = checkpoint.config["text_config"]["initial_tokenizer_len"]
        llm, native = f"{_LLM}.model", "model.language_model"
        layer, block = f"{_RESAMPLER}.layers.{{n}}", "model.multi_modal_projector.layers.{n}"
        appended = _appended(words)
        return (
            *(_clip_rules() if _is_open_clip(checkpoint) else _siglip_rules()),
            Rule(f"{layer}.0.{{rest*}}", f"{block}.attention.{{rest*}}"),
            Rule(f"{layer}.1.0.{{kind}}", f"{block}.feed_forward.norm.{{kind}}"),
            Rule(f"{layer}.1.1.weight", f"{block}.feed_forward.up_proj.weight"),
            Rule(f"{layer}.1.3.weight", f"{block}.feed_forward.down_proj.weight"),
            Rule(f"{_RESAMPLER}.{{rest*}}", "model.multi_modal_projector.{rest*}"),
            Rule(
                (f"{llm}.embed_tokens.weight", f"{llm}.embed_tokens.additional_embedding.weight"),
                f"{native}.embed_tokens.weight",
                appended,
            ),
            Rule(f"{llm}.{{rest*}}", f"{native}.{{rest*}}"),
            Rule((f"{_LLM}.lm_head.{{kind}}", f"{_LLM}.lm_head.additional_fc.{{kind}}"), "lm_head.{kind}", appended),
        )

    def tokenizer(self, checkpoint):
        """The makers' code adds three tokens when it loads; they must come right after the tokenizer's own."""
        tokenizer = self.load_tokenizer(checkpoint)
        tokenizer.add_special_tokens({"extra_special_tokens": list(_ADDED)})
        words = checkpoint.config["text_config"]["initial_tokenizer_len"]
        found = tokenizer.convert_tokens_to_ids(list(_ADDED))
        if found != list(range(words, words + len(_ADDED))):
            raise ValueError(
                f"The tokenizer of {checkpoint.path} numbers {', '.join(_ADDED)} as {found}, but its model's tables "
                f"have them from {words} on; take the tokenizer files that came with these weights."
            )
        return tokenizer

    def parts(self, checkpoint, config, tokenizer):
        size = config.vision_config.image_size
        open_clip = config.vision_config.model_type == "clip_vision_model"
        mean, std = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if open_clip else ([0.5] * 3, [0.5] * 3)
        image_processor = Blip3ImageProcessor(
            size={"height": size, "width": size},
            image_mean=list(mean),
            image_std=list(std),
            image_aspect_ratio=config.image_aspect_ratio,
        )
        settings = {"processor_class": "Blip3Processor", "num_image_tokens": config.num_image_tokens}
        return ProcessorParts(image_processor, tokenizer, settings, CHAT_TEMPLATE)


def _appended(words: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows of a table after the tokenizer's `words` were never trained; those of the added tokens take their place."""
    return lambda table, added: join(table[:words], added)


def _image_aspect_ratio(checkpoint: Checkpoint) -> str:
    """Of still images, "anyres" or "squash", which is what the makers' image processor does without crops."""
    vision = checkpoint.config.get("vision_encoder_config") or {}
    told = vision.get("image_aspect_ratio")
    if told == "anyres" and vision.get("anyres_patch_sampling"):
        return "anyres"
    if told in (None, "anyres"):
        lacks = "image_aspect_ratio" if told is None else "anyres_patch_sampling"
        logger.warning(
            f"The vision_encoder_config of {checkpoint.path} does not set {lacks}, so a still image becomes one "
            "squashed tile without crops, as a video's frame does anyway; set image_aspect_ratio in what is written "
            'to "anyres" if you know it better.'
        )
    return "squash"


def _is_open_clip(checkpoint: Checkpoint) -> bool:
    return f"{_VISION}.conv1.weight" in checkpoint.shapes


def _siglip_config(checkpoint: Checkpoint) -> SiglipVisionConfig:
    shapes = checkpoint.shapes
    width, _, patch, _ = shapes[f"{_VISION}.embeddings.patch_embedding.weight"]
    side = round(shapes[f"{_VISION}.embeddings.position_embedding.weight"][0] ** 0.5)
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{_VISION}.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=layers(checkpoint, f"{_VISION}.encoder.layers."),
        num_attention_heads=_HEADS,
        # 27 patches of 14 pixels are 378, and SigLIP's image is 384: the last pixels are in no patch.
        image_size=384 if (side, patch) == (27, 14) else side * patch,
        patch_size=patch,
        vision_use_head=False,
    )


def _siglip_rules() -> tuple[Rule | Drop, ...]:
    return (
        Drop(f"{_VISION}.head.{{rest*}}", "the resampler reads the patches, not the pooled picture"),
        Rule(f"{_VISION}.{{rest*}}", "model.vision_tower.{rest*}"),
    )


def _clip_config(checkpoint: Checkpoint) -> CLIPVisionConfig:
    shapes = checkpoint.shapes
    width, _, patch, _ = shapes[f"{_VISION}.conv1.weight"]
    places, _ = shapes[f"{_VISION}.positional_embedding"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{_VISION}.transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=layers(checkpoint, f"{_VISION}.transformer.resblocks."),
        num_attention_heads=_HEADS,
        image_size=patch * round((places - 1) ** 0.5),
        patch_size=patch,
        hidden_act="quick_gelu",
    )


def _clip_rules() -> tuple[Rule | Drop, ...]:
    layer, native = f"{_VISION}.transformer.resblocks.{{n}}", "model.vision_tower.encoder.layers.{n}"
    qkv = tuple(f"{native}.self_attn.{part}_proj.{{kind}}" for part in "qkv")
    renamed = {
        f"{_VISION}.class_embedding": "model.vision_tower.embeddings.class_embedding",
        f"{_VISION}.positional_embedding": "model.vision_tower.embeddings.position_embedding.weight",
        f"{_VISION}.conv1.weight": "model.vision_tower.embeddings.patch_embedding.weight",
        f"{_VISION}.ln_pre.{{kind}}": "model.vision_tower.pre_layrnorm.{kind}",
        f"{_VISION}.ln_post.{{kind}}": "model.vision_tower.post_layernorm.{kind}",
        f"{layer}.ln_1.{{kind}}": f"{native}.layer_norm1.{{kind}}",
        f"{layer}.ln_2.{{kind}}": f"{native}.layer_norm2.{{kind}}",
        f"{layer}.attn.out_proj.{{kind}}": f"{native}.self_attn.out_proj.{{kind}}",
        f"{layer}.mlp.c_fc.{{kind}}": f"{native}.mlp.fc1.{{kind}}",
        f"{layer}.mlp.c_proj.{{kind}}": f"{native}.mlp.fc2.{{kind}}",
    }
    return (
        *(Rule(old, new) for old, new in renamed.items()),
        Rule(f"{layer}.attn.in_proj_{{kind}}", qkv, lambda fused: fused.chunk(3)),
        Drop(f"{_VISION}.proj", "it maps the pooled picture to CLIP's common space"),
    )
