"""
Which moments and places of a video an answer was read from.

The language model reads a video as M tokens, and each is a weighted mean of the video's own visual tokens: `tokens ==
W @ visual_tokens`. So W, the weights that were used and no estimate of them, says where every token comes from. How
much the answer depends on each token is another matter, and an estimate: see `importance`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .chat_templates import with_videos
from .choice_scores import log_likelihoods


@dataclass(frozen=True, eq=False)
class Explanation:
    """
    Of one question about one video.

    weights: W, [M, T, N] float32, non-negative, of sum 1 over T and N: what each place of each frame is to token m.
        Of a video with more tokens than are stored, the others have 0 here, and their weight is in `averaged`.
    scores: [T, N] float32, the significance that the tokenizer gave each place before the selection, as logits.
    importance: [M] float32, non-negative, of sum 1: how much the answer depends on each token.
    importance_by: "uniform", every token alike, or "gradient": the size of gradient times token, summed over the
        token's width, of the answer's mean log-probability.
    scales: [M], the kernel of the pooling that each token's query reads.
    grid: rows and columns of a frame's places, N = rows * columns.
    times: [T] seconds of the frames; None where nobody knows. duration: of the video, in seconds.
    averaged: [M, R] float32, what the averages of tokens that are not stored weigh, one of each of R equal stretches
        of time; None where all are stored.
    """

    question: str
    answer: str
    weights: Tensor
    scores: Tensor
    importance: Tensor
    importance_by: Literal["uniform", "gradient"]
    scales: Tensor
    grid: tuple[int, int]
    times: Tensor | None = None
    duration: float | None = None
    averaged: Tensor | None = None

    def heat(self, **which: int) -> Tensor:
        """
        How much each place of each frame weighs, [T, rows, columns] of sum 1, less what is `averaged`.

        Args:
            token, scale: of one token alone, or of those of one scale; by default over all tokens, by importance.
        """
        return torch.einsum("m,mtn->tn", self._share(**which), self.weights).unflatten(1, self.grid)

    def heat_averaged(self, **which: int) -> Tensor | None:
        """The same of the averages of tokens that are not stored, [R]; None where all are."""
        return None if self.averaged is None else self._share(**which) @ self.averaged

    def _share(self, *, token: int | None = None, scale: int | None = None) -> Tensor:
        """[M], of sum 1."""
        if token is not None and scale is not None:
            raise ValueError("Give token or scale, not both.")
        share = self.importance
        if token is not None:
            if not 0 <= token < len(share):
                raise ValueError(f"token is {token}, and the tokens are 0 to {len(share) - 1}.")
            share = torch.zeros_like(share).index_fill(0, torch.tensor([token]), 1.0)
        if scale is not None:
            if scale not in self.scales:
                raise ValueError(f"scale is {scale}, and the scales are {sorted(set(self.scales.tolist()))}.")
            share = share * (self.scales == scale)
        if share.sum() <= 0:  # no token of the scale matters to the answer: then all alike
            share = (self.scales == scale).float()
        return share / share.sum()

    def frames(self, **which: int) -> Tensor:
        """The same of whole frames, [T]."""
        return self.heat(**which).sum(dim=(1, 2))

    def heaviest(self, count: int = 5, **which: int) -> list[int]:
        """The frames that weigh most, by number, the heaviest first."""
        return self.frames(**which).argsort(descending=True, stable=True)[:count].tolist()


def explain(
    pipeline,
    video: Any,
    question: str,
    *,
    answer: str | None = None,
    importance: Literal["uniform", "gradient"] = "uniform",
    num_frames: int | None = None,
    fps: float | None = None,
    videos_kwargs: dict | None = None,
    **generate_kwargs,
) -> Explanation:
    """See `VideoQuestionAnsweringPipeline.explain`."""
    if importance not in ("uniform", "gradient"):
        raise ValueError(f"importance is {importance!r}; it is 'uniform' or 'gradient'.")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("A question has no words, so there is no answer to explain; ask something.")
    model, processor = pipeline.model, pipeline.processor
    reading = {"num_frames": num_frames, "fps": fps, "videos_kwargs": videos_kwargs}
    encoded = model.encode_video(processor.stream(video, chunk_size=model.config.frames_per_chunk, **reading))
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    messages = with_videos([{"role": "user", "content": content}], iter([encoded]))
    features = dict(pipeline._ensure_tensor_on_device(pipeline._features(messages), pipeline.device))
    inputs = model.take_video_inputs(features)
    with torch.no_grad():
        found = model.get_video_features(**inputs, output_weights=True)
        tokens = found.pooler_output  # [1, M, D]
        if answer is None:
            sequences = model.generate(**features, video_embeds=tokens, **pipeline.limited(generate_kwargs))
            new = getattr(sequences, "sequences", sequences)[:, features["input_ids"].shape[1] :]
            answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    count = tokens.shape[1]
    share = torch.full((count,), 1 / count)
    if importance == "gradient":
        share = _by_gradient(pipeline, features, tokens, answer)
    kernels = torch.tensor(model.config.pooling_scales).repeat_interleave(torch.tensor(model.config.queries_per_scale))
    (averaged,) = found.dropped_weights
    return Explanation(
        question=question,
        answer=answer,
        weights=found.weights[0].float().cpu(),
        scores=found.scores[0].float().cpu(),
        importance=share,
        importance_by=importance,
        scales=kernels[torch.tensor(model.config.token_order())],
        grid=tuple(encoded.grid),
        times=encoded.times,
        duration=encoded.duration,
        averaged=None if averaged is None else averaged.float().cpu(),
    )


def _by_gradient(pipeline, features: dict, tokens: Tensor, answer: str) -> Tensor:
    """[M], of sum 1."""
    if not answer.strip():
        raise ValueError("The answer has no words, and so there is nothing whose gradient could tell importance.")
    tokens = tokens.detach().requires_grad_()
    with torch.enable_grad():
        likelihood = log_likelihoods(
            pipeline.model, pipeline.tokenizer, {**features, "video_embeds": tokens}, [answer]
        )[0]
        (gradient,) = torch.autograd.grad(likelihood, tokens)
    size = (gradient.float() * tokens.detach().float()).sum(dim=-1)[0].abs().cpu()  # [M]
    return size / size.sum() if size.sum() > 0 else torch.full_like(size, 1 / len(size))


__all__ = ["Explanation", "explain"]
