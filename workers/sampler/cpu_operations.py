"""The sampler's operations on a CPU: noise and argmax of all rows in one pass of a kernel."""

import torch

from ...kernels.cpu_launch import LIKE, KernelThreads
from ...kernels.cpu_sampling import find_best
from .batch import SamplingBatch
from .draw import tempered
from .operations import SamplerOperations
from .vocab import VocabSlice


class CpuSamplerOperations(SamplerOperations):
    """Penalties and truncation are torch's, as in the reference."""

    def __init__(self) -> None:
        self._threads = KernelThreads()

    def draw(
        self, logits: torch.Tensor, batch: SamplingBatch, positions: torch.Tensor, vocab: VocabSlice
    ) -> torch.Tensor:
        columns = batch.columns
        temperature = columns.temperature
        if logits.dtype not in LIKE:
            logits = logits.float()
        if batch.is_cut and (random := batch.random) is not None:
            logits = logits.float()
            logits.index_copy_(0, random.rows, tempered(logits[random.rows], random, vocab))
            temperature = temperature.sign()  # of what draws, all is done but the noise
        best = find_best(self._threads, logits.contiguous(), temperature, columns.seeds, positions, vocab.start)
        return vocab.take_best(*best)
