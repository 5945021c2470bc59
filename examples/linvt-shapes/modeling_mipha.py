"""Mipha as an image-LLM of transformers: LLaVA, but Phi's language-model head has a bias."""

from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

from .configuration_mipha import MiphaConfig


class MiphaForConditionalGeneration(LlavaForConditionalGeneration):
    """SigLIP, a two-layer projector and Phi (github.com/zhuyiche/llava-phi). Inputs and outputs are LLaVA's."""

    config_class = MiphaConfig

    def __init__(self, config: MiphaConfig):
        super().__init__(config)
        # Phi is the one language model here whose head has a bias; dropping it would shift every logit.
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()


AutoConfig.register("mipha", MiphaConfig, exist_ok=True)
AutoModelForImageTextToText.register(MiphaConfig, MiphaForConditionalGeneration, exist_ok=True)

__all__ = ["MiphaForConditionalGeneration"]
