"""Percentiles are right, and a report says where, when and with what it was made."""

import io
import json

import pytest
from octavo.benchmarks.machine import Machine
from octavo.benchmarks.report import Report, check_json_path
from octavo.benchmarks.summary import Summary, percentile_columns
from octavo.errors import InvalidArgumentError
from rich.console import Console

MACHINE = Machine("a CPU", 2, 24.0, ["a GPU"], "3.11.0", {"torch": "2.11.0"})


def test_percentiles_in_milliseconds():
    times_s = [index / 1000 for index in range(1, 102)]
    summary = Summary.of_seconds(times_s)
    assert summary is not None
    assert (summary.count, summary.mean_ms) == (101, pytest.approx(51.0))
    assert summary.percentiles_ms == pytest.approx((51.0, 96.0, 100.0))
    assert percentile_columns("ttft", times_s) == pytest.approx(
        {"ttft_p50_ms": 51.0, "ttft_p95_ms": 96.0, "ttft_p99_ms": 100.0}
    )


def test_nothing_measured_has_no_percentiles():
    assert Summary.of_seconds([]) is None
    assert percentile_columns("itl", []) == {"itl_p50_ms": None, "itl_p95_ms": None, "itl_p99_ms": None}


def report() -> Report:
    made = Report("latency", {"preset": "llama-8b", "seed": 0}, command=["octavo", "bench"], machine=MACHINE)
    made.add("Decode", {"batch": 1, "step_ms": 4.321, "roof_ms": None})
    made.add("Decode", {"batch": 256, "step_ms": 15.0, "roof_ms": 12.85})
    return made


def test_json_has_every_row_and_its_circumstances():
    content = json.loads(report().to_json())
    assert set(content) == {"benchmark", "settings", "tables", "command", "commit", "machine", "date"}
    assert content["tables"]["Decode"][1] == {"batch": 256, "step_ms": 15.0, "roof_ms": 12.85}
    assert content["machine"]["gpus"] == ["a GPU"]
    assert content["settings"] == {"preset": "llama-8b", "seed": 0}


def test_table_shows_rows_and_leaves_blanks():
    shown = io.StringIO()
    report().show(Console(file=shown, width=100))
    assert "step ms" in shown.getvalue()
    assert [line.split() for line in shown.getvalue().splitlines() if "4.321" in line] == [["1", "4.321", "-"]]


def test_a_json_file_that_cannot_be_is_refused_before_the_work(tmp_path):
    check_json_path(None)
    check_json_path(tmp_path / "result.json")
    with pytest.raises(InvalidArgumentError, match="--json"):
        check_json_path(tmp_path / "missing" / "result.json")
