"""Which samples make a step, and how they fall into its batches."""

from collections.abc import Callable, Iterator, Sized

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[int]):
    """
    All samples in an order drawn anew every epoch, those of one optimizer step sorted by length, the longest first.

    So each batch of a step (several are accumulated, or on several processes) holds samples of like length, and less
    of it is padding. What a step learns is the same: its samples are drawn at random, and its loss is the mean over
    all their tokens. To sort over many steps would save more, but make steps of long answers alone.

    Args:
        data: its `lengths`, if it has any, are a number a sample, in any unit.
        step: samples an optimizer step, over all processes.
        epoch: asked when an epoch begins.
    """

    def __init__(self, data: Sized, step: int, seed: int, epoch: Callable[[], int]):
        self.data, self.step, self.seed, self.epoch = data, step, seed, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        # Of seed and epoch alone: all processes, and a run that is taken up again, draw alike.
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch())
        order = torch.randperm(len(self.data), generator=generator).tolist()
        lengths = getattr(self.data, "lengths", None)
        for start in range(0, len(order), self.step):
            samples = order[start : start + self.step]
            yield from samples if lengths is None else sorted(samples, key=lengths.__getitem__, reverse=True)


__all__ = ["StepSampler"]
