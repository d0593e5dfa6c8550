"""`octavo bench`: its commands and their options. Each checks everything before it starts anything."""

from typing import Annotated, Any

import typer

from ..errors import InvalidArgumentError
from ..launch.config import OFFLINE_DEFAULTS, ServeConfig
from ..workers.model_config import ModelConfig
from .block_commands import bench_long_context, bench_memory, bench_swap
from .chaos.command import bench_chaos
from .latency import LatencySettings, check_latency, run_latency
from .options import (
    JsonOption,
    ModelOption,
    PresetOption,
    SeedOption,
    describe,
    model_directory,
    serve_config,
    with_serve_options,
)
from .report import Report, check_json_path
from .serve_command import bench_serve
from .startup import run_startup
from .throughput import check_throughput, run_throughput
from .workload import WORKLOADS, LengthRange, NamedWorkload, Workload

_BATCH_SIZES = (1, 8, 32, 128, 256)
_PREFILL_LENS = (512, 2048, 8192)

BatchSizes = Annotated[
    list[int] | None,
    typer.Option(help="Sequences that decode at once; repeat for several.", show_default=str(_BATCH_SIZES)),
]
PrefillLens = Annotated[
    list[int] | None,
    typer.Option(help="Tokens of a prompt; repeat for several.", show_default=f"those of {_PREFILL_LENS} that fit"),
]
RepeatedPrompts = Annotated[
    list[int] | None,
    typer.Option(help="Tokens of a prompt that is sent twice, with --enable-prefix-caching; repeat for several."),
]
WorkloadName = Annotated[str | None, typer.Option(help=f"One of the anchors': {', '.join(WORKLOADS)}.")]
NumPrompts = Annotated[int | None, typer.Option(help="Requests, all at once.", show_default="the workload's, or 1000")]
InputLen = Annotated[str | None, typer.Option(help="Tokens of a prompt, or a range as 16:127.")]
OutputLen = Annotated[int | None, typer.Option(help="Tokens that each request generates.")]
SharedLen = Annotated[int, typer.Option(help="Tokens of --input-len with which all prompts of a repeat begin.")]
Compare = Annotated[str | None, typer.Option(help="Also run this on the same work: transformers.")]


def _latency(
    given: dict[str, Any],
    preset: PresetOption = None,
    model: ModelOption = None,
    batch_size: BatchSizes = None,
    context: Annotated[int, typer.Option(help="Tokens that each sequence of a decode knows.")] = 1024,
    steps: Annotated[int, typer.Option(help="Decode steps that are measured.")] = 64,
    prefill: PrefillLens = None,
    repeated_prompt: RepeatedPrompts = None,
    repeats: Annotated[int, typer.Option(help="Of each prefill, and of each repeated prompt.")] = 5,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Time of a decode step by batch size, its share outside the model, and the prefill of one prompt.

    With --repeated-prompt nothing else is measured unless it is asked for.
    """
    check_json_path(json)
    directory = model_directory(preset, model)
    batch_sizes = tuple(batch_size or (() if repeated_prompt else _BATCH_SIZES))
    config = serve_config(directory, seed, given, **OFFLINE_DEFAULTS, max_num_seqs=max((256, *batch_sizes)))
    fitting = () if repeated_prompt else [length for length in _PREFILL_LENS if length < (config.max_model_len or 0)]
    prefill_lens, repeated_lens = tuple(prefill or fitting), tuple(repeated_prompt or ())
    settings = LatencySettings(batch_sizes, context, steps, prefill_lens, repeats, seed, repeated_lens)
    cases = check_latency(settings, config, ModelConfig.from_directory(directory).vocab_size)
    report = Report("latency", describe(config, context=context, steps=steps, repeats=repeats))
    run_latency(config, settings, cases, report)
    report.finish(json)


def _throughput(
    given: dict[str, Any],
    preset: PresetOption = None,
    model: ModelOption = None,
    workload: WorkloadName = None,
    num_prompts: NumPrompts = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    shared_len: SharedLen = 0,
    repeats: Annotated[int, typer.Option(help="Of the whole, with other prompts each time.")] = 1,
    compare: Compare = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Tokens a second of many requests at once, offline."""
    check_json_path(json)
    config = serve_config(model_directory(preset, model), seed, given, **OFFLINE_DEFAULTS)
    named = _named(workload, input_len, output_len, shared_len)
    asked = Workload(
        named.num_prompts if num_prompts is None else num_prompts,
        LengthRange.parse(named.input_len, "input_len"),
        named.output_len,
        seed,
        named.shared_len,
    )
    check_throughput(asked, config)
    if repeats < 1:
        raise InvalidArgumentError(f"repeats must be at least 1, got {repeats}", "repeats")
    work = {"num_prompts": asked.num_prompts, "output_len": asked.output_len, "shared_len": asked.shared_len}
    report = Report("throughput", describe(config, workload=workload, input_len=str(asked.input_len), **work))
    if compare is None:
        run_throughput(config, asked, repeats, report)
    else:
        _compare(compare, config, asked, repeats, report)
    report.finish(json)


def _compare(name: str, config: ServeConfig, workload: Workload, num_repeats: int, report: Report) -> None:
    if name != "transformers":
        raise InvalidArgumentError(f"--compare takes transformers, got {name!r}", "compare")
    from .comparison import run_comparison  # imports torch, which nothing else here needs

    run_comparison(config, workload, num_repeats, report)


def _named(name: str | None, input_len: str | None, output_len: int | None, shared_len: int) -> NamedWorkload:
    """A named one, or one of the lengths given."""
    if (name is None) == (input_len is None) or (input_len is None) != (output_len is None):
        raise InvalidArgumentError("give --workload, or both of --input-len and --output-len", "workload")
    if name is None:
        return NamedWorkload(input_len or "", output_len or 0, shared_len)
    if name not in WORKLOADS:
        raise InvalidArgumentError(f"--workload takes {' or '.join(WORKLOADS)}, got {name!r}", "workload")
    if shared_len:
        raise InvalidArgumentError("--shared-len goes with --input-len; a --workload has its own", "shared_len")
    return WORKLOADS[name]


def _startup(
    given: dict[str, Any],
    preset: PresetOption = None,
    model: ModelOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Time from the command to a system that takes requests, stage by stage."""
    check_json_path(json)
    config = serve_config(model_directory(preset, model), seed, given)
    report = Report("startup", describe(config))
    run_startup(config, report)
    report.finish(json)


def _build_app() -> typer.Typer:
    app = typer.Typer(
        help="Measure latency, throughput, serving, KV memory and start-up, and what faults do to streams.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    app.command("latency")(with_serve_options(_latency))
    app.command("throughput")(with_serve_options(_throughput))
    app.command("serve")(with_serve_options(bench_serve))
    app.command("memory")(with_serve_options(bench_memory))
    app.command("long-context")(with_serve_options(bench_long_context))
    app.command("swap")(with_serve_options(bench_swap))
    app.command("startup")(with_serve_options(_startup))
    app.command("chaos")(with_serve_options(bench_chaos))
    return app


app = _build_app()
