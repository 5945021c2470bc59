"""Blip3Config: a vision tower of transformers, BLIP-3's perceiver resampler, and Phi-3."""

from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# google/siglip-so400m-patch14-384, of which only the patches are read.
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
# microsoft/Phi-3-mini-4k-instruct, its 32012 words and three tokens more. Where BLIP-3 was trained, a window of 2047
# looked back at 2047 tokens beside the own one; in transformers 5 the own one counts.
_TEXT = {
    "model_type": "phi3",
    "vocab_size": 32015,
    "sliding_window": 2048,
    "bos_token_id": 1,
    "eos_token_id": 32007,
    "pad_token_id": 32011,
}
# Columns and rows of crops that an image may be cut into; the first of equally good ones is taken.
ANYRES_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@strict
class Blip3Config(PreTrainedConfig):
    """
    Config of a BLIP-3 image-LLM, also called xGen-MM (github.com/salesforce/LAVIS, branch xgen-mm). The defaults are
    those of xgen-mm-phi3-mini-instruct-interleave-r-v1.5.

    Args:
        vision_config: the tower, a `siglip_vision_model` (r-v1.5) or a `clip_vision_model` (r-v1).
        text_config: the language model, a `phi3`. Its `vocab_size` counts the rows of the input table and of the head.
        image_token_id: the id of `<image>`, the place of one visual token.
        num_image_tokens: visual tokens that one tile becomes, the resampler's latents.
        resampler_depth, resampler_heads, resampler_head_dim, resampler_ff_mult: the resampler's layers, the heads of
            its attention and their width, and how much wider than the tower its feed-forward layers are.
        resampler_reads_text: whether the resampler reads the prompt, too, as in instruct-r-v1 alone: its first
            `resampler_text_length` tokens, a picture counted as one.
        anyres_grids: columns and rows of tiles that an image may be cut into.
        image_aspect_ratio: how images are cut: "anyres" (a tile of the whole and the crops of a grid), or one tile,
            "squash" or "pad". The image processor's setting decides; this one says what the model was trained with.

    Raises `ValueError` for a tower or an aspect ratio that BLIP-3 does not know.
    """

    _auto_class = "AutoConfig"
    model_type = "blip3"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32012
    num_image_tokens: int = 128
    resampler_depth: int = 6
    resampler_heads: int = 16
    resampler_head_dim: int = 96
    resampler_ff_mult: int = 4
    resampler_reads_text: bool = False
    resampler_text_length: int = 256
    anyres_grids: list | tuple = ANYRES_GRIDS
    image_aspect_ratio: str = "anyres"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, _VISION)
        self.text_config = _sub_config(self.text_config, _TEXT)
        self.anyres_grids = [list(grid) for grid in self.anyres_grids]
        super().__post_init__(**kwargs)
        if self.vision_config.model_type not in ("siglip_vision_model", "clip_vision_model"):
            raise ValueError(
                f"vision_config has model_type '{self.vision_config.model_type}', but BLIP-3 reads the patches of a "
                "'siglip_vision_model' or a 'clip_vision_model'."
            )
        check_image_aspect_ratio(self.image_aspect_ratio)


def _sub_config(config: dict | PreTrainedConfig | None, defaults: dict) -> PreTrainedConfig:
    """A dict of the default's own type fills in the default; one of another type stands alone."""
    if isinstance(config, PreTrainedConfig):
        return config
    model_type = (config or {}).get("model_type", defaults["model_type"])
    fields = {**(defaults if model_type == defaults["model_type"] else {}), **(config or {})}
    return CONFIG_MAPPING[model_type](**{name: value for name, value in fields.items() if name != "model_type"})


def check_image_aspect_ratio(image_aspect_ratio: str) -> None:
    if image_aspect_ratio not in ("anyres", "squash", "pad"):
        raise ValueError(f"image_aspect_ratio is '{image_aspect_ratio}'; it must be 'anyres', 'squash' or 'pad'.")


def select_grid(height: int, width: int, tile_size: int, grids: Sequence[Sequence[int]]) -> tuple[int, int]:
    """
    Columns and rows of the grid that shows most of an image's own pixels; of several, the one with least padding.

    Args:
        height, width: of the image, in pixels.
        tile_size: side of a tile, in pixels.
        grids: (columns, rows) each.
    """

    def shown_and_padding(grid):
        columns, rows = grid
        scale = min(columns * tile_size / width, rows * tile_size / height)
        # More pixels than the image has show nothing more.
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - columns * rows * tile_size**2

    columns, rows = max(grids, key=shown_and_padding)  # the first of equals
    return columns, rows


__all__ = ["Blip3Config"]
