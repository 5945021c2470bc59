"""What both halves of the video tokenizer are built of: places, attention, feed-forward blocks, and the question."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .configuration_linvt import LinVTConfig


class PlaceEmbedding(nn.Module):
    """Continuous places, [..., axes] in 0..1, to vectors of width d: sines and cosines, then a linear map."""

    BANDS, FASTEST = 16, 256.0  # ours: tells neighbouring frames apart up to about 512 of them

    def __init__(self, axes: int, size: int):
        super().__init__()
        self.linear = nn.Linear(2 * self.BANDS * axes, size)

    def forward(self, places: Tensor, dtype: torch.dtype) -> Tensor:  # [..., axes] -> [..., d]
        exponents = torch.linspace(-1.0, math.log2(self.FASTEST), self.BANDS, device=places.device)
        angles = 2 * math.pi * places.float()[..., None] * exponents.exp2()  # [..., axes, bands]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return self.linear(waves.to(dtype))


class Attention(nn.Module):
    """Multi-head attention of width d. `eager` and `sdpa` give the same numbers; `config` says which is used."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.config = config
        size = config.bottleneck_size
        self.query, self.key = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.value, self.output = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """x [B, Q, d] reads context [B, K, d] where context_mask, [B, K] or [B, Q, K], is True; gives [B, Q, d]."""
        heads = self.config.num_heads
        query = rearrange(self.query(x), "b q (h c) -> b h q c", h=heads)
        key = rearrange(self.key(context), "b k (h c) -> b h k c", h=heads)
        value = rearrange(self.value(context), "b k (h c) -> b h k c", h=heads)
        mask = context_mask if context_mask is None or context_mask.ndim == 3 else context_mask[:, None]
        mask = None if mask is None else mask[:, None]  # [B, 1, Q or 1, K]
        if self.config._attn_implementation == "eager":
            logits = query.float() @ key.float().transpose(-1, -2) / math.sqrt(key.shape[-1])
            if mask is not None:
                logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            mixed = logits.softmax(dim=-1).to(value.dtype) @ value
        else:  # flash kernels take no such masks; SDPA picks its own fused kernel
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(rearrange(mixed, "b h q c -> b q (h c)"))


class FeedForward(nn.Sequential):
    def __init__(self, config: LinVTConfig):
        size = config.bottleneck_size
        super().__init__(
            nn.LayerNorm(size),
            nn.Linear(size, config.mlp_ratio * size),
            nn.GELU(),
            nn.Linear(config.mlp_ratio * size, size),
        )


class QuestionReader(nn.Module):
    """The question's words in the bottleneck, with a key in front that is there without a question, too."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.hidden_size, config.bottleneck_size)
        self.norm = nn.LayerNorm(config.bottleneck_size)
        self.embed_order = PlaceEmbedding(1, config.bottleneck_size)
        self.no_text = nn.Parameter(torch.empty(config.bottleneck_size))

    def forward(
        self, batch: int, text_embeds: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] and [B, L] -> [B, 1 + L, d] and [B, 1 + L]; without text only the `no_text` key."""
        text = self.no_text.expand(batch, 1, -1)
        if text_embeds is None or not self.config.text_conditioning:
            return text, None
        if text_mask is None:
            text_mask = text_embeds.new_ones(text_embeds.shape[:2], dtype=torch.bool)
        text_mask = text_mask.bool()
        position = (text_mask.cumsum(dim=1) - 0.5) / 256  # counted over real words: padding on either side is harmless
        words = self.norm(self.project(text_embeds))
        words = words + self.embed_order(position[..., None], words.dtype)
        return torch.cat([text, words], dim=1), F.pad(text_mask, (1, 0), value=True)
