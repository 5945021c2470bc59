"""A long video's tokens as they come, some frames at a time, in memory that does not grow with the video."""

import torch
from torch import Tensor

from .token_refiner import Dropped, VideoTokens, stretch_of
from .token_scorer import change_of, novelty, windows_of
from .video_tokenizer import LinearVideoTokenizer, everywhere, grid_places, normalise_times

# Of the tokens that are stored, a half goes to the best of each of so many equal stretches of time (ours).
_STRETCHES = 32


class RunningTokens:
    """
    What `LinearVideoTokenizer.refine` gives, of frames that come a few at a time.

    A video of more tokens than `config.num_stored_tokens` keeps, of what has come so far, the most significant of no
    question in particular. What is dropped goes into averages.

    Args:
        num_frames: T. frame_times: [T] seconds, or None. grid: rows and columns of a frame's tokens.
    """

    def __init__(
        self,
        tokenizer: LinearVideoTokenizer,
        num_frames: int,
        frame_times: Tensor | None,
        grid: tuple[int, int],
    ):
        self.tokenizer, self.config = tokenizer, tokenizer.config
        self.places, device = grid[0] * grid[1], tokenizer.device
        times = None if frame_times is None else frame_times.to(device)[None]
        self.times = normalise_times(times, None, 1, num_frames, device)  # [1, T]
        self.grid = grid_places(self.places, grid, device)  # [N, 2]
        self.windows = windows_of(num_frames, self.places, self.config.score_window)
        self.most = min(num_frames * self.places, self.config.num_stored_tokens)
        self.tokens: VideoTokens | None = None  # room for `most`, of which `stored` are there
        self.stored, self.scores = 0, None  # [1, most], of no question and without novelty, whose scale changes
        self.sums: list[Tensor] | None = None  # of what is dropped, over stretches of time
        # Frames `first` to `seen`, of a window that is not complete: V and x, [1, t, N, .], and change, [1, t, N].
        self.seen = self.first = 0
        self.waiting: tuple[Tensor, Tensor, Tensor] | None = None
        self.before = None

    @torch.no_grad()
    def add(self, visual_tokens: Tensor) -> None:
        """The next frames, [t, N, D]. Raises `ValueError` where that is more than there should be."""
        if self.seen + len(visual_tokens) > self.times.shape[1]:
            raise ValueError(f"{self.times.shape[1]} frames were promised, and more came.")
        values = visual_tokens[None]
        x = self.tokenizer.scorer.look(values)
        change = change_of(x, before=self.before)
        self.before = x[:, -1]
        come = (values, x, change)
        if self.waiting is None:
            self.waiting = tuple(part.new_empty(1, self.windows[0].stop, *part.shape[2:]) for part in come)
        done = 0
        while done < len(visual_tokens):
            count = min(len(visual_tokens) - done, self.windows[0].stop - self.seen)
            for kept, part in zip(self.waiting, come, strict=True):
                kept[:, self.seen - self.first :][:, :count] = part[:, done : done + count]
            done, self.seen = done + count, self.seen + count
            if self.seen == self.windows[0].stop:
                self._finish_window()

    def _finish_window(self) -> None:
        window = self.windows.pop(0)
        inside = slice(0, window.stop - window.start)
        own = slice(window.first - window.start, window.last - window.start)
        values, x, change = self.waiting
        times = self.times[:, window.start : window.stop]
        features = self.tokenizer.scorer.compare_window(x[:, inside], None, times, self.grid)[:, own]
        where = everywhere(self.times[:, window.first : window.last], self.grid)
        index = torch.arange(window.first * self.places, window.last * self.places, device=where.device)[None]
        change = change[:, own].flatten(1)
        self._store(
            VideoTokens(
                values=values[:, own].flatten(1, 2),
                features=features.flatten(1, 2),
                change=change,
                largest=change.amax(dim=1),
                index=index,
                where=where.flatten(1, 2),
                mask=None,
                places=self.places,
            )
        )
        if not self.windows:
            self.waiting = None
            return
        self.first = self.windows[0].start
        shared = slice(self.first - window.start, window.stop - window.start)
        for kept in self.waiting:
            kept[:, : window.stop - self.first] = kept[:, shared].clone()

    # ---- the running set ----

    def _store(self, new: VideoTokens) -> None:
        if self.tokens is None and not self.windows and new.values.shape[1] == self.most:  # a video of one window
            self.tokens = new
            return
        scorer, text = self.tokenizer.scorer, self.tokenizer.question(1, None, None)[0]
        scores = scorer(new.features, torch.zeros_like(new.change), text, None)[1]  # [1, K], of no question
        if self.tokens is None:
            self.tokens = VideoTokens(
                *(value.new_empty(1, self.most, *value.shape[2:]) for value in (new.values, new.features, new.change)),
                new.largest,
                *(value.new_empty(1, self.most, *value.shape[2:]) for value in (new.index, new.where)),
                mask=None,
                places=self.places,
            )
            self.scores = scores.new_empty(1, self.most)
        tokens, count = self.tokens, scores.shape[1]
        tokens.largest = torch.maximum(tokens.largest, new.largest)
        if self.stored + count <= self.most:
            entering, slots = slice(None), slice(self.stored, self.stored + count)
            self.stored += count
        else:
            entering, slots = self._make_room(new, scores)
        for name in ("values", "features", "change", "index", "where"):
            getattr(tokens, name)[0, slots] = getattr(new, name)[0, entering]
        self.scores[0, slots] = scores[0, entering]

    def _make_room(self, new: VideoTokens, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the new tokens stay, and into which slots they go; all others go into the averages."""
        tokens, stored = self.tokens, slice(0, self.stored)
        change = torch.cat([tokens.change[:, stored], new.change], dim=1)
        scores = torch.cat([self.scores[:, stored], scores], dim=1)
        scores = scores + self.tokenizer.scorer.novelty_gain.float() * novelty(change, tokens.largest)
        times = torch.cat([tokens.where[:, stored, 0], new.where[..., 0]], dim=1)
        stay = best_of_each(scores[0], stretch_of(times[0], _STRETCHES), self.most)
        old, fresh = stay[: self.stored], stay[self.stored :]
        if self.config.num_remainder_tokens:
            weights, stretches = scores.sigmoid(), stretch_of(times, self.config.num_remainder_tokens)
            self._drop(tokens, ~old, weights[0, : self.stored], stretches[0, : self.stored])
            self._drop(new, ~fresh, weights[0, self.stored :], stretches[0, self.stored :])
        free = torch.arange(self.stored, self.most, device=stay.device)
        slots = torch.cat([(~old).nonzero()[:, 0], free])
        self.stored = self.most
        return fresh.nonzero()[:, 0], slots

    def _drop(self, tokens: VideoTokens, which: Tensor, weights: Tensor, stretches: Tensor) -> None:
        """Adds tokens, of which those in `which` [K] go, to the sums of their stretches of time."""
        gone = which.nonzero()[:, 0]
        stretch = torch.arange(self.config.num_remainder_tokens, device=gone.device)
        member = stretches[gone] == stretch[:, None]  # [R, K]
        share = member * weights[gone]
        sums = [share.sum(dim=1, keepdim=True), member.sum(dim=1, keepdim=True)]
        for value in (tokens.values, tokens.features, tokens.change[..., None], tokens.where):
            sums.append((share.to(value.dtype) @ value[0, gone]).float())
        self.sums = sums if self.sums is None else [old + more for old, more in zip(self.sums, sums, strict=True)]

    def finish(self) -> VideoTokens:
        """All frames are there. Raises `ValueError` if some are not."""
        if self.windows:
            raise ValueError(f"{self.times.shape[1]} frames were promised, and {self.seen} came.")
        tokens = self.tokens
        if self.sums is not None:
            weight, count, *sums = self.sums
            values, features, change, where = (part[None] / weight.clamp(min=1e-30) for part in sums)  # [1, R, .]
            tokens.dropped = Dropped(
                values.to(tokens.values.dtype),
                features.to(tokens.features.dtype),
                change[..., 0],
                where,
                count[None, :, 0],
            )
        return tokens


def best_of_each(scores: Tensor, stretch: Tensor, most: int) -> Tensor:
    """
    True for `most` of K tokens: half of them the best of each stretch of time, as many of each, and the best of all
    others. What comes later never brings back one that was left out, so this can be asked of a set that grows.
    """
    order = scores.argsort(descending=True)
    order = order[stretch[order].argsort(stable=True)]  # by stretches, in each the best first
    count = stretch.bincount(minlength=_STRETCHES)
    rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[stretch[order]]
    sure = torch.zeros_like(scores)
    sure[order] = (rank < most // (2 * _STRETCHES)).to(scores)
    chosen = (scores + sure * (scores.amax() - scores.amin() + 1)).topk(most).indices
    return torch.zeros_like(stretch, dtype=torch.bool).scatter(0, chosen, True)


__all__ = ["RunningTokens", "best_of_each"]
