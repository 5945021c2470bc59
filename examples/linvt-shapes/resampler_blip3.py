"""BLIP-3's perceiver resampler: the patches of a tile to a fixed number of visual tokens."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_blip3 import Blip3Config


class Blip3PerceiverAttention(nn.Module):
    """The latents ask; a tile's patches and the latents themselves answer."""

    def __init__(self, config: Blip3Config):
        super().__init__()
        width = config.vision_config.hidden_size
        inner = config.resampler_heads * config.resampler_head_dim
        self.heads = config.resampler_heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """latents: [B, L, C]; patches: [B, P, C]; mask: [B, 1, 1, P + L], True where to look."""
        latents = self.norm_latents(latents)
        keys_values = self.to_kv(torch.cat([self.norm_media(patches), latents], dim=1))  # [B, P + L, 2 * inner]
        q = rearrange(self.to_q(latents), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(keys_values, "b n (two h d) -> two b h n d", two=2, h=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


class Blip3FeedForward(nn.Module):
    def __init__(self, config: Blip3Config):
        super().__init__()
        width = config.vision_config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, config.resampler_ff_mult * width, bias=False)
        self.down_proj = nn.Linear(config.resampler_ff_mult * width, width, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(self.norm(latents))))


class Blip3ResamplerLayer(GradientCheckpointingLayer):
    def __init__(self, config: Blip3Config):
        super().__init__()
        self.attention = Blip3PerceiverAttention(config)
        self.feed_forward = Blip3FeedForward(config)

    def forward(self, latents: Tensor, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        latents = latents + self.attention(latents, patches, mask)
        return latents + self.feed_forward(latents)


class Blip3PerceiverResampler(nn.Module):
    """
    A tile's patches to a fixed number of visual tokens of the language model's width. In r-v1's instructed model it
    reads the prompt, too: projected embeddings of its tokens ask beside the latents, and answer beside the patches.
    """

    def __init__(self, config: Blip3Config):
        super().__init__()
        width = config.vision_config.hidden_size
        self.latents = nn.Parameter(torch.zeros(config.num_image_tokens, width))
        self.layers = nn.ModuleList(Blip3ResamplerLayer(config) for _ in range(config.resampler_depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.text_config.hidden_size)
        if config.resampler_reads_text:
            layers = (nn.Linear(config.text_config.hidden_size, width), nn.GELU(), nn.Linear(width, width))
            self.text_projection = nn.Sequential(*layers)

    def forward(self, patches: Tensor, mask: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """
        Args:
            patches: [tiles, P, C].
            mask: [tiles, P], True for patches that are no padding.
            text: [T, D], embeddings of the prompt of all these tiles, for a resampler that reads it.

        Returns [tiles, L, D].
        """
        latents = self.latents
        if text is not None:
            latents = torch.cat([latents, self.text_projection(text)])  # [L + T, C]
        latents = latents.expand(len(patches), -1, -1)
        if mask is not None:
            mask = F.pad(mask, (0, latents.shape[1]), value=True)[:, None, None]  # [tiles, 1, 1, P + L]
        for layer in self.layers:
            latents = layer(latents, patches, mask)
        return self.projection(self.norm(latents[:, : len(self.latents)]))


__all__ = ["Blip3PerceiverResampler"]
