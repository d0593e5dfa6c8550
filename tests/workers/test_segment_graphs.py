"""Segments replayed, here by running them again into the same memory: logits stay those of eager steps.

The graphs themselves run in tests/workers/test_graph_recorder.py and tests/system/test_exact_tokens.py, on a GPU.
"""

from contextlib import nullcontext

import pytest
import torch
from octavo.workers.graph_recorder import Recording
from octavo.workers.model_loader import load_model
from octavo.workers.parallel import TensorParallel
from octavo.workers.segment_graphs import SegmentGraphs, bucket_sizes
from octavo.workers.weights import SafetensorsWeights

CPU = torch.device("cpu")
# Padding changes the order of a product's sums on a CPU.
TOLERANCE = {"rtol": 0, "atol": 5e-5}
# Tokens of each step, by sequence: chunks and decodes that fill no bucket, one that fills one, one above all of 48.
SCHEDULE = [[20] + [1] * 6, [5, 16, 13, 8, 9, 14], [11, 15, 40]]


class Rerun:
    """A recorder whose replays run the function again. What the function before did not make is spoilt: on a GPU later
    recordings may have taken its memory."""

    def __init__(self) -> None:
        self.sizes = []  # of each recording
        self.num_replays = 0
        self.replayed_sizes = set()
        self.slow_size = 0  # a bucket that takes longer than any other
        self._results = []
        self._last = -1

    def session(self):
        return nullcontext()

    def record(self, function):
        outputs, index = function(), len(self._results)
        self._results.append(outputs)
        self.sizes.append(len(outputs[0]))

        def replay():
            for other, results in enumerate(self._results):
                if other not in (index, self._last):
                    for tensor in results:
                        tensor.fill_(torch.nan)
            self._last = index
            self.num_replays += 1
            self.replayed_sizes.add(len(outputs[0]))
            for place, result in zip(outputs, function(), strict=True):
                place.copy_(result)

        return Recording(replay, outputs), outputs

    def time_ms(self, recordings, num_times):
        return 9.0 if len(recordings[0].outputs[0]) == self.slow_size else 1.0


class Replaying:
    """A model whose steps run through graphs."""

    def __init__(self, model, max_num_tokens, recorder, tp, sizes=None) -> None:
        self._model, self.graphs = model, SegmentGraphs(model, max_num_tokens, recorder, tp, sizes)

    def __getattr__(self, name):
        return getattr(self._model, name)

    def forward(self, token_ids, batch, kv_cache):
        return self._model.forward(token_ids, batch, kv_cache, self.graphs.runner(len(token_ids)))


def load(path, tp):
    return load_model(path, "safetensors", torch.float32, tp, 256, seed=0)[0]


def random_tokens(lengths, lowest=0):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(lowest, 128, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("max_num_tokens", [1, 16, 17, 96, 1000, 1024, 1025, 2048, 2049, 8192])
def test_every_step_up_to_the_largest_bucket_has_one_that_is_not_much_larger(max_num_tokens):
    sizes = bucket_sizes(max_num_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_tokens, 2048)
    for num_tokens in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= num_tokens)
        assert size - num_tokens < max(16, min(num_tokens, 64), num_tokens // 8)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_replayed_steps_equal_eager_ones(num_layers, make_llama, run_ranks, paged_sequences):
    path, tokens = make_llama(num_hidden_layers=num_layers), random_tokens([sum(steps) for steps in SCHEDULE])

    def run(tp):
        model, recorder = load(path, tp), Rerun()
        eager = paged_sequences(model, tokens).run(SCHEDULE)
        replaying = Replaying(model, 48, recorder, tp)
        sequences = paged_sequences(replaying, tokens)
        replaying.graphs.capture(sequences.cache)
        return eager, sequences.run(SCHEDULE), recorder

    for size in (1, 2):
        for eager, replayed, recorder in run_ranks(size, run):
            torch.testing.assert_close(replayed, eager, **TOLERANCE)
            # All steps but that of 1 + 13 + 40 tokens.
            assert recorder.num_replays == (num_layers + 1) * (len(SCHEDULE[0]) - 1)
            sizes = [48] * (num_layers + 1) + [32] * (num_layers + 1) + [16] * (num_layers + 1)
            assert recorder.sizes == sizes, "the largest bucket makes the memory that the others share"


@pytest.mark.parametrize(("slow_size", "replayed_sizes"), [(0, {16, 32, 48}), (32, {16, 48}), (48, {16, 32, 48})])
def test_a_bucket_that_a_larger_one_outruns_is_not_used(slow_size, replayed_sizes, make_llama, paged_sequences):
    tp, recorder = TensorParallel(0, 1, CPU), Rerun()
    recorder.slow_size = slow_size
    model = load(make_llama(), tp)
    tokens = random_tokens([9, 30, 40])
    replaying = Replaying(model, 48, recorder, tp)
    sequences = paged_sequences(replaying, tokens)
    replaying.graphs.capture(sequences.cache)
    for index, sequence in enumerate(tokens):
        expected = paged_sequences(model, tokens).step({index: len(sequence)})[index]
        torch.testing.assert_close(sequences.step({index: len(sequence)})[index], expected, **TOLERANCE)
    assert recorder.replayed_sizes == replayed_sizes


def test_buckets_that_are_known_are_all_there_is(make_llama, paged_sequences, monkeypatch):
    tp, recorder = TensorParallel(0, 1, CPU), Rerun()
    monkeypatch.setattr(Rerun, "time_ms", None)  # nothing is timed
    model = load(make_llama(), tp)
    tokens = random_tokens([9, 30])
    replaying = Replaying(model, 48, recorder, tp, sizes=[32, 48])
    sequences = paged_sequences(replaying, tokens)
    replaying.graphs.capture(sequences.cache)
    assert replaying.graphs.sizes == [32, 48]
    for index, sequence in enumerate(tokens):
        sequences.step({index: len(sequence)})
    assert recorder.replayed_sizes == {32}


class NanToken:
    """Weights with a token whose embedding is NaN."""

    def __init__(self, weights, token_id) -> None:
        self._weights, self._token_id = weights, token_id

    def read(self, name, shard=None):
        tensor = self._weights.read(name, shard).clone()
        if name == "model.embed_tokens.weight":
            tensor[self._token_id] = torch.nan
        return tensor


def test_nan_in_padding_reaches_no_real_row(make_llama, paged_sequences):
    path = make_llama()
    model = load(path, TensorParallel(0, 1, CPU))
    with SafetensorsWeights(path, CPU) as weights:
        model.load_weights(NanToken(weights, 0))
    # The first sequence leaves NaN behind in the rows that the second one's step only pads.
    tokens = [[0] * 31, *random_tokens([17], lowest=1)]
    expected = paged_sequences(model, tokens).step({1: 17})[1]
    replaying = Replaying(model, 32, Rerun(), TensorParallel(0, 1, CPU))
    sequences = paged_sequences(replaying, tokens)
    # Capture leaves a key and a value of the NaN token in the first cell.
    replaying.graphs.capture(paged_sequences(model, tokens).cache)
    assert sequences.step({0: 31})[0].isnan().all()
    assert expected.isfinite().all()
    torch.testing.assert_close(sequences.step({1: 17})[1], expected, **TOLERANCE)
