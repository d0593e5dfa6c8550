"""A scheduler driven by text: each line is an event, and what it decides is printed below it."""

from array import array

import pytest
from octavo.coordinator.core.batch_plan import BatchPlan
from octavo.coordinator.core.scheduler import Scheduler, SchedulerConfig
from octavo.coordinator.core.sequence import Request, RequestKey, Sequence, StopConditions
from octavo.errors import OctavoError


class ScriptedScheduler:
    """Runs commands against a Scheduler and describes what it decided.

    config KEY=N...            first line; keys of SchedulerConfig, and blocks=N, groups=N
    add NAME prompt=N [max=N] [min=N] [stop=T,T] [priority=N]
    cancel NAME
    schedule [GROUP]           the plan of the next step
    result [GROUP] [TOKEN...]  the oldest step's sampled tokens, in row order; 7 where not given
    lose GROUP                 a group is gone
    state                      what runs and what waits
    """

    def __init__(self) -> None:
        self._handles: dict[str, RequestKey] = {}
        self._sequences: dict[str, Sequence] = {}
        self.scheduler: Scheduler

    def run(self, line: str) -> str:
        command, *arguments = line.split()
        positional = [argument for argument in arguments if "=" not in argument]
        keywords = dict(argument.split("=") for argument in arguments if "=" in argument)
        try:
            out = getattr(self, f"do_{command}")(*positional, **keywords)
        except OctavoError as error:
            out = f"{type(error).__name__}: {error}"
        self.scheduler.check_invariants()
        return out

    def do_config(self, blocks: str, groups: str = "1", **options: str) -> str:
        self.scheduler = Scheduler(SchedulerConfig(**{key: int(value) for key, value in options.items()}))
        for group_id in range(int(groups)):
            self.scheduler.add_group(group_id, int(blocks))
        return ""

    def do_add(self, name, prompt, max="16", min="0", stop="", priority="0") -> str:  # noqa: A002
        key = RequestKey(0, len(self._handles))
        stops = frozenset(int(token) for token in stop.split(",") if token)
        conditions = StopConditions(int(max), int(min), stops)
        self.scheduler.add(Request(key, array("i", range(int(prompt))), conditions, int(priority), name))
        self._handles[name] = key
        self._sequences[name] = self.scheduler.sequence(key)
        return ""

    def do_cancel(self, name: str) -> str:
        self.scheduler.cancel(self._handles[name])
        return ""

    def do_schedule(self, group: str = "0") -> str:
        plan = self.scheduler.schedule(int(group))
        return "nothing" if plan is None else describe(plan)

    def do_result(self, *arguments: str) -> str:
        group = int(arguments[0]) if len(self.scheduler.groups) > 1 else 0
        tokens = [int(token) for token in arguments[len(self.scheduler.groups) > 1 :]]
        plan = self.scheduler.groups[group].inflight[0]
        tokens += [7] * (sum(row.samples for row in plan.rows) - len(tokens))
        outcome = self.scheduler.update(group, tokens)
        return (
            ", ".join(
                f"{self.name(token.key)}={token.token_id}"
                + (f" {token.finish_reason.name}" if token.finish_reason else "")
                for token in outcome.tokens
            )
            or "no tokens"
        )

    def do_lose(self, group: str) -> str:
        self.scheduler.remove_group(int(group))
        return ""

    def do_state(self) -> str:
        groups = [
            f"group {group.group_id}: {' '.join(s.request.sampling for s in group.running) or '-'}, "
            f"{group.blocks.num_free_blocks} blocks free"
            for group in self.scheduler.groups.values()
        ]
        waiting = " ".join(sequence.request.sampling for sequence in self.scheduler.waiting) or "-"
        return "; ".join([*groups, f"waiting: {waiting}"])

    def name(self, key: RequestKey) -> str:
        return next(name for name, other in self._handles.items() if other == key)


def describe(plan: BatchPlan) -> str:
    rows = [row.sequence.request.sampling for row in plan.rows]
    decodes, chunks = rows[: len(plan.decode_slots)], rows[len(plan.decode_slots) :]
    sizes = [f"{name}+{n}" for name, n in zip(chunks, plan.chunk_num_tokens, strict=True)]
    parts = [f"step {plan.step_id}"]
    for label, values in (
        ("leave", plan.leave_slots),
        ("join", [f"{join.sampling}@{join.slot}" for join in plan.joins]),
        ("grow", plan.append_slots),
        ("decode", decodes),
        ("chunk", sizes),
    ):
        if values:
            parts.append(f"{label} {' '.join(map(str, values))}")
    return ": ".join((parts[0], ", ".join(parts[1:])))


@pytest.fixture
def scripted() -> ScriptedScheduler:
    return ScriptedScheduler()
