"""The command `octavo bench serve`: loads a running server, or starts one for the time."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidArgumentError
from ..launch.config import ServeConfig
from ..workers.model_config import ModelConfig
from .load_client import DOORS
from .options import JsonOption, ModelOption, PresetOption, SeedOption, describe, model_directory, serve_config
from .report import Report, Value, check_json_path
from .serving import ServeSettings, free_port, load_specs, run_serve, with_tokenizer
from .system import running_system

RequestRates = Annotated[
    list[float] | None,
    typer.Option("--request-rate", help="Arrivals a second, or inf; repeat for several.", show_default="inf"),
]
NumPrompts = Annotated[
    int | None, typer.Option(help="Requests of each rate.", show_default="20 seconds of arrivals; 1000 at inf")
]
BaseUrl = Annotated[
    str | None,
    typer.Option(help="A running server: http://HOST:PORT, or HOST:PORT with --door grpc.", show_default="starts one"),
]


def bench_serve(
    given: dict[str, Any],
    preset: PresetOption = None,
    model: ModelOption = None,
    base_url: BaseUrl = None,
    served_model_name: Annotated[str, typer.Option(help="At --base-url; empty: the only model there.")] = "",
    vocab_size: Annotated[int, typer.Option(help="At --base-url: prompts are of token ids under this.")] = 1000,
    door: Annotated[str, typer.Option(help="http (OpenAI completions, streamed) or grpc.")] = "http",
    request_rate: RequestRates = None,
    num_prompts: NumPrompts = None,
    input_len: Annotated[str, typer.Option(help="Tokens of a prompt, or a range as 16:127.")] = "512",
    output_len: Annotated[int, typer.Option(help="Tokens that each request generates.")] = 128,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Time to first token and between tokens at given arrival rates, from clients in a process of their own."""
    check_json_path(json)
    if door not in DOORS:
        raise InvalidArgumentError(f"--door takes {' or '.join(DOORS)}, got {door!r}", "door")
    settings = ServeSettings(tuple(request_rate or [float("inf")]), num_prompts, input_len, output_len, seed)
    described: dict[str, Value] = {"door": door, "input_len": input_len, "output_len": output_len}
    if base_url is not None:
        if preset is not None or model is not None or given:
            raise InvalidArgumentError("--base-url loads a server that runs already; drop the options of a new one")
        its_own = {"enable_prefix_caching": "as that server has it"}
        report = Report("serve", {**described, "seed": seed, "base_url": base_url, **its_own})
        run_serve(load_specs(settings, door, base_url, served_model_name, vocab_size), report)
    else:
        directory = model_directory(preset, model)
        config = serve_config(directory, seed, given, port=free_port())
        report = Report("serve", describe(config, **described))
        _load_own_server(config, directory, settings, door, report)
    report.finish(json)


def _load_own_server(config: ServeConfig, directory: Path, settings: ServeSettings, door: str, report: Report) -> None:
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    load_specs(settings, door, "", "", vocab_size)  # refuses what makes no sense before minutes of start-up
    with with_tokenizer(directory) as served:
        config = replace(config, model=str(served), skip_tokenizer_init=False)
        with running_system(config) as system:
            target = f"http://{config.host}:{config.port}" if door == "http" else system.address
            run_serve(load_specs(settings, door, target, "", vocab_size), report)
