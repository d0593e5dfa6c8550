"""Finds the request that fails its group each time, so that it fails alone.

Who had rows in the step in which a group failed is a suspect. One whose next failure comes at the same
point, with not a token more than it had, is accused: it waits apart, and runs alone in a group until it is past that
point. If the group fails then, that is the one, and who was accused with it goes free. A failure that hits by
chance, as the death of a process under load, accuses hardly anybody: streams make progress in between.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from .batch_plan import BatchPlan
from .ordered_sequences import OrderedSequences, WaitingQueue
from .sequence import Sequence, SequenceStatus
from .sequence_group import SequenceGroup
from .worker_group import WorkerGroup

# What fails a step: a sample of a request, or all beams of one, which run together.
Suspect = Sequence | SequenceGroup
# Times that a group with other work leaves a trial to an emptier one: there may be none, and a trial stops all else.
_MAX_REFUSALS = 256


def _suspect(sequence: Sequence) -> Suspect:
    return sequence if sequence.samples.beams is None else sequence.samples


def _leader(suspect: Suspect) -> Sequence:
    """The one that waits for all."""
    return suspect if isinstance(suspect, Sequence) else suspect.sequences[0]


def _point(suspect: Suspect) -> int:
    """How far it has come, in known tokens; the beams of a request are all as far."""
    return _leader(suspect).num_tokens


def _has_ended(suspect: Suspect) -> bool:
    if isinstance(suspect, Sequence):
        return suspect.status is SequenceStatus.FINISHED
    return not suspect.sequences


@dataclass(frozen=True, slots=True)
class _Trial:
    """Of one suspect, in one group."""

    suspect: Suspect
    point: int  # that it must get past
    failure: int  # that accused it
    queue: OrderedSequences = field(default_factory=OrderedSequences)  # its leader, until it runs

    @property
    def is_over(self) -> bool:
        return _has_ended(self.suspect) or _point(self.suspect) > self.point


class Suspects:
    """Owner of what failures say of sequences, and of the trials. Sequences on trial, or accused, wait here."""

    def __init__(self, waiting: WaitingQueue, preempt: Callable[[Sequence, str], None]) -> None:
        """`preempt` has a running sequence wait in `waiting`, and the beams beside it."""
        self._waiting, self._preempt = waiting, preempt
        self._num_failures = 0
        self._points: dict[Suspect, int] = {}  # of suspects at their last failure
        self._accused: dict[Suspect, int] = {}  # and the failure that accused each, by number
        self._trials: dict[int, _Trial] = {}  # by group
        self._num_refusals = 0

    # Failures

    @staticmethod
    def of_step(inflight: Collection[BatchPlan], step_id: int) -> list[Suspect]:
        """Who has rows in that step of those in flight; in the oldest, if it is none of them."""
        plan = next((plan for plan in inflight if plan.step_id == step_id), next(iter(inflight), None))
        rows = plan.rows if plan is not None else []
        return list(dict.fromkeys(_suspect(row.sequence) for row in rows if not row.is_stale))

    def judge(self, group_id: int, suspects: Collection[Suspect]) -> list[Sequence]:
        """A group has failed in a step with `suspects`, and all of its sequences wait again. Returns those
        that are to end: the one that was on trial, and what would fail just so."""
        self._num_failures += 1
        self._points = {suspect: point for suspect, point in self._points.items() if not _has_ended(suspect)}
        trial = self._trials.pop(group_id, None)
        if trial is not None and trial.suspect in suspects and not trial.is_over:
            self._acquit(trial.failure)
            return self._like(trial.suspect)
        if trial is not None and not trial.is_over:  # it had not begun
            self._accuse(trial.suspect, trial.failure)
        for suspect in suspects:
            if self._points.get(suspect) == _point(suspect):
                self._accuse(suspect, self._num_failures)
            self._points[suspect] = _point(suspect)
        return []

    def _accuse(self, suspect: Suspect, failure: int) -> None:
        """It leaves the others that wait."""
        leader = _leader(suspect)
        if leader in self._waiting:
            self._waiting.remove(leader)
        self._accused[suspect] = failure

    def _acquit(self, failure: int) -> None:
        """It is explained. Should there be another such request, its next failure at the same point accuses it."""
        for suspect in [suspect for suspect, number in self._accused.items() if number == failure]:
            del self._accused[suspect]
            self._waiting.add(_leader(suspect))

    @staticmethod
    def _like(suspect: Suspect) -> list[Sequence]:
        """The suspect, and the samples that have to compute the same prompt and nothing else."""
        leader = _leader(suspect)
        if isinstance(suspect, SequenceGroup) or leader.num_output_tokens:
            return [leader]
        return [each for each in leader.samples.sequences if not each.num_output_tokens]

    # Trials

    def queue_for(self, group: WorkerGroup) -> OrderedSequences | None:
        """What `group` may admit now: what waits, or who is on trial there; None while it is to send nothing, because
        who is on trial shares it with nobody. Begins and ends trials."""
        trial = self._trials.get(group.group_id)
        if trial is None and self._accused and self._takes_trial(group):
            trial = self._begin(group)
        elif trial is not None and trial.is_over:
            trial = self._end(group)
        if trial is None:
            return self._waiting
        return None if group.inflight else self._queue_alone(group, trial)

    def _takes_trial(self, group: WorkerGroup) -> bool:
        """One that was just rebuilt has nothing else to do; one that has leaves it to such a one for a while. One that
        is to leave begins nothing new."""
        if group.is_draining:
            return False
        self._num_refusals += 1
        return not group.running or self._num_refusals > _MAX_REFUSALS

    def _end(self, group: WorkerGroup) -> _Trial | None:
        """Who was tried goes on beside the others, unless the next trial begins."""
        self._points.pop(self._trials.pop(group.group_id).suspect, None)
        return self._begin(group) if self._accused else None

    def _begin(self, group: WorkerGroup) -> _Trial:
        suspect = next(iter(self._accused))
        failure = self._accused.pop(suspect)
        trial = self._trials[group.group_id] = _Trial(suspect, _point(suspect), failure)
        trial.queue.add(_leader(suspect))
        self._num_refusals = 0
        return trial

    def _queue_alone(self, group: WorkerGroup, trial: _Trial) -> OrderedSequences:
        for sequence in list(group.running):
            if sequence.is_running and _suspect(sequence) is not trial.suspect:
                self._preempt(sequence, "another is tried alone")
        leader = _leader(trial.suspect)
        if leader in self._waiting:  # it was preempted itself
            self._waiting.remove(leader)
            trial.queue.add(leader)
        return trial.queue

    # Those that wait here

    @property
    def queued(self) -> list[Sequence]:
        return [*map(_leader, self._accused), *(each for trial in self._trials.values() for each in trial.queue)]

    def remove(self, sequence: Sequence) -> None:
        """It ends; it may be none that waits here."""
        suspect = _suspect(sequence)
        self._accused.pop(suspect, None)
        for trial in self._trials.values():
            if sequence in trial.queue:
                trial.queue.remove(sequence)
