"""What a run came to: tables for the report, and whether the server kept its promise."""

from collections.abc import Sequence

from ...errors import InternalError
from ..report import Report, Row
from .load import Tally
from .resources import JUDGED_FROM_S, KINDS, Sample, trend_of
from .run import Outcome

_NUM_SHOWN = 20  # of requests that went wrong


def add_tables(outcome: Outcome, report: Report) -> None:
    """Load, faults, resources, the end, and what went wrong if anything did."""
    report.add("Load", _load_row(outcome))
    for record in outcome.records:
        report.add(
            "Faults",
            {
                "made_at_s": record.made_at_s,
                "fault": record.fault,
                "noticed_after_s": record.noticed_after_s,
                "whole_after_s": record.whole_after_s,
                "longest_gap_s": record.longest_gap_s,
                "problem": record.problem or None,
            },
        )
    for kind in KINDS:
        if row := _resource_row(kind, outcome.samples.get(kind, [])):
            report.add("Processes, first and last third of the run", row)
    report.add("End", _end_row(outcome))
    for what in wrongs(outcome):
        report.add("Wrong", {"what": what})
    for what in _details(outcome.tally):
        report.add("Requests that went wrong", {"request": what})


def _load_row(outcome: Outcome) -> Row:
    tally = outcome.tally
    return {
        "duration_s": outcome.duration_s,
        "faults": len(outcome.records),
        "requests_finished": tally.num_finished,
        "tokens_compared": tally.num_tokens,
        "requests_lost": len(tally.lost),
        "tokens_missing": tally.num_of("missing"),
        "tokens_repeated": tally.num_of("repeated"),
        "tokens_wrong": tally.num_of("wrong"),
        "answers_that_differ": len(tally.mismatches),
        "refused_and_asked_again": tally.num_refused,
        "refused_at_the_end": tally.num_refused_at_end,
        "broken_by_killed_gateways": tally.num_broken_by_gateways,
        "set_aside": outcome.num_set_aside,
    }


def _resource_row(kind: str, samples: Sequence[Sample]) -> Row | None:
    trend = trend_of(samples)
    if trend is None:
        return None
    return {
        "process": kind,
        "processes": samples[-1].num_processes,
        "first_mib": trend.first_uss_mib,
        "last_mib": trend.last_uss_mib,
        "first_file_descriptors": trend.first_fds,
        "last_file_descriptors": trend.last_fds,
        "is_flat": "too short to tell" if _is_short(samples) else "yes" if trend.is_flat(kind) else "no",
    }


def _is_short(samples: Sequence[Sample]) -> bool:
    return samples[-1].at_s < JUDGED_FROM_S


def _end_row(outcome: Outcome) -> Row:
    left = outcome.leftovers
    return {
        "blocks": outcome.num_blocks,
        "leaked_blocks": outcome.num_leaked_blocks,
        "ended": "under load" if outcome.was_drained else "idle",
        "exit_status": None if left is None else left.exit_status,
        "processes_left": None if left is None else len(left.processes),
        "files_left": None if left is None else len(left.files),
        "port_left_open": None if left is None else int(left.is_port_open),
    }


def wrongs(outcome: Outcome) -> list[str]:
    """Every way in which the promise was broken, a line each."""
    tally, left = outcome.tally, outcome.leftovers
    found = [outcome.problem] if outcome.problem else []
    found += [f"{record.fault}: {record.problem}" for record in outcome.records if record.problem]
    if tally.lost:
        found.append(f"{len(tally.lost)} request(s) were lost")
    if tally.mismatches:
        found.append(f"{len(tally.mismatches)} answer(s) differ from the undisturbed ones")
    if not tally.num_finished:
        found.append("no request finished")
    if outcome.problem:
        return found  # the end was none that could be looked at
    if outcome.num_leaked_blocks is None:
        found.append("the server did not come to rest")
    elif outcome.num_leaked_blocks:
        found.append(f"{outcome.num_leaked_blocks} block(s) were leaked")
    if left is None or not left.is_clean:
        found.append(f"the end was not clean: {left}")
    return found + [f"{kind}: memory or file descriptors grow" for kind in KINDS if _grows(outcome, kind)]


def _grows(outcome: Outcome, kind: str) -> bool:
    samples = outcome.samples.get(kind, [])
    trend = trend_of(samples)
    return trend is not None and not _is_short(samples) and not trend.is_flat(kind)


def _details(tally: Tally) -> list[str]:
    return [*tally.lost[:_NUM_SHOWN], *map(str, tally.mismatches[:_NUM_SHOWN])]


def require_kept(outcome: Outcome) -> None:
    """Raises InternalError, in one line, if the server broke its promise."""
    if found := wrongs(outcome):
        raise InternalError(f"chaos: {'; '.join(found)}")
