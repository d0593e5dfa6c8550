"""The commands of `octavo bench` about KV blocks: memory."""

from typing import Annotated, Any

import typer

from ..launch.config import OFFLINE_DEFAULTS
from .length_mix import ALPACA, SHAREGPT
from .memory import MemorySettings, run_memory
from .options import JsonOption, ModelOption, PresetOption, SeedOption, describe, model_directory, serve_config
from .report import Report, check_json_path

_WIDTHS = (2, 4, 6)  # of the paper
_DEFAULT_PROMPTS = {SHAREGPT.name: 24, ALPACA.name: 96}
_DEFAULT_PRESET = "cpu-6m"

Widths = Annotated[
    list[int] | None,
    typer.Option("--width", help="Sequences for a prompt; repeat for several.", show_default=str(_WIDTHS)),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(help="Requests of each workload.", show_default="24 with ShareGPT's lengths, 96 with Alpaca's"),
]


def bench_memory(
    given: dict[str, Any],
    preset: PresetOption = None,
    model: ModelOption = None,
    width: Widths = None,
    num_prompts: NumPrompts = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """KV memory lost in partial blocks and saved by sharing, beside the PagedAttention paper's figures.

    Serves the preset cpu-6m unless told otherwise.
    """
    check_json_path(json)
    counts = {name: count if num_prompts is None else num_prompts for name, count in _DEFAULT_PROMPTS.items()}
    settings = MemorySettings(counts, tuple(width or _WIDTHS), seed)
    directory = model_directory(_DEFAULT_PRESET if preset is None and model is None else preset, model)
    config = serve_config(directory, seed, given, **OFFLINE_DEFAULTS)
    report = Report("memory", describe(config, num_prompts=", ".join(f"{n} {name}" for name, n in counts.items())))
    run_memory(config, settings, report)
    report.finish(json)
