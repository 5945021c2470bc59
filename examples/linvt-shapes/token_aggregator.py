"""TTA, the text-conditioned token aggregator: queries read the kept tokens and the question, then weigh the tokens."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_linvt import LinVTConfig
from .token_refiner import Candidates, PoolingWindows
from .tokenizer_parts import Attention, FeedForward, PlaceEmbedding


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
        rows = torch.cat(weights, dim=1).unbind(dim=1)
        return torch.stack([rows[query] for query in self.token_order], dim=1)  # a list as index makes a GPU wait


def _with(first: Tensor, second: Tensor | None, dim: int = 1) -> Tensor:
    return first if second is None else torch.cat([first, second], dim=dim)


def _without_autocast(device: str) -> AbstractContextManager:
    """Autocast would undo the float32 of what it runs around; not every device has one."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
