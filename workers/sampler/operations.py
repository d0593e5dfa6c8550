"""The device work of the sampler, and the one place that chooses its implementation for a device.

`SamplerOperations` is the reference, in torch. Bias, bad words and logprobs are not here: they are the same everywhere.
"""

import torch

from .batch import SamplingBatch
from .draw import draw
from .penalties import Penalties, apply_penalties
from .vocab import VocabSlice


class SamplerOperations:
    """Operations on logits [n, vocab.size], this rank's slice of the vocabulary. Holds no state."""

    def penalise(
        self,
        logits: torch.Tensor,
        penalties: Penalties,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        vocab: VocabSlice,
    ) -> None:
        """As penalties.apply_penalties: in place, of float32 logits."""
        apply_penalties(logits, penalties, tokens, positions, vocab)

    def draw(
        self, logits: torch.Tensor, batch: SamplingBatch, positions: torch.Tensor, vocab: VocabSlice
    ) -> torch.Tensor:
        """As draw.draw: the sampled tokens, [n] int64, the same on all ranks, -1 where no score is finite.

        Logits of any dtype are used up.
        """
        return draw(logits, batch.random, positions, vocab)


def sampler_operations_for(device: torch.device) -> SamplerOperations:
    """The implementation for `device`: Triton kernels on a GPU, numba's on a CPU."""
    if device.type != "cuda":
        from .cpu_operations import CpuSamplerOperations  # as below, a subclass

        return CpuSamplerOperations()
    from .triton_operations import TritonSamplerOperations  # Triton comes with a CUDA build of torch

    return TritonSamplerOperations()
