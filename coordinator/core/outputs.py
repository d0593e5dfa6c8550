"""The outputs that have not ended: which there are, and how each ends, wherever its sequence is."""

from collections.abc import Collection, Mapping

from ...errors import InvalidArgumentError
from .ordered_sequences import WaitingQueue
from .scheduler_counters import SchedulerCounters
from .sequence import FinishReason, RequestKey, Sequence
from .sequence_group import BeamOutput, SequenceGroup
from .suspects import Suspects
from .worker_group import WorkerGroup


class Outputs:
    """The Scheduler's part that ends sequences. Owner of the table of outputs by key."""

    def __init__(
        self,
        groups: Mapping[int, WorkerGroup],
        waiting: WaitingQueue,
        suspects: Suspects,
        counters: SchedulerCounters,
    ) -> None:
        """Where sequences are: in groups, waiting, or on trial."""
        self._groups, self._waiting, self._suspects, self._counters = groups, waiting, suspects, counters
        self._outputs: dict[RequestKey, SequenceGroup] = {}

    @property
    def keys(self) -> list[RequestKey]:
        return list(self._outputs)

    @property
    def requests(self) -> set[SequenceGroup]:
        return set(self._outputs.values())

    def samples(self, key: RequestKey) -> SequenceGroup:
        """The request with that output."""
        return self._outputs[key]

    def open(self, samples: SequenceGroup) -> None:
        """Those of a new request. Raises InvalidArgumentError if others have their keys."""
        if taken := [key.handle for key in samples.keys if key in self._outputs]:
            raise InvalidArgumentError(f"handles {taken} are other requests'", field="handle")
        self._outputs |= dict.fromkeys(samples.keys, samples)

    # Ends

    def end(self, key: RequestKey, reason: FinishReason | None) -> None:
        """Of one, and of all of a beam search, unless it has ended; without `reason` it could not be served."""
        samples = self._outputs.get(key)
        if samples is None:
            return
        if samples.beams is not None:
            self._end_beams(samples, reason or FinishReason.CANCELLED)
        else:
            self._end_sample(samples.sequence(key), reason or FinishReason.CANCELLED)
        samples.has_failed |= reason is None
        if not samples.sequences:
            self._count_end(samples, reason)

    def complete(self, sequence: Sequence, reason: FinishReason) -> None:
        """A sample has all its tokens."""
        self._end_sample(sequence, reason)
        if not sequence.samples.sequences:
            self._count_end(sequence.samples, reason)

    def complete_beams(self, samples: SequenceGroup) -> list[BeamOutput]:
        """A search has ended; its outputs."""
        assert samples.beams is not None
        self._end_beams(samples, FinishReason.STOP)
        self._count_end(samples, FinishReason.STOP)
        outputs = samples.beams.outputs()
        self._counters.num_output_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence, wherever it is; the output of a beam goes on without it."""
        samples = sequence.samples
        samples.sequences.remove(sequence)
        if sequence.is_running:
            keep = bool(samples.sequences) or not samples.request.is_private
            self._groups[sequence.group_id].leave(sequence, keep)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in samples.held:
            samples.held.remove(sequence)
        else:
            self._suspects.remove(sequence)
        sequence.finish(reason)

    def _end_sample(self, sequence: Sequence, reason: FinishReason) -> None:
        self.finish(sequence, reason)
        del self._outputs[sequence.key]
        samples = sequence.samples
        if samples.held and len(samples.held) == len(samples.sequences):  # the one that was to lead them is gone
            self._waiting.add(samples.held.pop(0))

    def _end_beams(self, samples: SequenceGroup, reason: FinishReason) -> None:
        """Its outputs are made together, and end together."""
        assert samples.beams is not None
        for beam in list(samples.sequences):
            self.finish(beam, reason)
        samples.beams.interrupt()
        for key in samples.keys:
            del self._outputs[key]

    def _count_end(self, samples: SequenceGroup, reason: FinishReason | None) -> None:
        """Of a request, once: by whether an output failed, else by how its last one ended."""
        is_cancelled = reason is FinishReason.CANCELLED
        self._counters.num_failed += samples.has_failed
        self._counters.num_cancelled += is_cancelled and not samples.has_failed
        self._counters.num_finished += not (is_cancelled or samples.has_failed)

    # Checks

    def check_invariants(self, elsewhere: Collection[Sequence]) -> list[Sequence]:
        """For tests: raises AssertionError if an open sequence is not in one place. `elsewhere`: those that are in a
        group or a queue. Returns those that are held."""
        requests = self.requests
        held = [sequence for samples in requests for sequence in samples.held]
        forks = [child for samples in requests if samples.beams for _, child in samples.beams.forks]
        unfinished = [sequence for samples in requests for sequence in samples.sequences]
        assert len(unfinished) == len(set(unfinished)), "a sequence is in two places"
        assert {*elsewhere, *held, *forks} == set(unfinished), "a sequence is nowhere, or still somewhere"
        assert len(unfinished) == len(elsewhere) + len(held) + len(forks)
        return held
