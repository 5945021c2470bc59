"""
What LinVT is compared with: simpler ways to condense a video, and LinVT with one part of it off.

Each stands where the video tokenizer stands, or hooks into it. These exist to be measured; nothing else uses them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..configuration_linvt import square_grid
from ..modeling_linvt import LinVTForConditionalGeneration
from ..processing_linvt import LinVTProcessor
from ..video_tokenizer import LinearVideoTokenizer, VideoTokenizerOutput
from .world import SHORT

TOKENS = 16 * SHORT  # of a short video, in all


@dataclass(frozen=True)
class Row:
    """
    One row of the table.

    Args:
        condense: [B, T, N, D] -> [B, tokens, D], a way that learns nothing; None for LinVT.
        tokens: how many tokens of a short video the language model reads.
        settings: of `LinVTConfig`, over those of the recipe.
        change: what is done to a fresh LinVT.
        frozen: whether LinVT keeps its initial weights.
    """

    name: str
    condense: Callable[[Tensor], Tensor] | None = None
    tokens: int = 32
    settings: dict = field(default_factory=dict)
    change: Callable[[LinearVideoTokenizer], None] | None = None
    frozen: bool = False

    def apply(self, model: LinVTForConditionalGeneration, processor: LinVTProcessor) -> None:
        """Makes a freshly wrapped model one of this row."""
        if self.condense is not None:
            model.video_tokenizer = Condenser(self.condense)
            processor.num_video_tokens = self.tokens
        elif self.change is not None:
            self.change(model.video_tokenizer)

    @property
    def learns(self) -> bool:
        return self.condense is None and not self.frozen


# ---- ways that learn nothing ----


class Condenser(nn.Module):
    """A way to condense a video that learns nothing: `condense` maps [B, T, N, D] to [B, tokens, D]."""

    def __init__(self, condense: Callable[[Tensor], Tensor]):
        super().__init__()
        self.condense = condense

    def forward(self, visual_tokens: Tensor, *, grid=None, **_) -> VideoTokenizerOutput:
        scores = visual_tokens.new_zeros(visual_tokens.shape[:3])
        return VideoTokenizerOutput(self.condense(visual_tokens), scores=scores)


def nothing(tokens: Tensor) -> Tensor:
    return tokens[:, 0, :0]


def mean_over_frames(tokens: Tensor) -> Tensor:
    return tokens.mean(dim=1)


def uniform_pooling(steps: int, side: int) -> Callable[[Tensor], Tensor]:
    """Average over equal cells: `steps` stretches of time, `side` x `side` parts of the picture."""

    def pool(tokens: Tensor) -> Tensor:
        rows, columns = square_grid(tokens.shape[2])
        volume = rearrange(tokens, "b t (h w) d -> b d t h w", h=rows, w=columns)
        return rearrange(F.adaptive_avg_pool3d(volume, (steps, side, side)), "b d t h w -> b (t h w) d")

    return pool


def some_frames(count: int) -> Callable[[Tensor], Tensor]:
    """All tokens of `count` evenly spaced frames; of all, if there are no more."""

    def take(tokens: Tensor) -> Tensor:
        frames = tokens.shape[1]
        index = [(2 * i + 1) * frames // (2 * count) for i in range(count)]
        return tokens[:, index].flatten(1, 2)

    return take


# ---- LinVT with one part off ----


def without_score_gradient(tokenizer: LinearVideoTokenizer) -> None:
    """The scores select, and nothing tells them what to select."""
    tokenizer.scorer.register_forward_hook(lambda module, inputs, output: (output[0], output[1].detach()))


def without_temporal_positions(tokenizer: LinearVideoTokenizer) -> None:
    """Every token lies at the video's middle; only the order of the tokens is left of time."""

    def everything(module, inputs, named):  # stretches of what top-k leaves out are of frames, then, not of seconds
        return inputs, {**named, "frame_times": None}

    def scorer(module, inputs):
        times, dtype = inputs
        return torch.full_like(times, 0.5), dtype

    def aggregator(module, inputs):
        return tuple(_at_one_time(part) if hasattr(part, "places") else part for part in inputs)

    tokenizer.register_forward_pre_hook(everything, with_kwargs=True)
    tokenizer.scorer.embed_time.register_forward_pre_hook(scorer)
    tokenizer.aggregator.register_forward_pre_hook(aggregator)


def _at_one_time(candidates):
    places = candidates.places.clone()
    places[..., 0] = 0.5
    return replace(candidates, places=places)


def values_through_projection(tokenizer: LinearVideoTokenizer) -> None:
    """
    What attention usually does: values and output go through maps of their own, so what comes out is no combination of
    the image-LLM's tokens. As the weights are the same for all channels, both maps can follow the sum. They start as
    the identity, so that this row starts where LinVT does.
    """
    size = tokenizer.config.hidden_size
    tokenizer.project_values = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size))
    for layer in tokenizer.project_values:
        nn.init.eye_(layer.weight)
    nn.init.zeros_(tokenizer.project_values[1].bias)

    def project(module, inputs, output):
        output.video_tokens = module.project_values(output.video_tokens)
        return output

    tokenizer.register_forward_hook(project)


def without_novelty(tokenizer: LinearVideoTokenizer) -> None:
    """Scores do not start from what is new, and cannot learn to."""
    gain = torch.zeros_like(tokenizer.scorer.novelty_gain.detach())
    del tokenizer.scorer.novelty_gain
    tokenizer.scorer.register_buffer("novelty_gain", gain)


@torch.no_grad()
def random_queries(tokenizer: LinearVideoTokenizer) -> None:
    """Queries begin nowhere in particular: anywhere as centre, and so wide that all tokens weigh alike."""
    tokenizer.aggregator.centers.uniform_()
    tokenizer.aggregator.log_widths.fill_(2.0)


# On long videos some rows are not what they are on short ones: "all frames' tokens" are those of 16 frames there,
# evenly spaced, and "no top-k" keeps 256 of 4,096.
FIXED = (
    Row("question only", nothing, 0),
    Row("one middle frame", some_frames(1), 16),
    Row("mean over frames", mean_over_frames, 16),
    Row("uniform pooling", uniform_pooling(8, 2), 32),
    Row("all frames' tokens", some_frames(SHORT), TOKENS),
)
LINVT = Row("LinVT")
NO_TOP_K = Row("no top-k", settings={"num_selected_tokens": TOKENS})
PARTS_OFF = (
    Row("LinVT untrained", frozen=True),
    Row("no text", settings={"text_conditioning": False}),
    NO_TOP_K,
    Row("no multi-scale", settings={"pooling_scales": [1], "queries_per_scale": [32]}),
    Row("no score gradient", change=without_score_gradient),
    Row("no temporal positions", change=without_temporal_positions),
    Row("values through a projection", change=values_through_projection),
    Row("random query initialisation", change=random_queries),
)
# How few tokens top-k may keep: as LinVT has it here, the recipe's TOKENS // 4 among them, and plain: what is not
# kept is lost, and nothing but what was learned says what to keep. Both have the scores' gradient path.
KEPT = (TOKENS, TOKENS // 2, TOKENS // 4, TOKENS // 8, TOKENS // 16)
PLAIN = {"num_remainder_tokens": 0, "text_in_scores": False}


def _keeping(name: str, k: int, settings: dict | None = None, change=None) -> Row:
    return Row(f"{name}, k = {k}", settings={"num_selected_tokens": k, **(settings or {})}, change=change)


CURVES = {
    "LinVT": (
        NO_TOP_K,
        _keeping("LinVT", TOKENS // 2),
        LINVT,
        _keeping("LinVT", TOKENS // 8),
        _keeping("LinVT", TOKENS // 16),
    ),
    "plain top-k": tuple(_keeping("plain top-k", k, PLAIN, without_novelty) for k in KEPT),
}
TABLE = (*FIXED, LINVT, *PARTS_OFF)
# What is compared on every image-LLM.
EACH_BASE = (
    *(row for row in FIXED if row.name in ("one middle frame", "uniform pooling", "all frames' tokens")),
    LINVT,
)
ROWS = tuple({row.name: row for row in (*TABLE, *CURVES["LinVT"], *CURVES["plain top-k"])}.values())
