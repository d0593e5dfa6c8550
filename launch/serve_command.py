"""The `serve` command: each field of ServeConfig is an option, the model an argument, and a YAML file may hold all."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .config import ServeConfig
from .config_file import read_config_file


def merge_options(config_file: Path | None, given: dict[str, Any]) -> ServeConfig:
    """The command line over the file over the defaults; in `given`, None and () say that nothing was given."""
    options = read_config_file(config_file) if config_file is not None else {}
    options |= {name: value for name, value in given.items() if value is not None and value != ()}
    return ServeConfig(**options)


def build_serve_command() -> Callable[..., None]:
    """A function that typer turns into the command: its parameters are made from ServeConfig's fields."""

    def serve(config: Path | None, **given: Any) -> None:  # noqa: ANN401 (options of every type)
        """Serve a model until Ctrl-C: gRPC and OpenAI-compatible HTTP."""
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        resolved = merge_options(config, options)
        from .serve import run_server  # starts slowly, and --help does not need it

        run_server(resolved)

    hints = get_type_hints(ServeConfig)
    parameters = [option_parameter(spec, hints[spec.name]) for spec in fields(ServeConfig)]
    file_option = typer.Option("--config", help="YAML file of these options; the command line wins over it.")
    parameters.append(_keyword("config", Annotated[Path | None, file_option]))
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return serve


def option_parameter(spec: "Field[Any]", hint: Any) -> inspect.Parameter:  # noqa: ANN401 (a type)
    """Its default is None, which says that nothing was given; the help shows the real one."""
    shown = spec.metadata["shown"] or str(spec.default if spec.default is not MISSING else "")
    text = f"{spec.metadata['help']} [default: {shown}]"
    if spec.name == "model":
        argument = typer.Argument(help=text, metavar="MODEL", show_default=False)
        return _keyword("model", Annotated[str | None, argument])
    hint = list[str] if hint == tuple[str, ...] else hint
    names = [] if hint is not bool else [f"--{spec.name.replace('_', '-')}/--no-{spec.name.replace('_', '-')}"]
    return _keyword(spec.name, Annotated[hint | None, typer.Option(*names, help=text, show_default=False)])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:  # noqa: ANN401 (a type)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
