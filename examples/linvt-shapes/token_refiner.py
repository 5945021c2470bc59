"""
SVR, the spatio-temporal visual token refiner, after its scoring: keeps the best tokens, averages what is left, and
averages neighbours.

Every part gives weights or indices; the tokens themselves stay untouched.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

_DROPPED = "dropped."  # before the names of a `Dropped`'s tensors


@dataclass
class VideoTokens:
    """
    Videos before a question is asked: their tokens one after another, and what SSS makes of them.

    values: [B, K, D], the image-LLM's own.
    features: [B, K, d].
    change: [B, K] float32, how much each differs from the one at its place in the frame before.
    largest: [B] float32, the largest change of the whole video.
    index: [B, K], frame * N + place; of a batch with padding, frames count from a video's first real one.
    where: [B, K, 3] float32, time, height and width, as fractions.
    mask: [B, K], True for real tokens; None where all are.
    dropped: what became of the others, where a video has more tokens than are stored; None where none are missing.
    places: N.
    """

    values: Tensor
    features: Tensor
    change: Tensor
    largest: Tensor
    index: Tensor
    where: Tensor
    mask: Tensor | None
    places: int
    dropped: "Dropped | None" = None

    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors, by names that tell where they belong."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.dropped is not None:
            found |= {f"{_DROPPED}{f.name}": getattr(self.dropped, f.name) for f in fields(self.dropped)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], places: int) -> "VideoTokens":
        """From what `tensors` gave."""
        own = {name: value for name, value in tensors.items() if not name.startswith(_DROPPED)}
        rest = {name.removeprefix(_DROPPED): value for name, value in tensors.items() if name.startswith(_DROPPED)}
        return cls(**{"mask": None, **own}, places=places, dropped=Dropped(**rest) if rest else None)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "VideoTokens":
        """On another device; `dtype` is for values and features."""
        cast = dict.fromkeys(("values", "features", f"{_DROPPED}values", f"{_DROPPED}features"), dtype)
        moved = {name: value.to(device, cast.get(name)) for name, value in self.tensors().items()}
        return self.of_tensors(moved, self.places)


@dataclass
class Dropped:
    """
    Averages of tokens that are not stored, each over a stretch of time and weighed by significance.

    values [B, R, D], features [B, R, d], change [B, R], where [B, R, 3]; count [B, R], how many tokens that was.
    """

    values: Tensor
    features: Tensor
    change: Tensor
    where: Tensor
    count: Tensor


@dataclass
class Candidates:
    """Tokens that queries may weigh: features [B, K, d], mask [B, K], places [B, K, 3] and significance [B, K]."""

    features: Tensor
    mask: Tensor
    places: Tensor
    log_significance: Tensor


def number_tokens(frame_mask: Tensor | None, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """`index` and `mask`, [B, T * N], of `VideoTokens`, for tokens of shape [B, T, N]; frame_mask [B, T]."""
    batch, frames, places = shape
    if frame_mask is None:
        frame = torch.arange(frames, device=device).expand(batch, -1)
    else:
        frame = frame_mask.cumsum(dim=1) - 1  # counted over real frames: padding on either side is harmless
    index = (frame[..., None] * places + torch.arange(places, device=device)).flatten(1)
    return index, None if frame_mask is None else repeat(frame_mask, "b t -> b (t n)", n=places)


def select_top_k(scores: Tensor, index: Tensor, places: int, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """
    The k best tokens over all frames and places together, in the video's order.

    Args:
        scores, index: [B, K], see `VideoTokens`. mask: [B, K], True for real tokens.
    Returns which they are, [B, min(k, K)] of the K, and a mask that is False where a video has fewer tokens.
    """
    # Ties, and the near-ties of an untrained scorer, are broken by a sequence that spreads evenly over time and over
    # each frame (Roberts' R2, in 16 bits), so that a fresh model samples every moment and every place (ours).
    spread = (index // places * 49471 + index % places * 37345) % 65536
    ranking = scores.detach() + 0.01 / 65536 * spread
    if mask is not None:
        ranking = ranking.masked_fill(~mask, -torch.inf)
    chosen = ranking.topk(min(k, scores.shape[1])).indices
    order = index.gather(1, chosen)
    if mask is None:
        return chosen.gather(1, order.argsort(dim=1)), torch.ones_like(chosen, dtype=torch.bool)
    real = mask.gather(1, chosen)
    last = torch.where(real, order, torch.iinfo(order.dtype).max).argsort(dim=1)  # padding, whatever its place
    return chosen.gather(1, last), real.gather(1, last)


class Remainder:
    """
    What top-k leaves out, averaged over equal stretches of time (ours): a plain top-k throws it away, and with it what
    a scorer has not yet learned to look for.

    `share` [B, R, K] holds what each token contributes to its stretch, the significant ones more, so that a token's
    score learns here too; `mask` [B, R] is True for stretches of which something is left.

    Args:
        log_significance: [B, K]. index, kept: [B, k], what `select_top_k` gave. count: R.
        dropped: averages of tokens that are not even stored, as SSS has them for the question; one counts as so many
            tokens as it is the average of.
    """

    def __init__(
        self,
        log_significance: Tensor,
        tokens: VideoTokens,
        index: Tensor,
        kept: Tensor,
        count: int,
        dropped: Candidates | None = None,
    ):
        left = torch.ones_like(log_significance, dtype=torch.bool) if tokens.mask is None else tokens.mask
        left = left.scatter(1, index, left.gather(1, index) & ~kept)
        stretch = stretch_of(tokens.where[..., 0], count)  # [B, K]
        member = (stretch[:, None] == torch.arange(count, device=stretch.device)[:, None]) & left[:, None]  # [B, R, K]
        nothing = torch.finfo(torch.float32).min
        logits = log_significance[:, None].masked_fill(~member, nothing)
        number = member.sum(dim=-1)
        self.dropped = dropped
        if dropped is not None:
            each = tokens.dropped.count
            together = dropped.log_significance + each.clamp(min=1).log()
            logits = torch.cat([logits, together.masked_fill(~dropped.mask, nothing)[..., None]], dim=-1)
            member = torch.cat([member, dropped.mask[..., None]], dim=-1)
            number = number + each
        share = logits.softmax(dim=-1) * member
        self.share, self.dropped_share = share[..., : left.shape[1]], share[..., left.shape[1] :]  # [B, R, 0 or 1]
        self.mask = member.any(dim=-1)
        self.log_significance = logits.logsumexp(dim=-1) - number.clamp(min=1).log()

    def pool(self, x: Tensor, dropped: Tensor | None) -> Tensor:  # [B, K, c], [B, R, c] -> [B, R, c]
        pooled = self.share.to(x.dtype) @ x
        return pooled if dropped is None else pooled + self.dropped_share.to(x.dtype) * dropped.to(x.dtype)

    def candidates(self, tokens: VideoTokens, features: Tensor) -> Candidates:
        """The averages, for queries to weigh; `features` as SSS has them for the question."""
        dropped = self.dropped
        return Candidates(
            self.pool(features, dropped and dropped.features),
            self.mask,
            self.pool(tokens.where, dropped and dropped.places),
            self.log_significance,
        )


def stretch_of(times: Tensor, count: int) -> Tensor:
    """The number of the stretch of time, out of `count` equal ones, that times in 0..1 lie in."""
    return (times * count).long().clamp(max=count - 1)


class PoolingWindows:
    """
    MTP at one scale: average pooling of neighbouring tokens, as weights that go both ways.

    `share` [B, W, s] holds what each token contributes to its window of s; the last window may be shorter, and padding
    contributes nothing. `mask` [B, W] is True for windows that hold a token, and `count` is W.
    """

    def __init__(self, token_mask: Tensor, kernel: int):
        self.length = token_mask.shape[1]
        self.missing = -self.length % kernel  # of the last window
        windows = rearrange(self._whole(token_mask[..., None]), "b (w s) 1 -> b w s", s=kernel)
        count = windows.sum(dim=-1, keepdim=True)
        self.mask = count[..., 0] > 0
        self.count = self.mask.shape[1]
        self.share = windows / count.clamp(min=1)
        self.kernel = kernel

    def _windows(self, x: Tensor) -> Tensor:  # [B, k, c] -> [B, W, s, c]
        return rearrange(self._whole(x), "b (w s) c -> b w s c", s=self.kernel)

    def _whole(self, x: Tensor) -> Tensor:  # [B, k, c] -> [B, W * s, c]
        return F.pad(x, (0, 0, 0, self.missing)) if self.missing else x

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


def at_all_scales(kept: Candidates, rest: Candidates | None, windows: list[PoolingWindows]) -> Candidates:
    """
    MTP: the kept tokens as every scale has them, one scale after another, and after them the averages of the rest,
    which are as coarse as they should be.
    """
    parts = [
        (window.pool(kept.features), window.mask, window.pool(kept.places), window.pool_log(kept.log_significance))
        for window in windows
    ]
    if rest is not None:
        parts.append((rest.features, rest.mask, rest.places, rest.log_significance))
    return Candidates(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
