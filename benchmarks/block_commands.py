"""The commands of `octavo bench` about KV blocks: memory, long-context, swap."""

from typing import Annotated, Any

import typer

from ..launch.config import OFFLINE_DEFAULTS
from ..workers.model_config import ModelConfig
from .length_mix import ALPACA, SHAREGPT
from .long_context import LongContextSettings, run_long_context
from .memory import MemorySettings, run_memory
from .options import JsonOption, ModelOption, PresetOption, SeedOption, describe, model_directory, serve_config
from .presets import ModelSize
from .report import Report, check_json_path
from .swap import SwapSettings, run_swap, swap_config

_WIDTHS = (2, 4, 6)  # of the paper
_DEFAULT_PROMPTS = {SHAREGPT.name: 10, ALPACA.name: 48}
_DEFAULT_PRESET = "cpu-6m"
_LONG_PROMPT = 128_000

Widths = Annotated[
    list[int] | None,
    typer.Option("--width", help="Sequences for a prompt; repeat for several.", show_default=str(_WIDTHS)),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(help="Requests of each workload.", show_default="10 with ShareGPT's lengths, 48 with Alpaca's"),
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


def bench_long_context(
    given: dict[str, Any],
    preset: PresetOption = None,
    model: ModelOption = None,
    prompt_len: Annotated[
        int | None,
        typer.Option(help="Tokens of the long prompt.", show_default="128000, or as many as the model takes"),
    ] = None,
    streams: Annotated[int, typer.Option(help="Short requests that generate all the time.")] = 16,
    stream_len: Annotated[int, typer.Option(help="Tokens of a short request's prompt.")] = 512,
    repeats: Annotated[int, typer.Option(help="Long prompts, one after another.")] = 1,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Time between tokens of short streams alone and beside one long prompt, and the prompt's time to first token."""
    check_json_path(json)
    directory = model_directory(preset, model)
    longest = ModelConfig.from_directory(directory).max_position_embeddings
    config = serve_config(directory, seed, given, max_model_len=longest)
    prompt_len = prompt_len or min(_LONG_PROMPT, (config.max_model_len or 0) - 1)
    settings = LongContextSettings(prompt_len, streams, stream_len, repeats, seed)
    settings.check(config)
    report = Report("long-context", describe(config, prompt_len=prompt_len, streams=streams, stream_len=stream_len))
    run_long_context(config, settings, report)
    report.finish(json)


def bench_swap(
    given: dict[str, Any],
    preset: PresetOption = None,
    model: ModelOption = None,
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt that moves; 1 GiB of an 8B model.")] = 8192,
    streams: Annotated[int, typer.Option(help="Requests that generate all the time.")] = 16,
    stream_len: Annotated[int, typer.Option(help="Tokens of such a request's prompt.")] = 256,
    output_len: Annotated[int, typer.Option(help="Tokens that it has room for.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Prompts that come back from the host.")] = 5,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Time between tokens of running streams while KV blocks move to the host, and from it, beside them."""
    check_json_path(json)
    directory = model_directory(preset, model)
    settings = SwapSettings(prompt_len, streams, stream_len, output_len, repeats, seed)
    size = ModelSize.of(ModelConfig.from_directory(directory))
    config = swap_config(serve_config(directory, seed, given), settings, size)
    work = {"prompt_len": prompt_len, "streams": streams, "num_gpu_blocks_override": config.num_gpu_blocks_override}
    report = Report("swap", describe(config, **work))
    run_swap(config, settings, report)
    report.finish(json)
