"""
What LinVT is compared with: simpler ways to condense a video, and LinVT with one part of it off.

Each is a module that stands where the video tokenizer stands. These exist to be measured; nothing else uses them.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..configuration_linvt import square_grid
from ..video_tokenizer import VideoTokenizerOutput


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


def middle_frame(tokens: Tensor) -> Tensor:
    return tokens[:, tokens.shape[1] // 2]


def mean_over_frames(tokens: Tensor) -> Tensor:
    return tokens.mean(dim=1)


def all_frames(tokens: Tensor) -> Tensor:
    return tokens.flatten(1, 2)


def uniform_pooling(steps: int, side: int) -> Callable[[Tensor], Tensor]:
    """Average over equal cells: `steps` stretches of time, `side` x `side` parts of the picture."""

    def pool(tokens: Tensor) -> Tensor:
        rows, columns = square_grid(tokens.shape[2])
        volume = rearrange(tokens, "b t (h w) d -> b d t h w", h=rows, w=columns)
        return rearrange(F.adaptive_avg_pool3d(volume, (steps, side, side)), "b d t h w -> b (t h w) d")

    return pool


def some_frames(count: int) -> Callable[[Tensor], Tensor]:
    """All tokens of `count` evenly spaced frames."""

    def take(tokens: Tensor) -> Tensor:
        frames = tokens.shape[1]
        index = [(2 * i + 1) * frames // (2 * count) for i in range(count)]
        return tokens[:, index].flatten(1, 2)

    return take
