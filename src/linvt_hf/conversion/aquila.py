"""Aquila-VL from BAAI/Aquila-VL-2B-llava-qwen: LLaVA-OneVision's layout, under names of the LLaVA-NeXT code."""

from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from .checkpoint import Checkpoint
from .original import WORDS, Original, ProcessorParts, layers, make_image_processor, taken
from .rules import Rule

_TOWER = "model.vision_tower.vision_tower.vision_model"
_QWEN2 = (
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
)
_HEADS = 16  # of SigLIP so400m, which the config names and does not describe
CHAT_TEMPLATE = (
    WORDS
    + """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + words(message['content'], '<image>\\n') + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)


class Aquila(Original):
    name = "Aquila-VL"
    end_of_turn = "<|im_end|>"

    def claims(self, config):
        # Its model_type is that of the language model alone.
        return config.get("model_type") in ("qwen2", "llava_qwen") and "mm_vision_tower" in config

    def config(self, checkpoint, tokenizer):
        published = checkpoint.config
        text = Qwen2Config(**taken(published, *_QWEN2), tie_word_embeddings=False)
        vision = _vision_config(checkpoint)
        side = vision.image_size // vision.patch_size
        ids = [text.vocab_size - 1, text.vocab_size - 2]
        if tokenizer is not None:
            ids = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
        return LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            # LlavaOnevisionConfig's own are tokens of Qwen2.5's vocabulary.
            image_token_index=ids[0],
            video_token_index=ids[1],
            # The tower's code drops SigLIP's last layer and takes what is then the last, whatever
            # mm_vision_select_layer says; the checkpoint holds 26 layers.
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=published.get("image_aspect_ratio", "anyres_max_9"),
            image_grid_pinpoints=published["image_grid_pinpoints"],
            image_seq_length=side * side,
            tie_word_embeddings=False,
        )

    def rules(self, checkpoint):
        return (
            Rule(f"{_TOWER}.{{rest*}}", "model.vision_tower.{rest*}"),
            Rule("model.mm_projector.0.{kind}", "model.multi_modal_projector.linear_1.{kind}"),
            Rule("model.mm_projector.2.{kind}", "model.multi_modal_projector.linear_2.{kind}"),
            Rule("model.image_newline", "model.image_newline"),
            Rule("model.{rest*}", "model.language_model.{rest*}"),
            Rule("lm_head.weight", "lm_head.weight"),
        )

    def tokenizer(self, checkpoint):
        tokenizer = self.load_tokenizer(checkpoint)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<video>"]})
        return tokenizer

    def parts(self, checkpoint, config, tokenizer):
        vision = config.vision_config
        image_processor = make_image_processor(
            "LlavaOnevisionImageProcessor",
            size={"height": vision.image_size, "width": vision.image_size},
            image_grid_pinpoints=config.image_grid_pinpoints,
            image_mean=[0.5] * 3,  # SigLIP's, not the default, which is CLIP's
            image_std=[0.5] * 3,
        )
        settings = {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": config.image_seq_length,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": config.vision_aspect_ratio,
            "image_token": "<image>",
            "video_token": "<video>",
        }
        return ProcessorParts(image_processor, tokenizer, settings, CHAT_TEMPLATE)


def _vision_config(checkpoint: Checkpoint) -> SiglipVisionConfig:
    """Read from the tensors, as the config only names the tower; its image is a tile of the grids."""
    width, _, patch, _ = checkpoint.shapes[f"{_TOWER}.embeddings.patch_embedding.weight"]
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=checkpoint.shapes[f"{_TOWER}.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=layers(checkpoint, f"{_TOWER}.encoder.layers."),
        num_attention_heads=_HEADS,
        image_size=min(map(min, checkpoint.config["image_grid_pinpoints"])),
        patch_size=patch,
        vision_use_head=any(name.startswith(f"{_TOWER}.head.") for name in checkpoint.shapes),
    )
