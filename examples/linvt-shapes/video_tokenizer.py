"""
The Linear Video Tokenizer of LinVT (arXiv 2412.05185): SVR (SSS, top-k, MTP) and TTA.

A video's visual tokens V, [T frames, N tokens, D], become M tokens, each a convex combination of V's own. Everything
that is learned works in a bottleneck of width d and ends in weights; the values those weights mix are V, untouched:

    SVR, spatio-temporal visual token refiner: token_scorer.py and token_refiner.py
        SignificanceScorer    SSS: scores every token in its frame and across frames, for the question (that is ours)
        select_top_k          keeps the k best of all frames and places, in the video's order
        Remainder             averages what top-k leaves out, so that nothing is lost for good (ours)
        PoolingWindows        MTP: averages neighbours at several scales
    TTA, text-conditioned token aggregator: token_aggregator.py
        TextConditionedAggregator    queries read themselves, the kept tokens and the question, then weigh the tokens
    out = W @ V, where the rows of W are non-negative and sum to 1
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from .configuration_linvt import LinVTConfig, square_grid
from .token_aggregator import TextConditionedAggregator
from .token_refiner import Candidates, Remainder, VideoTokens, number_tokens, select_top_k
from .token_scorer import ScoreHead, SignificanceScorer, change_of, novelty
from .tokenizer_parts import QuestionReader


@dataclass
class VideoTokenizerOutput(ModelOutput):
    """
    video_tokens: [B, M, D], what the LLM reads.
    weights: [B, M, T * N], W of `video_tokens == weights @ visual_tokens`; only when asked for.
    dropped_weights: [B, M, R], what the averages of tokens that are not stored weigh, where there are any: then
        `video_tokens == weights @ stored + dropped_weights @ averages`.
    scores: [B, T, N] float32, the significance that SSS gave each token, as a logit; meaningless in padding frames.
    """

    video_tokens: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    dropped_weights: Tensor | None = None


class LinVTPreTrainedModel(PreTrainedModel):
    """What LinVT's modules share as transformers models: config, initialisation, attention backends."""

    config_class = LinVTConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinearVideoTokenizer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
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
        tokens = self.refine(visual_tokens, frame_mask, frame_times, grid)
        out = self.condense(tokens, text_embeds, text_mask, output_weights)
        out.scores = out.scores.view(visual_tokens.shape[:3])
        return out

    def refine(
        self,
        visual_tokens: Tensor,
        frame_mask: Tensor | None = None,
        frame_times: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> VideoTokens:
        """What can be done before there is a question; arguments as in `forward`."""
        batch, frames, places, _ = visual_tokens.shape
        device = visual_tokens.device
        frame_mask = None if frame_mask is None else frame_mask.bool()
        times = normalise_times(frame_times, frame_mask, batch, frames, device)  # [B, T]
        grid = grid_places(places, grid, device)  # [N, 2]
        x = self.scorer.look(visual_tokens)
        change = change_of(x.detach(), frame_mask)
        features = self.scorer.compare(x, frame_mask, times, grid)
        index, mask = number_tokens(frame_mask, visual_tokens.shape[:3], device)
        return VideoTokens(
            values=visual_tokens.flatten(1, 2),
            features=features.flatten(1, 2),
            change=change.flatten(1),
            largest=change.amax(dim=(1, 2)),
            index=index,
            where=everywhere(times, grid).flatten(1, 2),
            mask=mask,
            places=places,
        )

    def condense(
        self,
        tokens: VideoTokens,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        output_weights: bool = False,
    ) -> VideoTokenizerOutput:
        """
        What `refine` gave, for a question; other arguments as in `forward`. Here `scores` are [B, K], and `weights`
        [B, M, K]: of the tokens that `tokens` holds.
        """
        batch, count, _ = tokens.values.shape
        text, text_mask = self.question(batch, text_embeds, text_mask)  # [B, 1 + L, d]
        features, scores = self.scorer(tokens.features, novelty(tokens.change, tokens.largest), text, text_mask)
        kept_count, rest_count = self.config.num_selected_tokens, self.config.num_remainder_tokens
        index, mask = select_top_k(scores, tokens.index, tokens.places, tokens.mask, kept_count)  # [B, k]
        log_significance = F.logsigmoid(scores)
        kept = Candidates(take(features, index), mask, take(tokens.where, index), log_significance.gather(1, index))
        rest, remainder = None, None
        if rest_count and (index.shape[1] < count or tokens.dropped is not None):
            dropped = self._dropped(tokens, text, text_mask)
            remainder = Remainder(log_significance, tokens, index, mask, rest_count, dropped)
            rest = remainder.candidates(tokens, features)

        weights = self.aggregator(kept, rest, text, text_mask).to(tokens.values.dtype)  # [B, M, k + R]
        selected, averaged = weights.split([index.shape[1], weights.shape[2] - index.shape[1]], dim=2)
        video_tokens = selected @ take(tokens.values, index)
        if remainder is not None:
            video_tokens = video_tokens + averaged @ remainder.pool(
                tokens.values, tokens.dropped and tokens.dropped.values
            )
        weights = dropped_weights = None
        if output_weights:
            weights = _scatter(selected, index, count)
            if remainder is not None:
                weights = weights + averaged @ remainder.share.to(weights.dtype)
            if tokens.dropped is not None:
                dropped_weights = averaged * remainder.dropped_share[:, None, :, 0].to(weights.dtype)
        return VideoTokenizerOutput(
            video_tokens=video_tokens, weights=weights, scores=scores, dropped_weights=dropped_weights
        )

    def _dropped(self, tokens: VideoTokens, text: Tensor, text_mask: Tensor | None) -> Candidates | None:
        """The averages of what is not stored: SSS reads the question for them as for tokens."""
        if (dropped := tokens.dropped) is None:
            return None
        features, scores = self.scorer(dropped.features, novelty(dropped.change, tokens.largest), text, text_mask)
        return Candidates(features, dropped.count > 0, dropped.where, F.logsigmoid(scores))


def take(tokens: Tensor, index: Tensor) -> Tensor:  # [B, K, c], [B, k] -> [B, k, c]
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def grid_places(places: int, grid: tuple[int, int] | None, device: torch.device) -> Tensor:
    """The centres of a frame's tokens, height and width as fractions, [N, 2]."""
    rows, columns = grid or square_grid(places)
    if rows * columns != places:
        raise ValueError(f"grid {rows} x {columns} does not hold the {places} tokens of a frame.")
    return torch.cartesian_prod(*((torch.arange(side, device=device) + 0.5) / side for side in (rows, columns)))


def everywhere(times: Tensor, grid: Tensor) -> Tensor:  # [B, T], [N, 2] -> [B, T, N, 3]
    batch, frames = times.shape
    return torch.cat(
        [
            repeat(times, "b t -> b t n 1", n=len(grid)),
            repeat(grid, "n c -> b t n c", b=batch, t=frames),
        ],
        dim=-1,
    )


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
