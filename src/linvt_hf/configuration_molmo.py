"""MolmoConfig: a CLIP tower, Molmo's attention pooling and projector, and a language model of transformers."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig, Qwen2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Molmo's tower is CLIP ViT-L/14-336 without its last layer.
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_TEXT = {
    "vocab_size": 152192,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}


@strict
class MolmoConfig(PreTrainedConfig):
    """
    Config of a Molmo image-LLM of 2024 (github.com/allenai/molmo). The defaults are those of Molmo-7B-D-0924.

    Args:
        vision_config: the tower, a `clip_vision_model`.
        text_config: the language model: `qwen2` (7B-D), `olmo2` (7B-O) or `olmoe` (MolmoE). Its `vocab_size` counts
            the rows of the input table, which end with 128 that were added for images.
        image_token_id: the id of `<im_patch>`, the place of one visual token.
        vision_feature_layers: layers whose outputs are joined into a patch's features, in this order.
        pooling_size: so many by so many patches become one visual token.
        projector_hidden_size: width inside the SwiGLU between pooling and language model.
        output_vocab_size: rows of the output head, which cannot say what was added to the input table.

    Raises `ValueError` for sizes that do not fit each other.
    """

    _auto_class = "AutoConfig"
    # Not "molmo": published folders say that, with fields and code of their own, which stay loadable beside ours.
    model_type = "molmo_v1"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 152066
    vision_feature_layers: list[int] | tuple[int, ...] = (-2, -9)
    pooling_size: int = 2
    projector_hidden_size: int = 18944
    output_vocab_size: int = 152064
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**{**_VISION, **(self.vision_config or {})})
        if self.text_config is None:
            self.text_config = Qwen2Config(**_TEXT)
        elif isinstance(self.text_config, dict):
            self.text_config = CONFIG_MAPPING[self.text_config.get("model_type", "qwen2")](**self.text_config)
        self.vision_feature_layers = list(self.vision_feature_layers)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        side = self.vision_config.image_size // self.vision_config.patch_size
        if side % self.pooling_size:
            raise ValueError(
                f"A crop's {side} patches a side do not divide by pooling_size {self.pooling_size}; choose one that "
                "divides them."
            )
        if self.output_vocab_size > self.text_config.vocab_size:
            raise ValueError(
                f"output_vocab_size ({self.output_vocab_size}) is above the {self.text_config.vocab_size} rows of the "
                "input table; it counts those of them that the model can say."
            )

    @property
    def tokens_per_crop(self) -> int:
        """Visual tokens that one crop becomes: 144 for 24 x 24 patches pooled 2 x 2."""
        side = self.vision_config.image_size // self.vision_config.patch_size // self.pooling_size
        return side * side


__all__ = ["MolmoConfig"]
