"""The command `octavo bench chaos`."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...errors import InvalidArgumentError
from ...launch.config import DEFAULT_MODEL, ServeConfig
from ..options import JsonOption, SeedOption
from ..report import Report, check_json_path
from .random_script import RandomFaults, make_script
from .requests import LONGEST
from .run import ChaosSettings, run_chaos
from .script import FAULT_KINDS, Fault, Shape, check_script, parse_script
from .verdict import add_tables, require_kept

DEFAULT_FAULTS = ",".join(FAULT_KINDS)
_MAX_RESTARTS = 1_000_000  # a group that is killed again and again is not to be given up here

ScriptOption = Annotated[
    Path | None, typer.Option(help="Faults, one a line: at SECONDS KIND name=number ...", show_default="random faults")
]
FaultsOption = Annotated[
    str, typer.Option(help=f"What random faults are drawn from, with commas between: {', '.join(FAULT_KINDS)}.")
]
SaveOption = Annotated[Path | None, typer.Option(help="Write the script that is run to this file.")]
LogOption = Annotated[Path | None, typer.Option(help="Write what the server says to this file.")]


def bench_chaos(
    given: dict[str, Any],
    model: Annotated[str, typer.Option(help="A model directory with a tokenizer.", show_default="the demo model")] = "",
    script: ScriptOption = None,
    faults: FaultsOption = DEFAULT_FAULTS,
    duration: Annotated[float, typer.Option(help="Seconds of load, at least; the script may take longer.")] = 60.0,
    interval: Annotated[float, typer.Option(help="Seconds between two random faults, in the mean.")] = 12.0,
    save_script: SaveOption = None,
    save_log: LogOption = None,
    num_streams: Annotated[int, typer.Option(help="Streams, each with one request after another.")] = 64,
    num_requests: Annotated[int, typer.Option(help="Distinct requests that they draw from.")] = 64,
    step_timeout_s: Annotated[float, typer.Option(help="As of octavo serve.")] = ServeConfig().step_timeout_s,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Load a server of its own, have processes die, hang and fail, and compare every token with an undisturbed run's.

    Its exit status is 1 if a request is lost, a token missing, repeated or wrong, a block leaked, or anything left.
    """
    check_json_path(json)
    check_json_path(save_script)
    check_json_path(save_log)
    served: dict[str, Any] = {"model": model or str(DEFAULT_MODEL), "step_timeout_s": step_timeout_s} | given
    config = ServeConfig(**served, max_restarts=_MAX_RESTARTS)
    _check(config, duration, num_streams, num_requests)
    shape = Shape(config.num_groups, config.tensor_parallel_size, config.num_gateways)
    wanted = RandomFaults(tuple(faults.split(",")), duration, interval, step_timeout_s, seed)
    planned = _read_script(script) if script is not None else make_script(wanted, shape)
    check_script(planned, shape)
    text = "".join(f"{fault}\n" for fault in planned)
    if save_script is not None:
        source = f"of {script}" if script else f"random, seed {seed}"
        save_script.write_text(f"# {source}, {config.num_groups} group(s) of {config.tensor_parallel_size}\n{text}")
    settings = ChaosSettings(
        serve_options(config),
        shape,
        planned,
        num_streams,
        num_requests,
        duration,
        config.shutdown_timeout,
        seed,
        save_log,
    )
    console = Console(stderr=True)
    outcome = run_chaos(settings, lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    report = Report("chaos", {**served, "num_streams": num_streams, "seed": seed, "script": text})
    add_tables(outcome, report)
    report.finish(json)
    require_kept(outcome)


def _check(config: ServeConfig, duration_s: float, num_streams: int, num_requests: int) -> None:
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise InvalidArgumentError(f"duration must be over 0 seconds, got {duration_s}", "duration")
    for name, value in {"num_streams": num_streams, "num_requests": num_requests}.items():
        if value < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, got {value}", name)
    if config.max_model_len is not None and config.max_model_len < LONGEST:
        raise InvalidArgumentError(f"the load's requests take up to {LONGEST} tokens", "max_model_len")
    if config.ray_address is not None:
        raise InvalidArgumentError("chaos sends signals to processes, so they must be on this machine", "ray_address")


def _read_script(path: Path) -> list[Fault]:
    try:
        return parse_script(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--script {path}: {error}", "script") from error


def serve_options(config: ServeConfig) -> list[str]:
    """The command line of `octavo serve` that makes this configuration, but for its ports."""
    options: list[str] = []
    for spec in fields(ServeConfig):
        value, flag = getattr(config, spec.name), spec.name.replace("_", "-")
        if spec.name in ("port", "grpc_port", "host") or value == spec.default:
            continue
        if spec.name == "model":
            options.append(value)
        elif isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            options += [f"--{flag}", str(value)]
    return options
