"""Shows each step of the start: what it does and how long it took. A spinner on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

_NAME_WIDTH = 12


@dataclass(slots=True)
class Step:
    """A step that runs. `detail` is what its line will say."""

    detail: str = ""


class StartDisplay:
    """Writes to `console`; other threads may call `report` and `log` meanwhile."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, name: str, doing: str) -> Iterator[Step]:
        """Shows `doing` while the body runs, then the step's detail and time. Says nothing more if the body raises."""
        step = Step()
        started = time.perf_counter()
        if self._console.is_terminal:
            with self._console.status(Text(doing)):
                yield step
        else:
            yield step
        self.report(name, step.detail, time.perf_counter() - started)

    def report(self, name: str, detail: str, duration_s: float) -> None:
        """One line of a step that is done."""
        self._line(name, f"{detail}  {duration_s:.1f} s")

    def log(self, name: str, line: str) -> None:
        """A line of a child process's log."""
        self._print(Text(f"{name} | {line}", style="dim"))

    def show(self, text: str) -> None:
        """Text as it is, however wide the terminal."""
        self._print(Text(text))

    def _line(self, name: str, text: str) -> None:
        self._print(Text.assemble((f"{name:<{_NAME_WIDTH}}", "bold"), " ", text))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)
