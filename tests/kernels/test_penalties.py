"""Penalties against the torch sampler's: the same bits, for tokens in any order and any slice of the vocabulary."""

import numpy as np
import pytest
import torch
from octavo.kernels.penalties import penalise
from octavo.workers.parallel import TensorParallel
from octavo.workers.sampler.penalties import Penalties, apply_penalties
from octavo.workers.sampler.vocab import VocabSlice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("start", "size"), [(0, 700), (100, 37), (4096, 500)])
@pytest.mark.parametrize("width", [1, 50, 2500])
def test_penalised_logits_are_the_twins(start, size, width):
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(5, size, generator=generator).to(DEVICE)
    rows = torch.tensor([3, 0, 4], device=DEVICE)
    # Half of the tokens are of a few ids, which repeat; the rest may be outside the slice.
    few = torch.randint(start, start + 9, (3, width), generator=generator)
    wide = torch.randint(max(start - 50, 0), start + size + 50, (3, width), generator=generator)
    tokens = torch.where(torch.rand(3, width, generator=generator) < 0.5, few, wide).int().to(DEVICE)
    positions = torch.tensor([width, 0, 0, width - 1, 1], device=DEVICE)
    penalties = Penalties(
        host_rows=np.array([3, 0, 4]),
        rows=rows,
        num_prompt=torch.tensor([width // 3, 1, 0], device=DEVICE),
        repetition=torch.tensor([[1.3], [0.7], [1.0]], device=DEVICE),
        presence=torch.tensor([[0.5], [0.0], [-1.1]], device=DEVICE),
        frequency=torch.tensor([[0.3], [-0.7], [0.0]], device=DEVICE),
    )
    expected = logits.clone()
    vocab = VocabSlice(TensorParallel(0, 1, DEVICE), start, size, start + size)
    apply_penalties(expected, penalties, tokens, positions, vocab)
    penalise(
        logits,
        rows,
        tokens,
        positions,
        penalties.num_prompt,
        penalties.repetition,
        penalties.presence,
        penalties.frequency,
        start,
    )
    assert torch.equal(logits, expected)
