"""The command `octavo`. An error is one line on stderr and an exit status that is not 0.

Imports are light, so that `octavo --help` is quick: ray and torch come in when a server starts.
"""

import importlib
import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import InvalidArgumentError, OctavoError
from .client import DEFAULT_ADDRESS, Client
from .sampling_params import SamplingParams
from .serve_command import build_serve_command

Address = Annotated[str, typer.Option(help="gRPC address of the server: HOST:PORT or unix:/path.")]
Model = Annotated[str, typer.Option(help="A served name; empty means the only one.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="Randomness; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Smallest set of most likely tokens whose probability reaches this.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same tokens.", show_default="drawn")]

# What typer's own usage errors derive from; where it lives depends on typer's version.
_UsageBase: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def build_app() -> typer.Typer:
    """All commands."""
    app = typer.Typer(
        name="octavo",
        help="Octavo serves large language models from many GPUs as one.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # its boxes cut long options off
    )
    app.command("serve")(build_serve_command())
    app.command("generate")(_generate)
    app.command("chat")(_chat)
    app.command("status")(_status)
    app.command("scale")(_scale)
    app.command("profile")(_profile)
    app.command("version")(_version)
    if importlib.util.find_spec("octavo.benchmarks.cli") is not None:
        app.add_typer(importlib.import_module("octavo.benchmarks.cli").app, name="bench")
    return app


def _generate(
    text: Annotated[str | None, typer.Argument(help="What to continue.", show_default=False)] = None,
    token_ids: Annotated[str | None, typer.Option(help="Token ids instead of text, as 1,2,3.")] = None,
    address: Address = DEFAULT_ADDRESS,
    model: Model = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    n: Annotated[int, typer.Option("--n", help="Outputs to show; over 1 only with a temperature or beams.")] = 1,
    num_beams: Annotated[int, typer.Option(help="Beam search with so many beams; 0 is off.")] = 0,
) -> None:
    """Continue a text, streamed; several outputs come when all have ended."""
    from .beam_search import BeamSearchParams
    from .prompts import AnyParams, RequestOptions
    from .streaming import print_samples, print_stream

    prompt, options = _prompt(text, token_ids), RequestOptions(model=model)
    params: AnyParams = SamplingParams(
        temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens, n=1 if num_beams else n
    )
    if num_beams:
        if (temperature, top_p, seed) != (0, 1, None):
            raise InvalidArgumentError("--temperature, --top-p and --seed do not go with --num-beams; leave them out")
        params = BeamSearchParams(num_beams, max_tokens, n=n)
    with Client(address) as client:
        if n == 1 and not num_beams:
            print_stream(client.stream(prompt, params, options))
        else:
            print_samples(client.generate(prompt, params, options))


def _prompt(text: str | None, token_ids: str | None) -> str | list[int]:
    if (text is None) == (token_ids is None):
        raise InvalidArgumentError("give a text or --token-ids, and not both")
    if text is not None:
        return text
    try:
        return [int(token_id) for token_id in str(token_ids).split(",")]
    except ValueError as error:
        raise InvalidArgumentError(f"--token-ids must be integers and commas, got {token_ids!r}") from error


def _chat(
    system: Annotated[str | None, typer.Option(help="A system message to begin with.", show_default=False)] = None,
    address: Address = DEFAULT_ADDRESS,
    model: Model = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
) -> None:
    """Talk to the model; it remembers the conversation."""
    from .chat import run_chat
    from .prompts import RequestOptions

    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    with Client(address) as client:
        run_chat(client, params, RequestOptions(model=model), system, Console())


def _status(
    address: Address = DEFAULT_ADDRESS,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Show what the KV blocks hold: sharing, prefix cache, fragmentation.")
    ] = False,
) -> None:
    """Show groups, ranks, blocks, the queue and counters."""
    from .status_table import print_blocks, print_status

    with Client(address) as client:
        (print_blocks if blocks else print_status)(client.status(), Console())


def _scale(
    address: Address = DEFAULT_ADDRESS,
    num_groups: Annotated[int | None, typer.Option(help="Worker groups.", show_default="as many as now")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="Ranks of each; another number builds all groups anew.", show_default="as now")
    ] = None,
) -> None:
    """Change how many worker groups a running server has; requests go on."""
    for name, value in (("num_groups", num_groups), ("tensor_parallel_size", tensor_parallel_size)):
        if value is not None and not 1 <= value < 1 << 32:
            raise InvalidArgumentError(f"{name} must be at least 1, got {value}; Ctrl-C in its terminal ends a server")
    with Client(address) as client:
        for progress in client.scale(num_groups or 0, tensor_parallel_size or 0):
            print(progress.message, flush=True)


def _profile(
    address: Address = DEFAULT_ADDRESS,
    num_steps: Annotated[int, typer.Option(help="Steps to profile.")] = 64,
    out: Annotated[Path, typer.Option(help="Directory, on the worker's machine, for the traces.")] = Path("profile"),
    group: Annotated[int | None, typer.Option(help="Only this group.", show_default="all groups")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for that many steps.")] = 60.0,
) -> None:
    """Show which kernels the GPUs of a busy server run, and how long they are idle."""
    from .profiling import ProfileOptions, print_profiles, profile_groups

    options = ProfileOptions(num_steps, out, timeout, group)
    with Client(address) as client:
        print_profiles(profile_groups(client.status(), options), Console())


def _version() -> None:
    """Show the version."""
    print(version("octavo"))


def main() -> None:
    """The console script."""
    status = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed by now. The interpreter's own end would wait 5 s for a Ray that is dead, and then crash in it.
    os._exit(status)


def run(arguments: list[str]) -> int:
    """The exit status of `octavo ARGUMENTS`: 2 for wrong usage, 1 for another error, 130 after Ctrl-C."""
    try:
        return build_app()(arguments, prog_name="octavo", standalone_mode=False) or 0
    except OctavoError as error:
        return _fail(str(error), 1)
    except _UsageBase as error:
        return _fail(f"{error.format_message()} (octavo --help says more)", 2)  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        return 130


def _fail(message: str, status: int) -> int:
    print("octavo: " + " ".join(message.split()), file=sys.stderr)
    return status
