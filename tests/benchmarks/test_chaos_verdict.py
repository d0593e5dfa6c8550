"""Every way in which a server breaks its promise is named, and one that keeps it is let go."""

import io
from types import SimpleNamespace

import psutil
import pytest
from octavo.benchmarks.chaos.answers import Difference
from octavo.benchmarks.chaos.faults import FaultRecord
from octavo.benchmarks.chaos.load import Mismatch, Tally
from octavo.benchmarks.chaos.resources import ResourceLog, Sample, trend_of
from octavo.benchmarks.chaos.run import Outcome
from octavo.benchmarks.chaos.server import Leftovers
from octavo.benchmarks.chaos.verdict import add_tables, require_kept, wrongs
from octavo.benchmarks.chaos.watch import is_idle, is_whole, num_leaked_blocks
from octavo.benchmarks.report import Report
from octavo.errors import InternalError
from octavo.proto import admin_pb2
from rich.console import Console


def samples(first_mib, last_mib, duration_s, num_fds=(20, 20)):
    return [
        Sample(duration_s * third / 2, 2, mib, fds)
        for third, (mib, fds) in enumerate(
            [(first_mib, num_fds[0]), ((first_mib + last_mib) / 2, num_fds[0]), (last_mib, num_fds[1])]
        )
    ]


def outcome(**changes) -> Outcome:
    fields = {
        "records": [FaultRecord("at 1 kill-rank group=0 rank=0", 1.0, 0.05, 3.0, 3.1)],
        "tally": Tally(num_finished=10, num_tokens=1000),
        "num_blocks": 100,
        "num_leaked_blocks": 0,
        "samples": {"gateway": samples(50.0, 52.0, 1800)},
        "leftovers": Leftovers(0),
        "duration_s": 1800.0,
    }
    return Outcome(**(fields | changes))


def test_a_server_that_keeps_its_promise_is_let_go():
    require_kept(outcome())


MISMATCH = Mismatch(3, 12.0, Difference("repeated", 0, 17, 2), 9.0, [5], [6])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tally": Tally(num_finished=10, lost=["why"])}, "1 request(s) were lost"),
        ({"tally": Tally(num_finished=10, mismatches=[MISMATCH])}, "1 answer(s) differ from the undisturbed ones"),
        ({"tally": Tally()}, "no request finished"),
        ({"num_leaked_blocks": 3}, "3 block(s) were leaked"),
        ({"num_leaked_blocks": None}, "the server did not come to rest"),
        ({"leftovers": Leftovers(1)}, "the end was not clean"),
        ({"leftovers": Leftovers(0, ["17 python"])}, "17 python"),
        ({"leftovers": Leftovers(0, is_port_open=True)}, "the end was not clean"),
        ({"problem": "the server ended", "leftovers": None}, "the server ended"),
        ({"records": [FaultRecord("at 1 drain", 1.0, None, None, None, "nobody")]}, "at 1 drain: nobody"),
        ({"samples": {"rank": samples(300.0, 500.0, 1800)}}, "rank: memory or file descriptors grow"),
        ({"samples": {"gateway": samples(50.0, 50.0, 1800, (20, 60))}}, "gateway: memory or file descriptors grow"),
    ],
)
def test_each_broken_promise_is_said(changes, said):
    [found] = wrongs(outcome(**changes))
    assert said in found
    with pytest.raises(InternalError, match="chaos: "):
        require_kept(outcome(**changes))


def test_memory_of_a_short_run_is_shown_and_not_judged():
    short = outcome(samples={"rank": samples(300.0, 900.0, 100)})
    assert wrongs(short) == []
    report = Report("chaos", {})
    add_tables(short, report)
    [row] = report.tables["Processes, first and last third of the run"]
    assert (row["first_mib"], row["last_mib"], row["is_flat"]) == (300.0, 900.0, "too short to tell")
    assert trend_of([]) is None


def test_descriptors_that_ray_keeps_for_dead_workers_are_not_counted_as_a_leak():
    assert wrongs(outcome(samples={"ray": samples(44.0, 46.0, 1800, (34, 60))})) == []
    [found] = wrongs(outcome(samples={"ray": samples(44.0, 46.0, 1800, (34, 90))}))
    assert "ray: " in found


def test_a_process_that_ends_while_it_is_looked_at_ends_no_log():
    class Gone:
        def memory_full_info(self):
            raise psutil.NoSuchProcess(17)

    family = {Gone(): "coordinator", psutil.Process(): "gateway"}
    taken = ResourceLog(SimpleNamespace(family=lambda: family))._look(1.0)
    assert list(taken) == ["gateway"]
    assert taken["gateway"].num_processes == 1


def test_the_report_has_the_faults_and_what_went_wrong():
    report = Report("chaos", {})
    tally = Tally(num_finished=10, num_tokens=500, lost=["request 1 was lost"], mismatches=[MISMATCH])
    add_tables(outcome(tally=tally), report)
    [load], [fault] = report.tables["Load"], report.tables["Faults"]
    assert (load["requests_lost"], load["tokens_repeated"], load["tokens_missing"]) == (1, 2, 0)
    assert (fault["noticed_after_s"], fault["whole_after_s"]) == (0.05, 3.0)
    shown = io.StringIO()
    report.show(Console(file=shown, width=160))
    assert "request 1 was lost" in shown.getvalue()
    asked = "request 3, asked at 9.0 s, at 12.0 s"
    assert f"{asked}, output 0: 2 repeated at token 17, due [5], came [6]" in shown.getvalue()


def test_when_a_server_is_whole_and_when_it_is_idle():
    ready, failed = admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_FAILED
    group = admin_pb2.GroupStatus(state=ready, num_blocks=10, num_free_blocks=8)
    status = admin_pb2.GetStatusResponse(num_gateways=1, groups=[group, group])
    assert is_whole(status, 2, 1)
    assert not is_whole(status, 3, 1)
    assert not is_whole(status, 2, 2)
    assert not is_whole(None, 2, 1)
    assert is_idle(status)
    assert not is_idle(None)
    assert num_leaked_blocks(status) == 4
    status.groups[1].state = failed
    assert not is_whole(status, 2, 1)
    status.groups[1].num_inflight_steps = 1
    assert not is_idle(status)
