"""TTA, the text-conditioned token aggregator: queries read the kept tokens and the question, then weigh the tokens."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_linvt import LinVTConfig
from .token_refiner import Candidates, PoolingWindows, at_all_scales
from .tokenizer_parts import Attention, FeedForward, PlaceEmbedding


class AggregationLayer(GradientCheckpointingLayer):
    """One layer of TTA: queries read each other, the visual tokens of their own scale, and the question."""

    def __init__(self, config: LinVTConfig):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.visual_norm, self.visual_attention = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.text_norm, self.text_attention = nn.LayerNorm(config.bottleneck_size), Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, queries: Tensor, text: Tensor, text_mask: Tensor | None, visual: Tensor, seen: Tensor) -> Tensor:
        x = self.self_norm(queries)
        queries = queries + self.self_attention(x, x)
        queries = queries + self.visual_attention(self.visual_norm(queries), visual, seen)
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
        visual = at_all_scales(kept, rest, windows)  # of K = W + W / 2 + W / 4 + R in all
        seen = self._seen(visual.mask, [window.count for window in windows])  # [B, M, K]
        queries = self.queries + self.embed_center(self.centers, self.queries.dtype)
        queries = queries.expand(len(kept.features), -1, -1)  # [B, M, d]
        for layer in self.layers:
            queries = layer(queries, text, text_mask, visual.features, seen)

        queries = self.to_query(self.query_norm(queries)) / math.sqrt(queries.shape[-1])
        keys = self.to_key(visual.features)
        with _without_autocast(queries.device.type):
            return self._spread(self._weigh(queries.float(), keys.float(), seen, visual), windows)

    def _seen(self, mask: Tensor, counts: list[int]) -> Tensor:
        """What each query may read: of the K what is of its own scale, and the averages, which are of none."""
        averages = mask.shape[1] - sum(counts)
        scale, block = (
            torch.cat([torch.full((count,), number, device=mask.device) for number, count in enumerate(sizes)])
            for sizes in (self.config.queries_per_scale, [*counts, averages])
        )
        own = (scale[:, None] == block) | (block == len(counts))
        return own & mask[:, None]

    def _weigh(self, queries: Tensor, keys: Tensor, seen: Tensor, visual: Candidates) -> Tensor:
        """Linear aggregation: one softmax over the tokens for each query, in float32, and nothing after it but V."""
        offset = visual.places[:, None] - self.centers.float()[:, None]  # [B, M, K, 3]
        logits = queries @ keys.transpose(1, 2)  # [B, M, K]
        logits = logits - 0.5 * (offset / self.log_widths.float().exp()[:, None]).square().sum(dim=-1)
        # The gradient path of the scores: a token that SSS finds insignificant weighs less (ours).
        logits = logits + visual.log_significance[:, None]
        return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(dim=-1)

    def _spread(self, share: Tensor, windows: list[PoolingWindows]) -> Tensor:
        """Weights of windows and averages [B, M, K] to those of tokens and averages [B, M, k + R], in token order."""
        counts = [window.count for window in windows]
        *blocks, averages = share.split([*counts, share.shape[2] - sum(counts)], dim=2)
        weights = sum(window.spread(block) for window, block in zip(windows, blocks, strict=True))
        rows = torch.cat([weights, averages], dim=2).unbind(dim=1)
        return torch.stack([rows[query] for query in self.token_order], dim=1)  # a list as index makes a GPU wait


def _without_autocast(device: str) -> AbstractContextManager:
    """Autocast would undo the float32 of what it runs around; not every device has one."""
    # Asked of torch, this would end a compiled graph in torch 2.11.
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
