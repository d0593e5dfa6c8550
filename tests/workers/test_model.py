"""A Llama's logits equal transformers', over chunks and decodes of a paged cache, at every rank count."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from octavo.errors import CheckpointError, InvalidArgumentError
from octavo.kernels.ops import Operations
from octavo.workers.model_loader import load_model
from octavo.workers.parallel import TensorParallel
from octavo.workers.weights import DummyWeights, SafetensorsWeights, Shard
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {},
    "fewer kv heads than ranks": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd head_dim": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "hidden_size": 48},
    "vocabulary that no rank count divides": {"vocab_size": 101},
    "one layer": {"num_hidden_layers": 1},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn rope": {"rope_scaling": YARN},
    "yarn rope, not truncated": {"rope_scaling": YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}},
    "yarn rope, mscale": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn rope, attention factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
}  # fmt: skip

# Tokens of each step, by sequence: a chunk, then decodes; chunks only, across block borders; one whole prompt.
SCHEDULE = [[20] + [1] * 7, [5, 11, 13, 8, 9, 14], [31]]
# Logits have a standard deviation near 1.5; sums in another order (fused projections, ranks) move them by some 1e-6.
TOLERANCE = {"rtol": 0, "atol": 5e-5}


def random_tokens(vocab_size: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def transformers_logits(path, tokens):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in tokens]


def load(path, tp, load_format="safetensors", dtype=torch.float32, max_model_len=256):
    return load_model(path, load_format, dtype, tp, max_model_len, seed=0)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, make_llama, run_ranks, paged_sequences):
    path = make_llama(**MODELS[name])
    vocab_size = MODELS[name].get("vocab_size", 128)
    tokens = random_tokens(vocab_size, [sum(steps) for steps in SCHEDULE])
    expected = transformers_logits(path, tokens)

    def run(tp):
        return paged_sequences(load(path, tp), tokens).run(SCHEDULE)

    for size in (1, 2, 4):
        ranks = run_ranks(size, run)
        for index, logits in enumerate(expected):
            whole = torch.cat([rank[index] for rank in ranks], dim=-1)
            torch.testing.assert_close(whole[:, :vocab_size], logits, **TOLERANCE)
            assert (whole[:, vocab_size:] == -torch.inf).all()


def test_sums_in_halves_change_nothing(make_llama, run_ranks, paged_sequences, monkeypatch):
    path = make_llama()
    tokens = random_tokens(128, [sum(steps) for steps in SCHEDULE])

    def run(tp):
        return paged_sequences(load(path, tp), tokens).run(SCHEDULE)

    whole = run_ranks(2, run)
    monkeypatch.setattr("octavo.workers.parallel._HALVES_BYTES", 1024)  # four tokens
    for rank, halves in enumerate(run_ranks(2, run)):
        for logits, expected in zip(halves, whole[rank], strict=True):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


class OnePlaceForShares:
    """Memory of ranks that sum nothing in it themselves: it has one place for the share that is summed next."""

    def __init__(self) -> None:
        self.place = torch.empty(1 << 20)

    def takes(self, tensor):
        return False

    takes_norm = takes_keys = takes

    def input_buffer(self, num_rows, width, dtype):
        return self.place[: num_rows * width].view(num_rows, width)


def test_halves_that_are_summed_at_once_lie_apart(make_llama, run_ranks, paged_sequences, monkeypatch):
    path = make_llama()
    tokens = random_tokens(128, [sum(steps) for steps in SCHEDULE])
    # These products write to the place they are given.
    monkeypatch.setattr("octavo.workers.models.llama.operations_for", lambda device: Operations())
    monkeypatch.setattr("octavo.workers.parallel._HALVES_BYTES", 1024)

    def run(tp):
        return paged_sequences(load(path, tp), tokens).run(SCHEDULE)

    expected = run_ranks(2, run)
    shared = run_ranks(2, lambda tp: run(replace(tp, symmetric_memory=OnePlaceForShares())))
    for rank, sequences in enumerate(shared):
        for logits, own in zip(sequences, expected[rank], strict=True):
            torch.testing.assert_close(logits, own, rtol=0, atol=1e-5)


def test_dynamic_rope_beyond_the_context_equals_transformers_token_by_token(make_llama, paged_sequences):
    path = make_llama(max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    tokens = random_tokens(128, [40])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected, cache = [], None
    with torch.inference_mode():
        for ids in torch.tensor(tokens).split([16] + [1] * 24, dim=1):
            out = model(ids, past_key_values=cache, use_cache=True)
            expected.append(out.logits[0])
            cache = out.past_key_values
    sequences = paged_sequences(load(path, TensorParallel(0, 1, CPU)), tokens)
    torch.testing.assert_close(sequences.run([[16] + [1] * 24])[0], torch.cat(expected), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_transformers(dtype, make_llama, paged_sequences):
    path = make_llama()
    tokens = random_tokens(128, [31])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(tokens)).logits[0].float()
    logits = paged_sequences(load(path, TensorParallel(0, 1, CPU), dtype=dtype), tokens).run([[31]])[0]
    assert logits.dtype == dtype
    # Two roundings of some ten layers' outputs: about 16 units in the last place of logits of 1.5.
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=32 * 1.5 * torch.finfo(dtype).eps)


class CountingWeights:
    """Weights that note how many elements of each tensor were asked for."""

    def __init__(self, weights) -> None:
        self._weights, self.num_elements = weights, Counter()

    def read(self, name, shard=None):
        tensor = self._weights.read(name, shard)
        self.num_elements[name] += tensor.numel()
        return tensor


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_each_rank_reads_only_its_slices(num_kv_heads, make_llama):
    path = make_llama(num_key_value_heads=num_kv_heads)
    with SafetensorsWeights(path, CPU) as weights:
        for rank in range(4):
            counting = CountingWeights(weights)
            model = load(path, TensorParallel(rank, 4, CPU), load_format="dummy")
            model.load_weights(counting)
            shapes = model.tensor_shapes(model.config)
            assert set(counting.num_elements) == set(shapes)
            for name, shape in shapes.items():
                size = torch.Size(shape).numel()
                # Fewer KV heads than ranks: each rank has one head.
                ranks = min(4, num_kv_heads) if "k_proj" in name or "v_proj" in name else 4
                assert counting.num_elements[name] == (size if "norm" in name else size // ranks), name


def test_safetensors_slices_are_those_of_the_tensor(make_llama):
    with SafetensorsWeights(make_llama(), CPU) as weights:
        name = "model.layers.1.mlp.down_proj.weight"
        whole = weights.read(name)
        torch.testing.assert_close(weights.read(name, Shard(0, 3, 9)), whole[3:9], rtol=0, atol=0)
        torch.testing.assert_close(weights.read(name, Shard(1, 32, 64)), whole[:, 32:64], rtol=0, atol=0)
        with pytest.raises(CheckpointError, match=r"has no tensor lm_head\.bias"):
            weights.read("lm_head.bias")


def test_an_indexed_checkpoint_gives_the_same_logits(make_llama, tmp_path, paged_sequences):
    path = make_llama()
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = random_tokens(128, [10])
    single, indexed = (
        paged_sequences(load(source, TensorParallel(0, 1, CPU)), tokens).run([[10]])[0] for source in (path, tmp_path)
    )
    torch.testing.assert_close(indexed, single, rtol=0, atol=0)


def test_dummy_weights_make_the_same_model_at_any_rank_count(make_llama, run_ranks, paged_sequences):
    path = make_llama()
    tokens = random_tokens(128, [12])

    def run(tp):
        return paged_sequences(load(path, tp, load_format="dummy"), tokens).run([[12]])[0]

    alone = run_ranks(1, run)[0]
    assert alone.std() > 0
    torch.testing.assert_close(torch.cat(run_ranks(4, run), dim=-1), alone, rtol=0, atol=1e-6)


def test_dummy_weights_differ_by_name_and_seed():
    shapes = {"a.weight": (4, 5), "b.weight": (4, 5), "norm.weight": (5,), "a.bias": (5,)}
    one, two = (DummyWeights(shapes, seed, torch.float32, CPU) for seed in (1, 2))
    assert not torch.equal(one.read("a.weight"), one.read("b.weight"))
    assert not torch.equal(one.read("a.weight"), two.read("a.weight"))
    assert torch.equal(one.read("norm.weight"), torch.ones(5))
    assert torch.equal(one.read("a.bias"), torch.zeros(5))


def test_dummy_load_needs_no_weight_file(make_llama, tmp_path):
    (tmp_path / "config.json").write_bytes((make_llama() / "config.json").read_bytes())
    assert load(tmp_path, TensorParallel(0, 1, CPU), load_format="dummy").num_kv_heads == 4
    with pytest.raises(CheckpointError, match="download its weights"):
        load(tmp_path, TensorParallel(0, 1, CPU))


def test_loading_refuses_unknown_formats_and_rank_counts(make_llama):
    with pytest.raises(InvalidArgumentError, match="load_format 'pickle' is unknown; use one of safetensors, dummy"):
        load(make_llama(), TensorParallel(0, 1, CPU), load_format="pickle")
    with pytest.raises(InvalidArgumentError, match="tensor_parallel_size 3 does not split the model") as error:
        load(make_llama(), TensorParallel(0, 3, CPU), load_format="dummy")
    assert error.value.field == "tensor_parallel_size"
    assert str(error.value).endswith("sizes that do: 1, 2, 4, 8")
