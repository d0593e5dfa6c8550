"""The generator against known answers, its noise against the distribution it is to have."""

import math

import pytest
import torch
from octavo.workers.parallel import TensorParallel
from octavo.workers.sampler.gumbel import gumbel_noise
from octavo.workers.sampler.philox import philox
from octavo.workers.sampler.vocab import VocabSlice

CPU = torch.device("cpu")
ALONE = TensorParallel(0, 1, CPU)

# philox4x32-10 of Random123's kat_vectors: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert philox(words(counter), words(key)) == words(answer)


def seeds_of(values: list[int]) -> torch.Tensor:
    return torch.tensor([[value & 0xFFFFFFFF, value >> 32] for value in values])


def noise(seeds: list[int], positions: list[int], start: int = 0, size: int = 64) -> torch.Tensor:
    return gumbel_noise(seeds_of(seeds), torch.tensor(positions), VocabSlice(ALONE, start, size, size))


def test_noise_depends_on_seed_position_and_token_alone():
    whole = noise([5, 6, 5], [9, 9, 10])
    assert torch.equal(noise([5], [9]), whole[:1])
    # Any slice of the vocabulary, also one that splits a counter's four words.
    for start, size in ((0, 13), (13, 1), (14, 33), (47, 17)):
        assert torch.equal(noise([5, 6, 5], [9, 9, 10], start, size), whole[:, start : start + size])
    assert len({row.numpy().tobytes() for row in whole}) == 3
    assert not torch.equal(noise([5], [9]), noise([5 + 2**32], [9]))


def test_noise_is_standard_gumbel_and_finite():
    values = noise(list(range(500)), [3] * 500, size=400).double().flatten()
    assert torch.isfinite(values).all()
    # Mean: Euler's constant; variance: pi^2 / 6. 200,000 draws have a standard error of 0.003 and 0.008.
    assert abs(values.mean().item() - 0.5772) < 0.01
    assert abs(values.var().item() - math.pi**2 / 6) < 0.03
    for quantile in (0.01, 0.5, 0.99, 0.9999):
        below = (values < -math.log(-math.log(quantile))).double().mean().item()
        assert abs(below - quantile) < 4 * math.sqrt(quantile * (1 - quantile) / len(values))
