"""Workers that compute nothing: they keep slots, blocks and transfers as proto/worker.proto says, and check each read.

A block's place holds the identity of the token whose KV was written there: a hash over the sequence up to it. A row
that reads another identity than its own sequence's would attend to somebody else's past.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from octavo.coordinator.core.batch_plan import BatchPlan, SlotJoin
from octavo.coordinator.core.beam_search import Candidates
from octavo.coordinator.core.sequence import RequestKey

Sampler = Callable[[RequestKey, list[int]], int]  # of an output's key and its tokens so far: the next


def candidates_after(token_ids: list[int], num_candidates: int, vocab_size: int = 40) -> Candidates:
    """A 'model' for beams: the next tokens hang on all tokens so far."""
    generator = np.random.default_rng([len(token_ids), *token_ids])
    logprobs = np.log(generator.dirichlet(np.ones(vocab_size))).astype(np.float32)
    best = np.argsort(-logprobs, kind="stable")[:num_candidates]
    return Candidates(best.tolist(), logprobs[best])


@dataclass(slots=True)
class ShadowSlot:
    key: RequestKey  # of the output
    num_candidates: int  # of a beam; 0: no beam
    token_ids: list[int]
    num_computed: int
    block_ids: list[int]
    identities: list[int] = field(default_factory=list)  # of the tokens, as far as they were asked for

    def identity(self, position: int) -> int:
        while len(self.identities) <= position:
            before = self.identities[-1] if self.identities else 0
            self.identities.append(hash((before, self.token_ids[len(self.identities)])))
        return self.identities[position]


@dataclass(slots=True)
class ShadowResult:
    """What a step gives: tokens of the rows that sample, candidates of those that are beams."""

    step_id: int
    token_ids: list[int]
    candidates: dict[int, Candidates]
    has_rows: bool


class ShadowWorker:
    """One group's workers."""

    def __init__(self, block_size: int, num_blocks: int, num_host_blocks: int, sample: Sampler) -> None:
        self._block_size = block_size
        self._blocks: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._host: list[list[int | None]] = [[None] * block_size for _ in range(num_host_blocks)]
        self._sample = sample
        self._slots: dict[int, ShadowSlot] = {}
        self._decode_slots: list[int] = []
        self._transfers: deque[tuple[int, list[tuple[int, int, list[int | None]]], list[tuple[int, int]]]] = deque()
        self._finished = 0
        self._guarded: dict[
            int, int
        ] = {}  # blocks in a transfer, and the step whose transfers must be known to have ended

    def apply(self, plan: BatchPlan, tokens_of: Callable[[SlotJoin], tuple[RequestKey, int]]) -> ShadowResult:
        """Does what the plan says, in the order of the protocol."""
        for slot in plan.leave_slots:
            del self._slots[slot]
        for join in plan.joins:
            self._join(join, *tokens_of(join))
        for slot, block_id in zip(plan.append_slots, plan.append_block_ids, strict=True):
            self._slots[slot].block_ids.append(block_id)
        for slot, token_id in plan.amends.items():
            self._amend(self._slots[slot], token_id)
        assert plan.finished_transfers <= self._finished
        self._guarded = {block: step for block, step in self._guarded.items() if step > plan.finished_transfers}
        self._begin_transfers(plan)
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets), "a block is copied to twice"
        assert not {source for source, _ in plan.copies} & set(targets)
        for source, target in plan.copies:
            assert target not in self._guarded  # what is being saved may be read; what is being loaded holds nothing
            self._blocks[target] = list(self._blocks[source])
        if plan.decode_slots_changed:
            self._decode_slots = list(plan.decode_slots)
        assert self._decode_slots == plan.decode_slots, "the workers would decode other slots"
        return self._step(plan)

    def _join(self, join: SlotJoin, key: RequestKey, num_candidates: int) -> None:
        assert join.slot not in self._slots, "a slot is taken twice"
        token_ids = np.frombuffer(join.token_ids, "=i4").tolist()
        assert join.num_computed_tokens < len(token_ids)
        slot = ShadowSlot(key, num_candidates, token_ids, join.num_computed_tokens, list(join.block_ids))
        self._slots[join.slot] = slot

    @staticmethod
    def _amend(slot: ShadowSlot, token_id: int) -> None:
        assert slot.num_computed == len(slot.token_ids) - 1
        slot.token_ids[-1] = token_id
        del slot.identities[slot.num_computed :]

    def _begin_transfers(self, plan: BatchPlan) -> None:
        saves = [(block, host, list(self._blocks[block])) for _, block, host in plan.transfers.saves]
        loads = [(block, host) for _, block, host in plan.transfers.loads]
        for block, _ in loads:
            self._blocks[block] = [None] * self._block_size
        for block in (*(save[0] for save in saves), *(load[0] for load in loads)):
            assert block not in self._guarded, "a block is in two transfers"
            self._guarded[block] = plan.step_id
        if saves or loads:
            self._transfers.append((plan.step_id, saves, loads))

    def finish_transfers(self, step_id: int) -> int:
        """All transfers up to those of `step_id` end now. Returns the last step of which that can be said."""
        while self._transfers and self._transfers[0][0] <= step_id:
            _, saves, loads = self._transfers.popleft()
            for block, host, content in saves:
                assert self._blocks[block] == content, "a block was written while it was saved"
                self._host[host] = content
            for block, host in loads:
                assert self._blocks[block] == [None] * self._block_size, "a block was written while it was loaded"
                self._blocks[block] = list(self._host[host])
        self._finished = max(self._finished, step_id)
        return self._finished

    def _step(self, plan: BatchPlan) -> ShadowResult:
        decodes = [(self._slots[slot], 1) for slot in self._decode_slots]
        chunks = [(self._slots[slot], n) for slot, n in zip(plan.chunk_slots, plan.chunk_num_tokens, strict=True)]
        for slot, _ in decodes:
            self._check_reads(slot)  # nothing that this step writes, but for its own token
        for slot, num_tokens in (*decodes, *chunks):
            self._write(slot, num_tokens)
        result = ShadowResult(plan.step_id, [], {}, bool(plan.rows))
        for slot, num_tokens in (*decodes, *chunks):
            slot.num_computed += num_tokens
            self._check_reads(slot)
            if slot.num_computed == len(slot.token_ids):
                self._take_sample(slot, result)
        return result

    def _write(self, slot: ShadowSlot, num_tokens: int) -> None:
        end = slot.num_computed + num_tokens
        assert end <= len(slot.token_ids), "a token is computed before it is sampled"
        assert end <= len(slot.block_ids) * self._block_size, "KV without a block"
        for position in range(slot.num_computed, end):
            block_id = slot.block_ids[position // self._block_size]
            assert block_id not in self._guarded, "a block is written whose transfer is not known to be done"
            self._blocks[block_id][position % self._block_size] = slot.identity(position)

    def _check_reads(self, slot: ShadowSlot) -> None:
        for position in range(slot.num_computed):
            content = self._blocks[slot.block_ids[position // self._block_size]]
            assert content[position % self._block_size] == slot.identity(position), "a row reads another's past"

    def _take_sample(self, slot: ShadowSlot, result: ShadowResult) -> None:
        if slot.num_candidates:
            candidates = candidates_after(slot.token_ids, slot.num_candidates)
            result.candidates[len(result.token_ids)] = candidates
            token_id = candidates.token_ids[0]
        else:
            token_id = self._sample(slot.key, slot.token_ids)
        result.token_ids.append(token_id)
        slot.token_ids.append(token_id)
