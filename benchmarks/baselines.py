"""Transformers on the same machine, the same weights and the same prompts: what it costs not to use Octavo.

Two ways of it: one static batch of all requests, and its own continuous batching. Both sample as the throughput
benchmark asks of Octavo: temperature 1, the whole vocabulary, and no early end.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import transformers
from torch import Tensor
from transformers.generation.continuous_batching.requests import GenerationOutput

_PAD = 0
_NO_TOKEN = -1  # generate_batch's own way to say that no token ends a sequence


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """What one way took, and how many tokens each request got."""

    name: str
    duration_s: float
    num_output_tokens: list[int]


class CausalLM(Protocol):
    """What is used of a transformers model, whose own annotations allow for much more."""

    device: torch.device

    def generate(self, inputs: Tensor, attention_mask: Tensor, generation_config: object) -> Tensor: ...

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: object,
        continuous_batching_config: transformers.ContinuousBatchingConfig | None,
        persistent_manager: bool,
    ) -> Mapping[str, GenerationOutput]: ...

    def destroy_cached_continuous_batching_manager(self) -> None: ...


def save_random_model(config_directory: Path, directory: Path, seed: int, dtype: str) -> None:
    """Weights as transformers initialises them, so that both systems load the same."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(config_directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)


def load_model(directory: Path, device: str, dtype: str) -> CausalLM:
    """Ready to generate without an early end."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None  # where generate would look for what a call leaves unset
    return cast(CausalLM, cast(torch.nn.Module, model).to(device).eval())


def run_static_batch(model: CausalLM, prompts: Sequence[Sequence[int]], output_len: int) -> list[BaselineRun]:
    """One run: all requests as one batch, padded on the left."""
    width = max(map(len, prompts))
    padded = [[_PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    config = _generation_config(output_len, eos_token_id=None)
    started = time.perf_counter()
    output = model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=config,
    )
    output.cpu()  # waits for the device
    duration_s = time.perf_counter() - started
    return [BaselineRun("transformers, static batch", duration_s, [output.shape[1] - width] * len(prompts))]


def run_continuous_batching(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    config: transformers.ContinuousBatchingConfig | None = None,
) -> list[BaselineRun]:
    """`generate_batch` twice, at its own defaults unless `config` is given: as one call, which sets up its manager and
    its cache, and once more with the manager kept from the first."""
    generation_config = _generation_config(output_len, eos_token_id=_NO_TOKEN)
    runs = []
    try:
        for name in ("set-up included", "kept running"):
            started = time.perf_counter()
            outputs = model.generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=generation_config,
                continuous_batching_config=config,
                persistent_manager=True,
            )
            duration_s = time.perf_counter() - started
            counts = [len(output.generated_tokens) for output in outputs.values()]
            runs.append(BaselineRun(f"transformers, continuous batching, {name}", duration_s, counts))
    finally:
        model.destroy_cached_continuous_batching_manager()
    return runs


def _generation_config(output_len: int, eos_token_id: int | None) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=output_len,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # transformers' default is 50
        top_p=1.0,
        eos_token_id=eos_token_id,
        pad_token_id=_PAD,
    )
