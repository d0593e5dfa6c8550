"""Thresholds of min_p, top_k and top_p against sorting, on any kind of scores, alone and over two ranks."""

import threading

import numpy as np
import pytest
import torch
from octavo.kernels.truncation import Cuts, find_kept

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGEST = np.finfo(np.float32).max


@pytest.fixture
def lock_kernels(monkeypatch):
    """Triton's interpreter runs kernels of one thread at a time; a GPU needs nothing."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import GridExecutor

        lock, launch = threading.Lock(), GridExecutor.__call__

        def locked(self, *args, **kwargs):
            with lock:
                return launch(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", locked)


def tensor(values, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def same(values: torch.Tensor) -> torch.Tensor:
    """What a collective is on one rank."""
    return values


def thresholds_of(logits: torch.Tensor, temperature: list[float], **cuts) -> np.ndarray:
    columns = {"log_min_p": None, "top_k": None, "top_p": None} | cuts
    return find_kept(logits, tensor(temperature), Cuts(**columns), same, same).thresholds.cpu().numpy()


def scores_of(logits: torch.Tensor, temperature: list[float]) -> np.ndarray:
    scores = logits.float().cpu().numpy() * (np.float32(1) / np.array(temperature, dtype=np.float32))[:, None]
    return np.nan_to_num(scores, nan=-np.inf, posinf=LARGEST, neginf=-np.inf)


def top_p_threshold(scores: np.ndarray, p: float) -> float:
    descending = -np.sort(-scores.astype(np.float64))
    mass = np.exp(descending - descending[0])
    return descending[np.searchsorted(mass.cumsum() / mass.sum(), p)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 60, 2048, 7001])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of NaN
def test_top_k_is_the_kth_greatest_score(size, dtype):
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(size)).mul_(3)
    logits[1] = logits[1].round()  # ties
    logits[2, size // 2 :] = -torch.inf
    logits[3, ::2] = torch.nan
    logits[4] = torch.where(logits[4] > 0, 0.0, -0.0)
    logits, temperature = logits.to(DEVICE, dtype), [1.0, 0.3, 0.7, 2.0, 1.0, 0.0]
    k = [1, min(5, size), size, min(2, size), (size + 1) // 2, 0]
    found = thresholds_of(logits, temperature, top_k=tensor(k, torch.int64))
    descending = -np.sort(-scores_of(logits[:5], temperature[:5]))
    assert found[:5].tolist() == [row[count - 1] for row, count in zip(descending, k[:5], strict=True)]
    assert found[5] == -np.inf


@pytest.mark.parametrize("size", [1, 33, 5000])
def test_top_p_is_the_least_score_that_the_mass_needs(size):
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).mul_(4).to(DEVICE)
    logits[1] = logits[1].round()
    logits[2, 1:] = -torch.inf
    temperature, p = [1.0, 0.5, 3.0, 1.3, 0.0], [0.9, 0.37, 0.999, 0.013, 1.0]
    found = thresholds_of(logits, temperature, top_p=tensor(p))
    scores = scores_of(logits[:4], temperature[:4])
    assert found[:4].tolist() == [top_p_threshold(row, share) for row, share in zip(scores, p[:4], strict=True)]
    assert found[4] == -np.inf


def test_each_cut_sees_what_the_one_before_left():
    logits = tensor(np.log([[0.4, 0.3, 0.2, 0.06, 0.04]] * 4))
    found = thresholds_of(
        logits,
        [1.0] * 4,
        log_min_p=tensor([np.log(0.12), np.log(0.12), -np.inf, -np.inf]),  # of 0.4: drops 0.04
        top_k=tensor([3, 0, 3, 0], torch.int64),  # drops 0.06
        top_p=tensor([0.77, 1.0, 0.7, 0.75]),  # of 0.9: 0.4 + 0.3 is 0.777 of it
    )
    kept = [set(np.flatnonzero(logits[0].cpu().numpy() >= threshold)) for threshold in found]
    assert kept == [{0, 1}, {0, 1, 2, 3}, {0, 1}, {0, 1, 2}]


def test_a_cut_that_cuts_less_changes_nothing():
    logits = tensor(np.log([[0.5, 0.3, 0.1, 0.06, 0.04]]))
    cuts = {"log_min_p": tensor([np.log(0.5)]), "top_k": tensor([4], torch.int64), "top_p": tensor([0.99])}
    assert thresholds_of(logits, [1.0], **cuts)[0] == pytest.approx(np.log(0.3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_of_one_broken_value_keep_what_there_is(value):
    cuts = {"log_min_p": tensor([-1.0]), "top_k": tensor([3], torch.int64), "top_p": tensor([0.5])}
    found = thresholds_of(torch.full((1, 3000), value, device=DEVICE), [0.5], **cuts)
    assert found.tolist() == [LARGEST if value == torch.inf else -np.inf]


def test_ranks_find_what_one_finds(lock_kernels):
    logits = torch.randn(3, 6000, generator=torch.Generator().manual_seed(1)).mul_(4).to(DEVICE)
    temperature = tensor([0.5, 1.0, 1.5])
    cuts = Cuts(tensor([-9.0, -np.inf, -8.0]), tensor([50, 0, 900], torch.int64), tensor([0.8, 0.9, 1.0]))
    barrier, exchanged, found = threading.Barrier(2, timeout=60), [None, None], [None, None]

    def run(rank: int) -> None:
        def exchange(combine):
            def reduce(values: torch.Tensor) -> torch.Tensor:
                exchanged[rank] = values
                barrier.wait()
                combined = combine(*exchanged)
                barrier.wait()
                return combined

            return reduce

        part = logits[:, :2500] if rank else logits[:, 2500:]
        found[rank] = find_kept(part, temperature, cuts, exchange(torch.add), exchange(torch.maximum)).thresholds

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = find_kept(logits, temperature, cuts, same, same).thresholds
    assert torch.equal(found[0], whole)
    assert torch.equal(found[1], whole)
