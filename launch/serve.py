"""`octavo serve`: one server in the foreground, from its start to Ctrl-C."""

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from ..errors import InvalidArgumentError
from .client import Client
from .config import ServeConfig
from .prompts import ChatMessage
from .resolve import ServedModel
from .sampling_params import SamplingParams
from .signals import StopSignals
from .start_display import StartDisplay
from .streaming import print_stream
from .supervisor import Supervisor

_FIRST_REQUEST_TOKENS = 64


def run_server(config: ServeConfig) -> None:
    """Serves until SIGINT or SIGTERM. Raises OctavoError, in one line, if it cannot start or a process of it fails."""
    # A thread that still rebuilds a group when the server has ended is not to start another Ray by its next call.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    display = StartDisplay(Console(stderr=True))
    supervisor = Supervisor(config, display, rebuilds_groups=True)
    with StopSignals() as signals:
        try:
            model = supervisor.start()
            if config.first_request is not None:
                _show_first_answer(config.first_request, supervisor.local_addresses[0], display)
            display.show(_endpoints(config, model))
            supervisor.watch()
        except KeyboardInterrupt:
            display.show("Stopping; Ctrl-C again to be quick")
        finally:
            signals.begin_stop()
            supervisor.stop(signals.hurry)


def _show_first_answer(text: str, address: str, display: StartDisplay) -> None:
    """Streams the answer to the terminal, as a chat if the model has a template for that."""
    params = SamplingParams(temperature=0.0, max_tokens=_FIRST_REQUEST_TOKENS)
    started = time.perf_counter()
    with Client(address) as client:
        display.show(f"\n> {text}")
        try:
            output = print_stream(client.stream([ChatMessage(role="user", content=text)], params))
        except InvalidArgumentError as error:
            if error.field != "chat.messages":
                raise
            output = print_stream(client.stream(text, params))  # no chat template: the model continues plain text
    num_tokens = len(output.outputs[0].token_ids)
    display.report("\nfirst answer", f"{num_tokens} tokens, streamed over gRPC", time.perf_counter() - started)


def _endpoints(config: ServeConfig, model: ServedModel) -> str:
    """Both doors, each with a line to paste."""
    shown_host = "localhost" if config.host in ("127.0.0.1", "0.0.0.0", "::", "::1") else config.host  # noqa: S104
    name = model.names[0]
    lines = [f"\nOctavo serves {name}. Ctrl-C stops it."]
    if config.grpc_port:
        address = f"{shown_host}:{config.grpc_port}"
        lines += [f"\n  gRPC  {address}", f"    {_grpc_example(config, address)}"]
    if config.port:
        url = f"http://{shown_host}:{config.port}"
        lines += [f"\n  HTTP  {url}/v1", f"    {_http_example(config, url, name)}"]
    return "\n".join([*lines, ""])


def _grpc_example(config: ServeConfig, address: str) -> str:
    command = [*_own_command(), "generate"]
    command += ["--token-ids", "1,2,3"] if config.skip_tokenizer_init else ["Once upon a time"]
    return shlex.join([*command, "--address", address])


def _http_example(config: ServeConfig, url: str, name: str) -> str:
    prompt: str | list[int] = [1, 2, 3] if config.skip_tokenizer_init else "Once upon a time"
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 32})
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _own_command() -> list[str]:
    """How a shell in this directory reaches the command line: by name if it is on the path."""
    if shutil.which("octavo"):
        return ["octavo"]
    script = Path(sys.executable).with_name("octavo")
    if not script.is_file():
        return [sys.executable, "-m", "octavo"]
    return [str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)]
