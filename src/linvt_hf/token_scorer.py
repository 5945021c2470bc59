"""
SSS, the significance scoring of SVR: what each token of a video looks like beside the others of its frame, and across
frames; how new it is; and how much it matters for a question.

Everything but the last step is there before a question is asked. See `video_tokenizer.py` for the whole.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_linvt import LinVTConfig
from .tokenizer_parts import Attention, FeedForward, PlaceEmbedding


class ScoringLayer(GradientCheckpointingLayer):
    """One layer of SSS: attention inside each frame, attention of each place across frames, feed-forward."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.spatial_norm, self.spatial = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.temporal_norm, self.temporal = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:  # [B, T, N, d], [B, T]
        batch, frames, places, _ = x.shape
        inside = rearrange(self.spatial_norm(x), "b t n d -> (b t) n d")
        x = x + rearrange(self.spatial(inside, inside), "(b t) n d -> b t n d", b=batch)
        # Laid out anew once, where each of three projections would do it for itself.
        across = rearrange(self.temporal_norm(x), "b t n d -> (b n) t d").contiguous()
        mask = None if frame_mask is None else repeat(frame_mask, "b t -> (b n) t", n=places)
        x = x + rearrange(self.temporal(across, across, mask), "(b n) t d -> b t n d", b=batch)
        return x + self.feed_forward(x)


class ScoreHead(nn.Linear):
    """Features to one logit. A class of its own because it starts nearly at zero; see `_init_weights`."""


class SignificanceScorer(nn.Module):
    """SSS: a logit for every token of a video, and the features it came from, in three steps."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.hidden_size, config.bottleneck_size, bias=False)
        self.embed_time = PlaceEmbedding(1, config.bottleneck_size)
        self.embed_place = PlaceEmbedding(2, config.bottleneck_size)
        self.layers = nn.ModuleList(ScoringLayer(config) for _ in range(config.num_scoring_layers))
        self.text_norm = nn.LayerNorm(config.bottleneck_size) if config.text_in_scores else None
        self.text_attention = Attention(config) if config.text_in_scores else None
        self.norm = nn.LayerNorm(config.bottleneck_size)
        self.score = ScoreHead(config.bottleneck_size, 1)
        self.novelty_gain = nn.Parameter(torch.empty(1))

    def look(self, visual_tokens: Tensor) -> Tensor:  # [..., D] -> [..., d]
        """Each token alone, in the bottleneck."""
        # Dividing by the root mean square makes the features independent of the base's scale, and dividing after the
        # projection spares a normalised copy of V.
        rms = torch.linalg.vector_norm(visual_tokens, dim=-1, keepdim=True, dtype=torch.float32)
        rms = rms / math.sqrt(visual_tokens.shape[-1])
        x = self.project(visual_tokens)
        return x / rms.clamp(min=1e-4).to(x.dtype)

    def compare(self, x: Tensor, frame_mask: Tensor | None, times: Tensor, grid: Tensor) -> Tensor:
        """
        Beside the others of their frames, and across frames, [B, T, N, d] -> [B, T, N, d]; a long video by windows.

        Args:
            frame_mask: [B, T]; times: [B, T] in 0..1; grid: [N, 2].
        """
        parts = []
        for window in windows_of(x.shape[1], x.shape[2], self.config.score_window):
            inside, own = (
                slice(window.start, window.stop),
                slice(window.first - window.start, window.last - window.start),
            )
            mask = None if frame_mask is None else frame_mask[:, inside]
            if mask is not None:  # where all is padding, nothing reads what comes out, but it must be finite
                mask = mask | ~mask.any(dim=1, keepdim=True)
            parts.append(self.compare_window(x[:, inside], mask, times[:, inside], grid)[:, own])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def compare_window(self, x: Tensor, frame_mask: Tensor | None, times: Tensor, grid: Tensor) -> Tensor:
        """All frames at once."""
        x = x + self.embed_time(times[..., None], x.dtype)[:, :, None] + self.embed_place(grid, x.dtype)
        for layer in self.layers:
            x = layer(x, frame_mask)
        return x

    @torch.no_grad()
    def probe(self) -> Tensor:
        """What it makes of two frames that are always the same, [4 * d] float32 on the CPU: tells scorers apart."""
        weight = self.project.weight  # made anew each time: nothing tells that weights are as they were
        wave = torch.arange(4 * self.config.hidden_size, device=weight.device).sin().to(weight.dtype)
        places = torch.tensor([[0.25, 0.5], [0.75, 0.5]], device=weight.device)
        features = self.compare_window(self.look(wave.view(1, 2, 2, -1)), None, places[None, :, 0], places)
        return features.flatten().float().cpu()

    def forward(
        self,
        x: Tensor,  # [B, K, d]
        news: Tensor,  # [B, K]
        text: Tensor,  # [B, 1 + L, d]
        text_mask: Tensor | None,  # [B, 1 + L]
    ) -> tuple[Tensor, Tensor]:
        """For a question: features [B, K, d] and scores [B, K]."""
        if self.text_attention is not None:
            x = x + self.text_attention(self.text_norm(x), text, text_mask)
        x = self.norm(x)
        return x, self.score(x).squeeze(-1).float() + self.novelty_gain.float() * news


@dataclass(frozen=True)
class Window:
    """Frames `start` to `stop`, compared with each other; of these `first` to `last` are the window's own."""

    start: int
    stop: int
    first: int
    last: int


def windows_of(frames: int, places: int, tokens: int) -> list[Window]:
    """
    Windows of so many tokens, `places` a frame, each with a quarter of the one before, so that a long video costs in
    proportion to its length (ours). The frames that two windows share belong half to one and half to the other.
    """
    size = max(tokens // places, 1)
    if frames <= size:
        return [Window(0, frames, 0, frames)]
    overlap = size // 4
    step = size - overlap
    starts = range(0, frames - overlap, step)
    bounds = [0, *(start + overlap // 2 for start in starts[1:]), frames]
    return [
        Window(start, min(start + size, frames), first, last)
        for start, (first, last) in zip(starts, pairwise(bounds), strict=True)
    ]


def change_of(x: Tensor, frame_mask: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """
    One minus a token's cosine to the token at its place in the frame before, [B, T, N, d] -> [B, T, N] float32; to
    the mean of its frame where it is a video's first.

    Args:
        before: [B, N, d], the frame before, of a video whose first frames were elsewhere.
    """
    unit = _unit(x)  # x may be a whole video: of float32 copies this one stays, and products come one at a time
    start = _unit(x[:, :1].mean(dim=2, keepdim=True, dtype=torch.float32) if before is None else before[:, None])
    cosine = torch.cat([(unit[:, :1] * start).sum(dim=-1), (unit[:, 1:] * unit[:, :-1]).sum(dim=-1)], dim=1)
    if before is None and frame_mask is not None:
        first = ~F.pad(frame_mask, (1, 0))[:, :-1]  # padding before it
        means = _unit(x.mean(dim=2, keepdim=True, dtype=torch.float32))
        cosine = torch.where(first[..., None], (unit * means).sum(dim=-1), cosine)
    change = (1 - cosine - 1e-6).clamp(min=0.0)  # less is rounding
    return change if frame_mask is None else change.masked_fill(~frame_mask[..., None], 0.0)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1, eps=1e-8)


def novelty(change: Tensor, largest: Tensor) -> Tensor:
    """
    How new a token is (ours), in -0.5..0.5: its change as a share of the video's largest, minus a half.

    Where scores start from it, top-k keeps what stands out in the first frame and what changes after it, and a long
    quiet video loses none of its few events. The share makes it independent of how alike a base's tokens are.

    Args:
        change: [B, K]. largest: [B].
    """
    return change / largest.clamp(min=1e-3)[:, None] - 0.5


__all__ = ["ScoreHead", "SignificanceScorer", "Window", "change_of", "novelty", "windows_of"]
