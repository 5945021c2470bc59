"""
SVR, the spatio-temporal visual token refiner: scores a video's tokens, keeps the best, and averages neighbours.

Every part gives weights or indices; the tokens themselves stay untouched.
"""

import math
from dataclasses import dataclass

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
        across = rearrange(self.temporal_norm(x), "b t n d -> (b n) t d")
        mask = None if frame_mask is None else repeat(frame_mask, "b t -> (b n) t", n=places)
        x = x + rearrange(self.temporal(across, across, mask), "(b n) t d -> b t n d", b=batch)
        return x + self.feed_forward(x)


class ScoreHead(nn.Linear):
    """Features to one logit. A class of its own because it starts nearly at zero; see `_init_weights`."""


class SignificanceScorer(nn.Module):
    """SSS: a logit for every token of a video, and the features it came from."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.bottleneck_size, bias=False)
        self.embed_time = PlaceEmbedding(1, config.bottleneck_size)
        self.embed_place = PlaceEmbedding(2, config.bottleneck_size)
        self.layers = nn.ModuleList(ScoringLayer(config) for _ in range(config.num_scoring_layers))
        self.text_norm = nn.LayerNorm(config.bottleneck_size) if config.text_in_scores else None
        self.text_attention = Attention(config) if config.text_in_scores else None
        self.norm = nn.LayerNorm(config.bottleneck_size)
        self.score = ScoreHead(config.bottleneck_size, 1)
        self.novelty_gain = nn.Parameter(torch.empty(1))

    def forward(
        self,
        visual_tokens: Tensor,  # [B, T, N, D]
        frame_mask: Tensor | None,  # [B, T]
        times: Tensor,  # [B, T]
        grid: Tensor,  # [N, 2]
        text: Tensor,  # [B, 1 + L, d]
        text_mask: Tensor | None,  # [B, 1 + L]
    ) -> tuple[Tensor, Tensor]:
        """Features [B, T, N, d] and scores [B, T, N]."""
        # Dividing by the root mean square makes the features independent of the base's scale, and dividing after the
        # projection spares a normalised copy of V.
        rms = torch.linalg.vector_norm(visual_tokens, dim=-1, keepdim=True, dtype=torch.float32)
        rms = rms / math.sqrt(visual_tokens.shape[-1])
        x = self.project(visual_tokens)
        x = x / rms.clamp(min=1e-4).to(x.dtype)
        news = novelty(x.detach(), frame_mask)
        x = x + self.embed_time(times[..., None], x.dtype)[:, :, None] + self.embed_place(grid, x.dtype)
        for layer in self.layers:
            x = layer(x, frame_mask)
        if self.text_attention is not None:
            asked = self.text_attention(self.text_norm(x).flatten(1, 2), text, text_mask)
            x = x + asked.view_as(x)
        x = self.norm(x)
        return x, self.score(x).squeeze(-1).float() + self.novelty_gain.float() * news


def novelty(x: Tensor, frame_mask: Tensor | None) -> Tensor:
    """
    How new a token is (ours), [B, T, N, d] -> [B, T, N] float32 in -0.5..0.5: one minus its cosine to the token at its
    place in the frame before, or to the mean of its frame where it is a video's first, as a share of the video's
    largest, minus a half.

    Where scores start from it, top-k keeps what stands out in the first frame and what changes after it, and a long
    quiet video loses none of its few events. The share makes it independent of how alike a base's tokens are.
    """
    x = x.float()
    before = torch.cat([x[:, :1], x[:, :-1]], dim=1)  # [B, T, N, d]
    first = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    first[:, 0] = True
    if frame_mask is not None:
        first = first | ~F.pad(frame_mask, (1, 0))[:, :-1]  # padding before it
    before = torch.where(first[..., None, None], x.mean(dim=2, keepdim=True), before)
    change = (1 - F.cosine_similarity(x, before, dim=-1) - 1e-6).clamp(min=0.0)  # less is rounding
    if frame_mask is not None:
        change = change.masked_fill(~frame_mask[..., None], 0.0)
    largest = change.amax(dim=(1, 2), keepdim=True).clamp(min=1e-3)
    return change / largest - 0.5


def select_top_k(scores: Tensor, frame_mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """
    The k best tokens over all frames and places together, back in the video's order.

    Args:
        scores: [B, T, N]. frame_mask: [B, T], True for real frames.
    Returns index [B, min(k, T * N)] into the flattened T * N, and a mask that is False where a video has fewer tokens.
    """
    batch, frames, places = scores.shape
    count = frames * places
    # Ties, and the near-ties of an untrained scorer, are broken by a sequence that spreads evenly over time and over
    # each frame (Roberts' R2, in 16 bits), so that a fresh model samples every moment and every place (ours).
    place = torch.arange(places, device=scores.device)
    if frame_mask is None:
        frame = torch.arange(frames, device=scores.device).expand(batch, -1)
    else:
        frame = frame_mask.cumsum(dim=1) - 1  # counted over real frames: padding on either side is harmless
    spread = (frame[..., None] * 49471 + place * 37345) % 65536
    ranking = (scores.detach() + 0.01 / 65536 * spread).flatten(1)
    if frame_mask is None:
        index = ranking.topk(min(k, count)).indices.sort().values
        return index, torch.ones_like(index, dtype=torch.bool)
    real = repeat(frame_mask, "b t -> b (t n)", n=places)
    index = ranking.masked_fill(~real, -torch.inf).topk(min(k, count)).indices
    mask = real.gather(1, index)
    index = torch.where(mask, index, index + count).sort().values  # padding goes last, whatever its place
    return index % count, index < count


@dataclass
class Candidates:
    """Tokens that queries may weigh: features [B, K, d], mask [B, K], places [B, K, 3] and significance [B, K]."""

    features: Tensor
    mask: Tensor
    places: Tensor
    log_significance: Tensor


class Remainder:
    """
    What top-k leaves out, averaged over equal stretches of time (ours): a plain top-k throws it away, and with it what
    a scorer has not yet learned to look for.

    `share` [B, R, T * N] holds what each token contributes to its stretch, the significant ones more, so that a
    token's score learns here too; `mask` [B, R] is True for stretches of which something is left.
    """

    def __init__(
        self,
        log_significance: Tensor,
        index: Tensor,
        kept: Tensor,
        frame_mask: Tensor | None,
        times: Tensor,
        count: int,
    ):
        batch, frames, places = log_significance.shape
        left = torch.ones_like(times, dtype=torch.bool) if frame_mask is None else frame_mask
        left = repeat(left, "b t -> b (t n)", n=places)
        left = left.scatter(1, index, left.gather(1, index) & ~kept)
        stretch = (times * count).long().clamp(max=count - 1)  # [B, T]
        stretch = repeat(stretch, "b t -> b 1 (t n)", n=places)
        member = (stretch == torch.arange(count, device=times.device)[:, None]) & left[:, None]  # [B, R, T * N]
        logits = log_significance.flatten(1)[:, None].masked_fill(~member, torch.finfo(torch.float32).min)
        self.share = logits.softmax(dim=-1) * member
        self.mask = member.any(dim=-1)
        self.log_significance = logits.logsumexp(dim=-1) - member.sum(dim=-1).clamp(min=1).log()

    def pool(self, x: Tensor) -> Tensor:  # [B, T, N, c] -> [B, R, c]
        return self.share.to(x.dtype) @ x.flatten(1, 2)


class PoolingWindows:
    """
    MTP at one scale: average pooling of neighbouring tokens, as weights that go both ways.

    `share` [B, W, s] holds what each token contributes to its window of s; the last window may be shorter, and padding
    contributes nothing. `mask` [B, W] is True for windows that hold a token.
    """

    def __init__(self, token_mask: Tensor, kernel: int):
        self.length = token_mask.shape[1]
        windows = rearrange(F.pad(token_mask, (0, -self.length % kernel)), "b (w s) -> b w s", s=kernel)
        count = windows.sum(dim=-1, keepdim=True)
        self.mask = count[..., 0] > 0
        self.share = windows / count.clamp(min=1)
        self.kernel = kernel

    def _windows(self, x: Tensor) -> Tensor:  # [B, k, c] -> [B, W, s, c]
        x = F.pad(x, (0, 0, 0, -self.length % self.kernel))
        return rearrange(x, "b (w s) c -> b w s c", s=self.kernel)

    def pool(self, x: Tensor) -> Tensor:  # [B, k, c] -> [B, W, c]
        if self.kernel == 1:
            return x
        return (self._windows(x) * self.share[..., None].to(x.dtype)).sum(dim=2)

    def pool_log(self, x: Tensor) -> Tensor:  # [B, k] -> [B, W]: the logarithm of the average of exp(x)
        if self.kernel == 1:
            return x
        return (self._windows(x[..., None])[..., 0] + self.share.clamp(min=1e-30).log()).logsumexp(dim=2)

    def spread(self, weights: Tensor) -> Tensor:  # [B, M, W] -> [B, M, k]: weights of windows as weights of tokens
        return rearrange(weights[..., None] * self.share[:, None], "b m w s -> b m (w s)")[..., : self.length]
