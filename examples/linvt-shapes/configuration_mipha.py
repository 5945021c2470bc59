"""MiphaConfig: LLaVA's layout with a SigLIP tower and a Phi language model."""

from transformers import LlavaConfig


class MiphaConfig(LlavaConfig):
    """
    Config of a Mipha image-LLM (github.com/zhuyiche/llava-phi). LLaVA's fields with Mipha's values: features of
    SigLIP's last layer but one, every patch kept, and a language-model head that has a bias.
    """

    model_type = "mipha"

    vision_feature_select_strategy: str = "full"
    image_seq_length: int = 729  # 27 x 27 patches of a 384-pixel image


__all__ = ["MiphaConfig"]
