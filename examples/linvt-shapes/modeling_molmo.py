"""Molmo as an image-LLM of transformers: CLIP, attention pooling, a SwiGLU projector and a causal language model."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Cache,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_molmo import MolmoConfig
from .image_llm_parts import ImageLLMHeadMixin, ImageLLMModelMixin, named_cache


class MolmoPooling(nn.Module):  # transformers takes a module named for attention for one whose kernel it may choose
    """Each window of patches to one vector by attention: its mean asks, its patches answer."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        patch_width = width * len(config.vision_feature_layers)
        self.num_heads = config.vision_config.num_attention_heads
        self.q_proj = nn.Linear(patch_width, width)
        self.k_proj = nn.Linear(patch_width, width)
        self.v_proj = nn.Linear(patch_width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, windows: Tensor) -> Tensor:
        """windows: [N, P, C] -> [N, C / number of layers]."""
        query = self.q_proj(windows.mean(dim=1, keepdim=True))
        parts = (query, self.k_proj(windows), self.v_proj(windows))
        # In float32, whatever the model's dtype: so it was trained.
        q, k, v = (rearrange(part.float(), "n p (h d) -> n h p d", h=self.num_heads) for part in parts)
        # Written out: fused kernels are made for few long sequences, and these are many of four.
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [N, heads, 1, P]
        return self.o_proj(rearrange(weights @ v, "n h 1 d -> n (h d)").to(windows.dtype))


class MolmoMultiModalProjector(nn.Module):
    """A crop's patches to visual tokens of the language model's width; patches of padding are marked as such."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        width, hidden = config.vision_config.hidden_size, config.projector_hidden_size
        self.pooling_size = config.pooling_size
        self.side = config.vision_config.image_size // config.vision_config.patch_size
        # Added to patches that are all padding, and to those that are in part.
        self.pad_embed = nn.Parameter(torch.zeros(2, width * len(config.vision_feature_layers)))
        self.pooling = MolmoPooling(config)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, config.text_config.hidden_size, bias=False)

    def forward(self, patches: Tensor, image_masks: Tensor | None = None) -> Tensor:
        """patches: [crops, 576, C]; image_masks: [crops, 576] -> [crops, 144, D]."""
        if image_masks is not None:
            empty = image_masks == 0
            partial = (image_masks < 1) & ~empty  # and -1, which stands for "not known"
            kinds = (empty + 2 * partial).to(patches.device)
            patches = patches + F.embedding(kinds, F.pad(self.pad_embed, (0, 0, 1, 0)))  # kind 0: nothing
        size = {"a": self.pooling_size, "b": self.pooling_size}
        windows = rearrange(patches, "n (h a w b) c -> (n h w) (a b) c", h=self.side // self.pooling_size, **size)
        tokens = self.pooling(windows)  # [crops * 144, width]
        tokens = self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))
        return tokens.unflatten(0, (len(patches), -1))


class MolmoPreTrainedModel(PreTrainedModel):
    config_class = MolmoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _no_split_modules = ["MolmoMultiModalProjector"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MolmoMultiModalProjector):
            init.zeros_(module.pad_embed)


class MolmoModel(ImageLLMModelMixin, MolmoPreTrainedModel):
    """Molmo (github.com/allenai/molmo, arXiv 2409.17146) without its output head."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.vision_tower.post_layernorm = nn.Identity()  # of the CLS token alone, which is not used
        self.multi_modal_projector = MolmoMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_masks: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        The visual tokens of crops, whatever images these belong to. A video's frame is one crop.

        Args:
            pixel_values: [crops, 3, 336, 336]; a crop of -1 alone is padding of a batch.
            image_masks: [crops, 576], the share of each patch that is no padding, or -1 where that is not known. By
                default no patch is padded.

        Returns the tower's output with the tokens, [crops, 144, D], as `pooler_output`.
        """
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        kwargs["output_hidden_states"] = True
        output = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        layers = [output.hidden_states[layer][:, 1:] for layer in self.config.vision_feature_layers]  # without CLS
        patches = torch.cat(layers, dim=-1)  # [crops, 576, layers * width]
        real = (pixel_values != -1).flatten(1).any(dim=1)
        patches = patches * real[:, None, None].to(patches)
        output.pooler_output = self.multi_modal_projector(patches, image_masks)
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_token_order: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, S], with `config.image_token_id` at each visual token's place.
            pixel_values, image_masks: see `get_image_features`; the crops of all images one after another.
            image_token_order: [crops, 144], which of its image's places each token of a crop takes, -1 for none. An
                image's first crop begins with place 0. By default each crop is an image of its own.

        Raises `ValueError` when visual tokens and places for them do not match in number.
        """
        inputs_embeds = self.embed_prompt(input_ids, inputs_embeds)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, image_masks, return_dict=True).pooler_output
            image_tokens = stitch(features, image_token_order).to(inputs_embeds)  # [places, D]
            places = self.image_places(input_ids, inputs_embeds)
            # Molmo adds a visual token to its placeholder's embedding and does not replace it.
            inputs_embeds = inputs_embeds + self.in_places(torch.zeros_like(inputs_embeds), image_tokens, places)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class MolmoForConditionalGeneration(ImageLLMHeadMixin, MolmoPreTrainedModel, GenerationMixin):
    """Molmo with its output head, which has fewer rows than the input table: it cannot say the tokens of images."""

    _auto_class = "AutoModelForImageTextToText"
    image_inputs = ("pixel_values", "image_masks", "image_token_order")

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.model = MolmoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.output_vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """`PreTrainedModel.resize_token_embeddings`, after which table and head have the same number of rows."""
        table = super().resize_token_embeddings(*args, **kwargs)
        self.config.output_vocab_size = self.lm_head.weight.shape[0]
        return table

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_token_order: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Logits, and the loss if `labels` [B, S] are given (-100 where nothing is learned). For the other arguments see
        `MolmoModel.forward`.

        Logits are [B, S, rows of the input table]; what the head has no row for has the least value there is.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_masks=image_masks,
            image_token_order=image_token_order,
            use_cache=use_cache,
            return_dict=True,
            **named_cache(cache, past_key_values),
            **kwargs,
        )
        output = self.say(output, labels, logits_to_keep, **kwargs)
        # Generation takes the table's length for the logits' (beams), and looks up a prompt's ids there (penalties).
        missing = self.config.text_config.vocab_size - output.logits.shape[-1]
        output.logits = F.pad(output.logits, (0, missing), value=torch.finfo(output.logits.dtype).min)
        return output

    def num_places(self, images):
        order = images.get("image_token_order")
        if order is None:
            return torch.full((len(images["pixel_values"]),), self.config.tokens_per_crop)
        return (order >= 0).sum(dim=1)


def stitch(features: Tensor, order: Tensor | None) -> Tensor:
    """
    The visual tokens of crops, [crops, N, D], as one sequence [places, D], image after image.

    Args:
        order: [crops, N], see `MolmoModel.forward`; what crops have in common appears in one of them only.
    """
    if order is None:
        return features.flatten(0, 1)
    order = order.to(features.device)
    used = order >= 0
    counts = used.sum(dim=1)
    # Tokens before a crop's image: those before the crop itself if it is the first, else as for the crop before.
    before = torch.where(order[:, 0] == 0, counts.cumsum(0) - counts, 0).cummax(0).values  # [crops]
    places = (order + before[:, None])[used]  # a permutation of 0, 1, ...
    return features[used][places.argsort()]


AutoConfig.register(MolmoConfig.model_type, MolmoConfig, exist_ok=True)
AutoModelForImageTextToText.register(MolmoConfig, MolmoForConditionalGeneration, exist_ok=True)

__all__ = ["MolmoForConditionalGeneration", "MolmoModel", "MolmoPreTrainedModel"]
