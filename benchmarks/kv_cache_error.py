"""What a KV cache in FP8 changes in a model's logprobs: `python -m octavo.benchmarks.kv_cache_error MODEL`, on a GPU.

The logprob of each token after what came before it, in bfloat16 with a cache in bfloat16 and in FP8, against float32
and against each other: once with prompts in chunks, and once with the last tokens decoded one by one. Tokens are those
of a text, or random.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..kernels.batch import AttentionBatch
from ..workers.kv_cache import FP8, KVCache
from ..workers.model_config import ModelConfig
from ..workers.models.registry import Model, model_class, registered_architectures
from ..workers.parallel import TensorParallel
from ..workers.weights import DummyWeights, SafetensorsWeights

_DEVICE = torch.device("cuda", 0)
_BLOCK_SIZE = 16


def load(path: Path, dtype: torch.dtype, dummy: bool, num_layers: int | None) -> Model:
    """The model in `dtype`, its weights being bfloat16's in any case."""
    config = ModelConfig.from_directory(path, registered_architectures())
    if num_layers is not None:
        config = replace(config, num_layers=num_layers)
    cls = model_class(config.architecture)
    model = cls(config, TensorParallel(0, 1, _DEVICE), dtype, config.max_position_embeddings)
    if dummy:
        model.load_weights(DummyWeights(cls.tensor_shapes(config), 0, torch.bfloat16, _DEVICE))
        return model
    with SafetensorsWeights(path, _DEVICE) as weights:
        model.load_weights(weights)
    return model


def logprobs(model: Model, token_ids: Sequence[int], cache_dtype: torch.dtype, steps: Sequence[int]) -> torch.Tensor:
    """[num_tokens - 1] float32: of each token but the first. `steps`: how many tokens each step computes."""
    num_blocks = -(-len(token_ids) // _BLOCK_SIZE)
    cache = KVCache(
        num_layers=model.config.num_layers, num_blocks=num_blocks, block_size=_BLOCK_SIZE,
        num_kv_heads=model.num_kv_heads, head_dim=model.config.head_dim, dtype=cache_dtype, device=_DEVICE,
    )  # fmt: skip
    ids = torch.tensor(token_ids, device=_DEVICE)
    table = torch.arange(num_blocks, dtype=torch.int32, device=_DEVICE).unsqueeze(0)
    found, start = [], 0
    for count in steps:
        logits = model.logits(model.forward(ids[start : start + count], _one_row(start, count, table), cache))
        targets = ids[start + 1 : start + count + 1]
        distribution = logits[: len(targets), : model.config.vocab_size].float().log_softmax(-1)
        found.append(distribution.gather(1, targets.unsqueeze(1)).squeeze(1))
        start += count
    return torch.cat(found)


def _one_row(start: int, count: int, table: torch.Tensor) -> AttentionBatch:
    positions = torch.arange(start, start + count, device=_DEVICE)
    return AttentionBatch(
        num_decode_rows=int(count == 1),
        positions=positions,
        kv_indices=positions,
        block_tables=table,
        slots=torch.zeros(1, dtype=torch.int64, device=_DEVICE),
        seq_lens=torch.tensor([start + count], dtype=torch.int32, device=_DEVICE),
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=_DEVICE),
        host_seq_lens=(start + count,),
        host_query_starts=(0, count),
    )


def _difference(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    errors = (found - expected).abs()
    bias = (found - expected).mean()
    print(f"  {name}: mean {errors.mean():.5f}, at most {errors.max():.4f}; mean with its sign {bias:+.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dummy", action="store_true", help="random weights of the model's shape")
    parser.add_argument("--num-layers", type=int, help="of random weights; the model's own")
    parser.add_argument("--text", type=Path, help="a text instead of random tokens")
    parser.add_argument("--num-tokens", type=int, default=2048)
    parser.add_argument("--num-sequences", type=int, default=4)
    options = parser.parse_args()
    models = {
        dtype: load(options.model, dtype, options.dummy, options.num_layers)
        for dtype in (torch.float32, torch.bfloat16)
    }
    sequences = _tokens(options, models[torch.bfloat16].config.vocab_size)
    num_tokens, num_decodes = len(sequences[0]), 64
    chunk = (num_tokens - num_decodes) // 3
    cuts = {
        "one chunk": [num_tokens],
        "chunks and decodes": [chunk, chunk, num_tokens - num_decodes - 2 * chunk, *[1] * num_decodes],
    }
    name = torch.cuda.get_device_name(_DEVICE)
    print(f"{options.model.name} on one {name}: {len(sequences)} sequences of {num_tokens} tokens")
    for cut, steps in cuts.items():
        variants = {
            "float32": (torch.float32, torch.float32),
            "bfloat16": (torch.bfloat16, torch.bfloat16),
            "fp8": (torch.bfloat16, FP8),
        }
        with torch.inference_mode():
            found = {
                name: torch.cat([logprobs(models[dtype], ids, cache, steps) for ids in sequences])
                for name, (dtype, cache) in variants.items()
            }
        print(f" {cut}: mean logprob {found['float32'].mean():.4f}")
        _difference("KV in bfloat16, from float32", found["bfloat16"], found["float32"])
        _difference("KV in FP8, from float32", found["fp8"], found["float32"])
        _difference("KV in FP8, from KV in bfloat16", found["fp8"], found["bfloat16"])


def _tokens(options: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    count = options.num_sequences * options.num_tokens
    if options.text is None:
        ids = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"][:count]
    return [ids[i : i + options.num_tokens] for i in range(0, len(ids) - options.num_tokens + 1, options.num_tokens)]


if __name__ == "__main__":
    main()
