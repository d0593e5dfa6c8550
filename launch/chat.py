"""`octavo chat`: a conversation at the terminal, streamed."""

from collections.abc import Iterator

from rich.console import Console

from ..errors import OctavoError
from .client import Client
from .outputs import RequestOutput
from .prompts import ChatMessage, RequestOptions
from .sampling_params import SamplingParams
from .streaming import print_stream


def run_chat(
    client: Client, params: SamplingParams, options: RequestOptions, system: str | None, console: Console
) -> None:
    """Until the end of input. Ctrl-C during an answer ends the answer; at the prompt, the chat.

    An error ends the turn, which is taken back, not the chat.
    """
    client.list_models()  # raises now rather than after the first question
    messages = [ChatMessage(role="system", content=system)] if system else []
    console.print("Ctrl-D ends the chat.", style="dim")
    while (text := _read_turn(console)) is not None:
        if not text:
            continue
        messages.append(ChatMessage(role="user", content=text))
        if (answer := _answer(client.stream(messages, params, options), console)) is None:
            messages.pop()
        else:
            messages.append(ChatMessage(role="assistant", content=answer))


def _read_turn(console: Console) -> str | None:
    try:
        return console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _answer(stream: Iterator[RequestOutput], console: Console) -> str | None:
    """None when there is none to go on from."""
    try:
        return print_stream(stream).outputs[0].text
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
    except OctavoError as error:
        console.print(f"error: {error}", style="red", markup=False)
    return None
