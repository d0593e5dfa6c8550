"""`--compare transformers`: the throughput benchmark on Octavo and on transformers, with the same weights and prompts,
on the same machine, one after the other. Of repeats the best of each system counts.
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..launch.client import Client
from ..launch.config import ServeConfig
from ..workers.model_config import ModelConfig
from . import baselines
from .report import Report
from .system import System, running_system
from .throughput import Run, checked, row_of, run_octavo
from .workload import Workload


def run_comparison(config: ServeConfig, workload: Workload, num_repeats: int, report: Report) -> None:
    """Adds the tables `Throughput` and `Ratios` to the report."""
    with _with_weights(config, workload.seed) as config_with_weights:
        with running_system(config_with_weights) as system:
            device = _device(system)
            octavo = _best(list(run_octavo(system, config_with_weights, workload, num_repeats)))
            best = [replace(octavo, system=_name(config))]
        best += _run_baselines(config_with_weights, device, workload, num_repeats)
    for run in best:
        report.add("Throughput", row_of(run))
    for baseline in best[1:]:
        ratio = best[0].generated_tokens_per_s / baseline.generated_tokens_per_s
        report.add("Ratios", {"octavo_against": baseline.system, "times_the_throughput": ratio})


def _name(config: ServeConfig) -> str:
    """What is compared is what a machine does: transformers has all its cores, and so have the groups together."""
    return "octavo" if config.num_groups == 1 else f"octavo, {config.num_groups} groups"


@contextmanager
def _with_weights(config: ServeConfig, seed: int) -> Iterator[ServeConfig]:
    """A configuration whose weights lie in files, so that both systems load the same."""
    if config.load_format != "dummy":
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as made:
        own_dtype = ModelConfig.from_directory(config.model).dtype
        baselines.save_random_model(Path(config.model), Path(made), seed, own_dtype)
        yield replace(config, model=made, load_format="safetensors")


def _run_baselines(config: ServeConfig, device: str, workload: Workload, num_repeats: int) -> list[Run]:
    model_config = ModelConfig.from_directory(config.model)
    own_dtype = "float32" if device == "cpu" else model_config.dtype  # as the launcher resolves "auto"
    dtype = own_dtype if config.dtype == "auto" else config.dtype
    model = baselines.load_model(Path(config.model), device, dtype)
    prompts = workload.prompts(model_config.vocab_size)
    num_prompt_tokens = sum(map(len, prompts))
    baselines.run_static_batch(model, prompts, output_len=2)  # does what is slow only once
    by_name: dict[str, list[Run]] = {}
    for way in (baselines.run_static_batch, baselines.run_continuous_batching):
        for one in itertools.chain.from_iterable(way(model, prompts, workload.output_len) for _ in range(num_repeats)):
            run = Run(one.name, num_prompt_tokens, one.num_output_tokens, one.duration_s)
            by_name.setdefault(one.name, []).append(checked(run, workload))
    return [_best(runs) for runs in by_name.values()]


def _device(system: System) -> str:
    """Of the ranks; transformers gets one like it."""
    with Client(system.address) as client:
        return str(client.status().groups[0].ranks[0].device)


def _best(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: run.duration_s)
