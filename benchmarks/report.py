"""A benchmark's result: tables for a person, one JSON file for what compares runs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import InvalidArgumentError
from .machine import Machine, describe_machine, git_commit

_FILE_WIDTH = 180  # characters, where the output is no terminal

Value = str | int | float | None
Row = Mapping[str, Value]


@dataclass(slots=True)
class Report:
    """Rows of one table have the same columns; a column's name ends in its unit."""

    benchmark: str
    settings: Mapping[str, Value]
    tables: dict[str, list[Row]] = field(default_factory=dict)
    command: Sequence[str] = field(default_factory=lambda: ["octavo", *sys.argv[1:]])
    commit: str | None = field(default_factory=git_commit)
    machine: Machine = field(default_factory=describe_machine)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, table: str, row: Row) -> None:
        self.tables.setdefault(table, []).append(row)

    def finish(self, json_path: Path | None) -> None:
        """Shows the tables on stdout, and writes the file."""
        console = Console()
        self.show(console if console.is_terminal else Console(width=_FILE_WIDTH))
        if json_path is not None:
            json_path.write_bytes(self.to_json())

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def show(self, console: Console) -> None:
        for title, rows in self.tables.items():
            console.print(_build_table(title, rows))


def check_json_path(path: Path | None) -> None:
    """Before minutes of work, not after. Raises InvalidArgumentError if the file could not be written."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise InvalidArgumentError(f"--json {path}: not a file in an existing directory", "json")


def _build_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(_format(value) for value in row.values()))
    return table


def _format(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
