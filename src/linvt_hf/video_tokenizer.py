"""
The Linear Video Tokenizer of LinVT (arXiv 2412.05185): SVR (SSS, top-k, MTP) and TTA.

A video's visual tokens V, [T frames, N tokens, D], become M tokens, each a convex combination of V's own. Everything
that is learned works in a bottleneck of width d and ends in weights; the values those weights mix are V, untouched:

    SVR, spatio-temporal visual token refiner
        SignificanceScorer    SSS: scores every token in its frame and across frames, for the question (that is ours)
        select_top_k          keeps the k best of all frames and places, in the video's order
        Remainder             averages what top-k leaves out, so that nothing is lost for good (ours)
        PoolingWindows        MTP: averages neighbours at several scales
    TTA, text-conditioned token aggregator
        TextConditionedAggregator    queries read themselves, the kept tokens and the question, then weigh the tokens
    out = W @ V, where the rows of W are non-negative and sum to 1
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from .configuration_linvt import LinVTConfig, square_grid


@dataclass
class VideoTokenizerOutput(ModelOutput):
    """
    video_tokens: [B, M, D], what the LLM reads.
    weights: [B, M, T * N], W of `video_tokens == weights @ visual_tokens`; only when asked for.
    scores: [B, T, N] float32, the significance that SSS gave each token, as a logit; meaningless in padding frames.
    """

    video_tokens: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None


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
        """x [B, Q, d] reads context [B, K, d] where context_mask [B, K] is True; gives [B, Q, d]."""
        heads = self.config.num_heads
        query = rearrange(self.query(x), "b q (h c) -> b h q c", h=heads)
        key = rearrange(self.key(context), "b k (h c) -> b h k c", h=heads)
        value = rearrange(self.value(context), "b k (h c) -> b h k c", h=heads)
        mask = None if context_mask is None else context_mask[:, None, None, :]  # [B, 1, 1, K]
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


class AggregationLayer(GradientCheckpointingLayer):
    """One layer of TTA: queries read each other, the visual tokens of their own scale, and the question."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.visual_norm, self.visual_attention = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.text_norm, self.text_attention = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        queries: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        sizes: list[int],
        masks: list[Tensor],
        *scales: Tensor,  # not in a list: checkpointing finds only tensors that are arguments of their own
    ) -> Tensor:
        x = self.self_norm(queries)
        queries = queries + self.self_attention(x, x)
        parts = self.visual_norm(queries).split(sizes, dim=1)
        read = [self.visual_attention(*inputs) for inputs in zip(parts, scales, masks, strict=True)]
        queries = queries + torch.cat(read, dim=1)
        queries = queries + self.text_attention(self.text_norm(queries), text, text_mask)
        return queries + self.feed_forward(queries)


class TextConditionedAggregator(nn.Module):
    """TTA: scale-specific queries, conditioned on the question, weigh the selected tokens."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.config = config
        count, size = config.num_video_tokens, config.bottleneck_size
        self.queries = nn.Parameter(torch.empty(count, size))
        # A query starts as a cell of the video: it prefers tokens near its centre, and training may move it (ours).
        self.centers = nn.Parameter(torch.empty(count, 3))
        self.log_widths = nn.Parameter(torch.empty(count, 3))
        self.embed_center = PlaceEmbedding(3, size)
        self.layers = nn.ModuleList(AggregationLayer(config) for _ in range(config.num_aggregation_layers))
        self.token_order = config.token_order()
        self.query_norm, self.to_query = nn.LayerNorm(size), nn.Linear(size, size)
        self.to_key = nn.Linear(size, size, bias=False)

    def forward(self, kept: Candidates, rest: Candidates | None, text: Tensor, text_mask: Tensor | None) -> Tensor:
        # k tokens kept and R averages of the rest, text [B, 1 + L, d] -> weights [B, M, k + R]
        windows = [PoolingWindows(kept.mask, kernel) for kernel in self.config.pooling_scales]
        # The averages are as coarse as they should be: every scale sees them as they are.
        features = [_with(window.pool(kept.features), rest and rest.features) for window in windows]
        masks = [_with(window.mask, rest and rest.mask) for window in windows]
        queries = self.queries + self.embed_center(self.centers, self.queries.dtype)
        queries = queries.expand(len(kept.features), -1, -1)  # [B, M, d]
        sizes = self.config.queries_per_scale
        for layer in self.layers:
            queries = layer(queries, text, text_mask, sizes, masks, *features)

        queries = self.to_query(self.query_norm(queries)) / math.sqrt(queries.shape[-1])
        keys = [self.to_key(x) for x in features]
        with _without_autocast(queries.device.type):
            return self._weigh(queries.float(), keys, masks, windows, kept, rest)

    def _weigh(self, queries, keys, masks, windows, kept: Candidates, rest: Candidates | None) -> Tensor:
        """Linear aggregation: one softmax over the tokens for each query, in float32, and nothing after it but V."""
        sizes = self.config.queries_per_scale
        parts = (queries.split(sizes, dim=1), self.centers.split(sizes), self.log_widths.split(sizes))
        weights = []
        for query, center, log_width, key, mask, window in zip(*parts, keys, masks, windows, strict=True):
            logits = query @ key.float().transpose(1, 2)  # [B, M_s, W + R]
            places = _with(window.pool(kept.places), rest and rest.places)
            offset = places[:, None] - center.float()[:, None]  # [B, M_s, W + R, 3]
            logits = logits - 0.5 * (offset / log_width.float().exp()[:, None]).square().sum(dim=-1)
            # The gradient path of the scores: a token that SSS finds insignificant weighs less (ours).
            significance = _with(window.pool_log(kept.log_significance), rest and rest.log_significance)
            logits = (logits + significance[:, None]).masked_fill(~mask[:, None], torch.finfo(logits.dtype).min)
            share = logits.softmax(dim=-1)
            count = window.mask.shape[1]
            weights.append(_with(window.spread(share[..., :count]), share[..., count:], dim=2))
        return torch.cat(weights, dim=1)[:, self.token_order]


def _with(first: Tensor, second: Tensor | None, dim: int = 1) -> Tensor:
    return first if second is None else torch.cat([first, second], dim=dim)


class LinVTPreTrainedModel(PreTrainedModel):
    """What LinVT's modules share as transformers models: config, initialisation, attention backends."""

    config_class = LinVTConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinearVideoTokenizer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # Nearly equal scores at first: what a random scorer throws away may be worth keeping (ours).
            init.normal_(module.weight, std=1e-5 if isinstance(module, ScoreHead) else std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SignificanceScorer):
            init.constant_(module.novelty_gain, self.config.novelty_gain)
        elif isinstance(module, QuestionReader):
            init.normal_(module.no_text, std=std)
        elif isinstance(module, TextConditionedAggregator):
            centers, widths = zip(*self.config.query_cells(), strict=True)
            init.normal_(module.queries, std=std)
            init.copy_(module.centers, torch.tensor(centers))
            init.copy_(module.log_widths, torch.tensor(widths).log())


class LinearVideoTokenizer(LinVTPreTrainedModel):
    """
    LinVT's module: the visual tokens of a video's frames in, a few linear combinations of them out.

    Args:
        config: `LinVTConfig`; on its own (without `base_config`) it needs `hidden_size`, the width D of the tokens.
    """

    main_input_name = "visual_tokens"

    def __init__(self, config: LinVTConfig):
        super().__init__(config)
        if config.hidden_size is None:
            raise ValueError("LinVTConfig has neither base_config nor hidden_size; give hidden_size, the LLM's width.")
        self.question = QuestionReader(config)
        self.scorer = SignificanceScorer(config)
        self.aggregator = TextConditionedAggregator(config)
        self.post_init()

    def forward(
        self,
        visual_tokens: Tensor,
        frame_mask: Tensor | None = None,
        frame_times: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        output_weights: bool = False,
        *,
        grid: tuple[int, int] | None = None,
    ) -> VideoTokenizerOutput:
        """
        Args:
            visual_tokens: [B, T, N, D], the image-LLM's own tokens of each frame, after its projector.
            frame_mask: [B, T], True (or 1) for real frames; needed where videos of one batch differ in length. Every
                video needs a real frame, and padding must be finite.
            frame_times: [B, T], seconds. Without them frames count as evenly spaced.
            text_embeds: [B, L, D], the question in the LLM's input embeddings; None for the text-free mode.
            text_mask: [B, L], True (or 1) for real words.
            output_weights: also return W, [B, M, T * N].
            grid: rows and columns of a frame's tokens, N = rows * columns; a square if N allows, else one row.
        """
        batch, frames, places, _ = visual_tokens.shape
        rows, columns = grid or square_grid(places)
        if rows * columns != places:
            raise ValueError(f"grid {rows} x {columns} does not hold the {places} tokens of a frame.")
        frame_mask = None if frame_mask is None else frame_mask.bool()
        device = visual_tokens.device
        times = normalise_times(frame_times, frame_mask, batch, frames, device)  # [B, T]
        centers = ((torch.arange(side, device=device) + 0.5) / side for side in (rows, columns))
        grid_places = torch.cartesian_prod(*centers)  # [N, 2]

        text, text_mask = self.question(batch, text_embeds, text_mask)  # [B, 1 + L, d]
        features, scores = self.scorer(visual_tokens, frame_mask, times, grid_places, text, text_mask)
        index, mask = select_top_k(scores, frame_mask, self.config.num_selected_tokens)  # [B, k]
        log_significance = F.logsigmoid(scores)
        place = torch.cat([times.gather(1, index // places)[..., None], grid_places[index % places]], dim=-1)
        kept = Candidates(take(features, index), mask, place, log_significance.flatten(1).gather(1, index))
        rest, remainder = None, None
        if self.config.num_remainder_tokens and index.shape[1] < frames * places:
            remainder = Remainder(log_significance, index, mask, frame_mask, times, self.config.num_remainder_tokens)
            everywhere = torch.cat(
                [repeat(times, "b t -> b t n 1", n=places), repeat(grid_places, "n c -> b t n c", b=batch, t=frames)],
                dim=-1,
            )  # [B, T, N, 3]
            rest = Candidates(
                remainder.pool(features), remainder.mask, remainder.pool(everywhere), remainder.log_significance
            )

        weights = self.aggregator(kept, rest, text, text_mask).to(visual_tokens.dtype)  # [B, M, k + R]
        selected, averaged = weights.split([index.shape[1], weights.shape[2] - index.shape[1]], dim=2)
        video_tokens = selected @ take(visual_tokens, index)
        if remainder is not None:
            video_tokens = video_tokens + averaged @ remainder.pool(visual_tokens)
        if output_weights:
            weights = _scatter(selected, index, frames * places)
            if remainder is not None:
                weights = weights + averaged @ remainder.share.to(weights.dtype)
        return VideoTokenizerOutput(
            video_tokens=video_tokens, weights=weights if output_weights else None, scores=scores
        )


def _without_autocast(device: str) -> AbstractContextManager:
    """Autocast would undo the float32 of what it runs around; not every device has one."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def take(tokens: Tensor, index: Tensor) -> Tensor:  # [B, T, N, c], [B, k] -> [B, k, c]
    return tokens.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def normalise_times(
    frame_times: Tensor | None, frame_mask: Tensor | None, batch: int, frames: int, device: torch.device
) -> Tensor:
    """
    Each frame's moment as a fraction of its video, [B, T] float32 in 0..1.

    A frame stands for the stretch of time around it, so T evenly spaced frames lie at (i + 0.5) / T, with times or
    without. Padding frames get a value too; nothing reads it.
    """
    order = torch.arange(frames, device=device, dtype=torch.float32).expand(batch, -1)
    if frame_mask is None:
        count = torch.full((batch, 1), float(frames), device=device)
    else:
        order = frame_mask.cumsum(dim=1).float() - 1
        count = frame_mask.sum(dim=1, keepdim=True).float()
    even = (order + 0.5) / count
    if frame_times is None:
        return even.clamp(0, 1)
    real = torch.ones_like(frame_times, dtype=torch.bool) if frame_mask is None else frame_mask
    first = torch.where(real, frame_times, torch.inf).amin(dim=1, keepdim=True)
    times = (frame_times - first).float()  # only now: float32 could not tell the seconds of a clock time apart
    last = torch.where(real, times, 0).amax(dim=1, keepdim=True)
    span = last * count / (count - 1).clamp(min=1)
    fraction = times / span.clamp(min=1e-6) + 0.5 / count
    return torch.where(span > 0, fraction, even).clamp(0, 1)


def _scatter(weights: Tensor, index: Tensor, count: int) -> Tensor:  # [B, M, k], [B, k] -> [B, M, count]
    full = weights.new_zeros(*weights.shape[:2], count)
    return full.scatter(2, index[:, None].expand_as(weights), weights)


__all__ = ["LinVTPreTrainedModel", "LinearVideoTokenizer", "VideoTokenizerOutput"]
