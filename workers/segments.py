"""The segments of a model's step: all between the attention of one layer and the next.

Segments work on each token by itself, so they depend on the number of tokens alone, and so may be replayed from CUDA
graphs, while attention, which knows the sequences, runs in between.
"""

from collections.abc import Callable
from typing import Protocol

import torch

# Takes and returns tensors whose first dimension is the step's tokens. The same object in each step.
Segment = Callable[..., tuple[torch.Tensor, ...]]


class SegmentRunner(Protocol):
    """Runs the segments of one step, in order."""

    def __call__(self, segment: Segment, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]: ...

    def input_of(self, segment: Segment) -> torch.Tensor | None:
        """Where the segment's first input is best written; None if that does not matter."""
        ...

    @property
    def token_ids(self) -> torch.Tensor | None:
        """Where the step's tokens are best written, [num_tokens] int32; None if that does not matter."""
        ...


class _RunNow:
    """As they are called."""

    def __call__(self, segment: Segment, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return segment(*inputs)

    def input_of(self, segment: Segment) -> None:
        del segment

    @property
    def token_ids(self) -> None:
        return None


run_now = _RunNow()
