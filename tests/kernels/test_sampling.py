"""Sampling against the CPU sampler's noise, and the generator's words themselves."""

import pytest
import torch
from octavo.kernels.sampling import candidate_keys, take_tokens
from octavo.kernels.scores import GROUP, Kept
from octavo.workers.parallel import TensorParallel
from octavo.workers.sampler.gumbel import gumbel_noise
from octavo.workers.sampler.vocab import VocabSlice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALONE = TensorParallel(0, 1, DEVICE)
# Scores here stay below 64. A GPU's quotient logit / temperature is within two units of the last place (2**-18 at 32 to
# 64), the two logarithms of the noise (below 23) each within a few units of 2**-20.
CLOSE = {"rtol": 0, "atol": 1.5e-5}
SEEDS = [0, 5, 2**32 + 5, 0x9E3779B97F4A7C15, 2**64 - 1]
POSITIONS = [0, 1, 1, 77777, 2**31 + 3]
# numpy's, in the interpreter: log(1 - u) / -u where 1 - u rounds to 1, which the kernel does not choose.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")


def seeds_of(values: list[int]) -> torch.Tensor:
    return torch.tensor([[value & 0xFFFFFFFF, value >> 32] for value in values], device=DEVICE)


def normal(num_rows: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(size))
    return logits.mul_(2).to(DEVICE, dtype)


def best_of(*args, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and token ids of the best candidates; their keys order as the pairs do."""
    best = candidate_keys(*args, **options).amax(dim=1)
    ordered = (best >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), 0xFFFFFFFF - (best & 0xFFFFFFFF)


def draw(
    logits: torch.Tensor, temperature: list[float], start: int = 0, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = len(logits)
    return best_of(
        logits,
        torch.tensor(temperature, device=DEVICE),
        seeds_of(SEEDS[:num_rows]),
        torch.tensor(POSITIONS[:num_rows], device=DEVICE),
        start,
        **options,
    )


def twin_scores(logits: torch.Tensor, temperature: list[float], start: int = 0) -> torch.Tensor:
    num_rows, size = logits.shape
    seeds, positions = seeds_of(SEEDS[:num_rows]), torch.tensor(POSITIONS[:num_rows], device=DEVICE)
    noise = gumbel_noise(seeds, positions, VocabSlice(ALONE, start, size, start + size))
    heat = torch.tensor(temperature, device=DEVICE)[:, None]
    return torch.where(heat > 0, logits.float() / heat + noise, logits.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("start", "size"), [(0, 1), (0, 7), (3, 2), (0, 1024), (1023, 1027), (4096, 2051), (50, 5000), (128_000, 300)]
)
def test_rows_of_all_kinds_against_the_twin(start, size, dtype):
    logits, temperature = normal(5, size, dtype), [1.0, 0.0, 0.7, 1.5, 0.25]
    scores, ids = draw(logits, temperature, start)
    expected, columns = twin_scores(logits, temperature, start).max(dim=-1)
    assert torch.equal(ids, columns + start)
    assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize("start", [0, 6, 131])
def test_every_token_has_the_noise_of_the_twin(start):
    """One row for each token, which alone is allowed: its score is its noise."""
    size = 61
    logits = torch.full((size, size), -torch.inf, device=DEVICE).fill_diagonal_(0.0)
    seeds, positions = seeds_of([SEEDS[3]] * size), torch.full((size,), 123456, device=DEVICE)
    scores, ids = best_of(logits, torch.ones(size, device=DEVICE), seeds, positions, start)
    assert torch.equal(ids, torch.arange(start, start + size, device=DEVICE))
    expected = gumbel_noise(seeds[:1], positions[:1], VocabSlice(ALONE, start, size, start + size))[0]
    torch.testing.assert_close(scores, expected, **CLOSE)


def test_the_extreme_words_of_the_generator_have_finite_noise():
    """The least and the greatest word that token 0 at position 0 draws with any seed below 2**26: 45 and 2**32 - 53."""
    seeds = seeds_of([19781057, 54414807])
    positions = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    scores, _ = best_of(torch.zeros(2, 1, device=DEVICE), torch.ones(2, device=DEVICE), seeds, positions, 0)
    expected = gumbel_noise(seeds, positions, VocabSlice(ALONE, 0, 1, 1))[:, 0]
    assert expected[0] > 18
    assert expected[1] < -2.8
    torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize("enough_programs", [1, 10, 20])
def test_programs_of_several_blocks_give_the_same(enough_programs):
    """Five rows of eleven blocks each, in programs of eleven (sixteen at most), five and two blocks."""
    logits, temperature = normal(5, 10 * 1024 + 3), [1.0, 0.0, 0.7, 1.5, 0.25]
    expected = draw(logits, temperature, 2)
    torch.testing.assert_close(draw(logits, temperature, 2, enough_programs=enough_programs), expected, rtol=0, atol=0)


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(3, 3000, device=DEVICE)
    logits[1, [1500, 1501, 2999]] = 1.0
    logits[2, 1023:1026] = torch.inf
    scores, ids = draw(logits, [0.0] * 3, start=10)
    assert ids.tolist() == [10, 1510, 1033]
    assert scores.tolist() == [0.0, 1.0, torch.inf]


def test_padding_behind_the_vocabulary_is_never_drawn():
    logits = torch.full((5, 2100), -torch.inf, device=DEVICE)
    logits[:, 2047] = -1e30
    _, ids = draw(logits, [0.0, 1.0, 2.0, 0.5, 1.0])
    assert ids.tolist() == [2047] * 5


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_rows_without_a_candidate_give_a_valid_token(value):
    scores, ids = draw(torch.full((2, 2500), value, device=DEVICE), [0.0, 1.0], start=7)
    assert ids.tolist() == [7, 7]
    assert scores.tolist() == [-torch.inf] * 2


def test_nan_loses_and_infinity_wins():
    logits = normal(2, 1500)
    logits[:, 3] = torch.nan
    logits[:, [1200, 1300]] = torch.inf
    scores, ids = draw(logits, [0.0, 1.0])
    assert ids.tolist() == [1200, 1200]
    assert scores.tolist() == [torch.inf, torch.finfo(torch.float32).max]


def test_rows_of_a_wider_tensor():
    wide = normal(5, 2000)
    narrow = wide[:, :1501]
    expected = draw(narrow.contiguous(), [1.0, 0.0, 0.7, 1.5, 0.25])
    torch.testing.assert_close(draw(narrow, [1.0, 0.0, 0.7, 1.5, 0.25]), expected, rtol=0, atol=0)


def test_no_rows():
    scores, ids = best_of(
        torch.empty(0, 8, device=DEVICE),
        torch.empty(0, device=DEVICE),
        torch.empty(0, 2, dtype=torch.int64, device=DEVICE),
        torch.empty(0, dtype=torch.int64, device=DEVICE),
        0,
    )
    assert (scores.shape, ids.shape) == ((0,), (0,))


@pytest.mark.parametrize("start", [0, 130])
def test_only_scores_from_the_threshold_on_are_drawn(start):
    logits, temperature = normal(5, 5001), [1.0, 0.0, 0.7, 1.5, 0.25]
    heat = torch.tensor(temperature, device=DEVICE)[:, None]
    quotients = logits * heat.clamp(min=0.25).reciprocal()
    # Row 0 keeps one token, row 2 a hundred, row 3 all; row 1 is greedy, for which no threshold counts.
    thresholds = torch.stack([quotients[i].sort(descending=True).values[n] for i, n in enumerate([0, 0, 99, 5000, 9])])
    thresholds[1] = torch.inf
    groups = torch.nn.functional.pad(quotients, (0, -5001 % GROUP), value=-torch.inf).view(5, -1, GROUP)
    cut = torch.where((heat > 0) & (quotients < thresholds[:, None]), -torch.inf, logits)
    expected = draw(cut, temperature, start)
    found = draw(logits, temperature, start, kept=Kept(thresholds, groups.amax(dim=2)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_parts", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_greatest_key_gives_the_token(num_parts, dtype):
    generator = torch.Generator().manual_seed(num_parts)
    scores = torch.randint(-0x7F800000, 0x7F7FFFFF, (4, num_parts), generator=generator)  # finite ones, as integers
    keys = (scores << 32 | torch.randint(2**32, (4, num_parts), generator=generator)).to(DEVICE)
    keys[:, -1] |= 0xFFFFFFF0  # else ids are far beyond any vocabulary
    keys[0] = (1 << 62) | (0xFFFFFFFF - 77)  # behind the vocabulary's end
    keys[1] = -1 - (5 << 33)  # as a key of a negative score
    best = keys.amax(dim=1)
    expected = (0xFFFFFFFF - (best & 0xFFFFFFFF)).clamp(max=76)
    out = torch.full((4,), -1, dtype=dtype, device=DEVICE)
    take_tokens(keys, 77, out)
    assert out.tolist() == expected.tolist()
    table, cells = torch.full((9,), -1, dtype=torch.int32, device=DEVICE), torch.tensor([8, 2, 4, 0], device=DEVICE)
    take_tokens(keys, 77, out.fill_(-1), table, cells)
    assert out.tolist() == expected.tolist() == table[cells].tolist()
    assert table[[1, 3, 5, 6, 7]].tolist() == [-1] * 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_row_without_a_finite_score_gives_no_token_but_the_table_one_that_exists(dtype):
    logits = normal(5, 1500)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[3, 4] = torch.inf
    logits[4, :-1] = torch.nan
    for temperature in (0.0, 0.7):
        heat = torch.full((5,), temperature, device=DEVICE)
        keys = candidate_keys(logits, heat, seeds_of(SEEDS), torch.tensor(POSITIONS, device=DEVICE), 0)
        out = torch.zeros(5, dtype=dtype, device=DEVICE)
        table = torch.full((6,), -7, dtype=torch.int32, device=DEVICE)
        take_tokens(keys, 1500, out, table, torch.arange(5, device=DEVICE))
        assert out.tolist() == [int(table[0]), -1, -1, -1, 1499]
        assert table.tolist()[1:] == [0, 0, 4, 1499, -7]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"logits": torch.ones(2, 8, dtype=torch.float64)}, "float64"),
        ({"logits": torch.ones(8, 2).t()}, r"strides \(1, 2\)"),
        ({"logits": torch.ones(2, 0)}, "not 0 from 0"),
        ({"vocab_start": -1}, "8 from -1"),
        ({"vocab_start": 2**24}, "supported"),
        ({"temperature": torch.ones(2, 1)}, "temperature must be"),
        ({"seeds": torch.ones(2, 2)}, "seeds must be"),
        ({"positions": torch.ones(3, dtype=torch.int64)}, "positions must be"),
        ({"kept": Kept(torch.ones(2, 1), torch.ones(2, 1))}, "thresholds must be"),
        ({"kept": Kept(torch.ones(2), torch.ones(2, 8))}, "maxima must be"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(changes, problem):
    arguments = {
        "logits": torch.ones(2, 8),
        "temperature": torch.ones(2),
        "seeds": torch.ones(2, 2, dtype=torch.int64),
        "positions": torch.ones(2, dtype=torch.int64),
        "vocab_start": 0,
    }
    with pytest.raises(ValueError, match=problem):
        candidate_keys(**(arguments | changes))
