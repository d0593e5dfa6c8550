"""What is kept, and what goes first."""

from array import array
from dataclasses import replace

import pytest
from octavo.coordinator.core.beam_search import BeamSearchParams
from octavo.coordinator.core.scheduler import Scheduler
from octavo.coordinator.core.scheduler_config import SchedulerConfig
from octavo.coordinator.core.sequence import Request, RequestKey, StopConditions
from octavo.coordinator.core.step_outcome import StepReport
from octavo.coordinator.core.worker_group import GroupMemory
from octavo.errors import InvalidArgumentError

CONFIG = SchedulerConfig(
    block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, max_num_waiting=100
)  # fmt: skip


def scheduler_of(*memories: GroupMemory) -> Scheduler:
    scheduler = Scheduler(CONFIG)
    for group_id, memory in enumerate(memories):
        scheduler.add_group(group_id, memory)
    return scheduler


def request(handle: int, num_prompt: int, salt: str, max_tokens: int = 1, **fields) -> Request:
    prompt = array("i", range(num_prompt))
    return Request(RequestKey(0, handle), prompt, StopConditions(max_tokens), salt=salt.encode(), **fields)


def run_all(scheduler: Scheduler) -> None:
    """Until group 0 has nothing more to do, saves included."""
    group = scheduler.groups[0]
    for _ in range(1000):
        while scheduler.schedule(0) is not None:
            pass
        if not group.inflight:
            break
        plan = group.inflight[0]
        scheduler.update(0, StepReport([7] * plan.num_samples, finished_transfers=plan.step_id))
    assert not group.inflight
    scheduler.check_invariants()


def test_a_prefix_on_the_host_loses_its_tail_first():
    """Also after it was found: without its start nothing behind it could be."""
    scheduler = scheduler_of(GroupMemory(num_blocks=64, num_host_blocks=8))
    blocks = scheduler.groups[0].blocks
    scheduler.add(request(0, 33, "s"))
    run_all(scheduler)
    scheduler.add(request(1, 33, "s"))
    run_all(scheduler)
    scheduler.add(request(2, 5, "other"))  # one block more than the host holds
    run_all(scheduler)
    scheduler.add(request(3, 33, "s"))
    sequence = scheduler.samples(RequestKey(0, 3)).sequences[0]
    assert blocks.host is not None
    held = [blocks.host.find(name) is not None for name in sequence.block_names(8)]
    assert held == [True] * 7 + [False]


def test_what_no_other_request_may_find_is_neither_kept_nor_saved():
    scheduler = scheduler_of(GroupMemory(num_blocks=64, num_host_blocks=8))
    scheduler.add(request(0, 33, "mine", is_private=True))
    run_all(scheduler)
    blocks = scheduler.groups[0].blocks
    assert (blocks.num_cached_blocks, blocks.counters.num_saved_blocks) == (0, 0)


def test_beams_must_fit_every_group():
    """One that is lost may leave them to the smallest."""
    scheduler = scheduler_of(GroupMemory(num_blocks=64), GroupMemory(num_blocks=12))
    beams = BeamSearchParams(num_beams=4)
    with pytest.raises(InvalidArgumentError, match=r"16 KV blocks .* a group has 12") as refused:
        scheduler.add(request(0, 5, "s", max_tokens=12, beam_search=beams))
    assert refused.value.field == "num_beams"
    scheduler.add(request(1, 5, "s", max_tokens=6, beam_search=beams))


def test_samples_of_a_long_prompt_share_it_until_they_differ():
    scheduler = scheduler_of(GroupMemory(num_blocks=64))
    asked = request(0, 100, "s", max_tokens=8, num_samples=5)
    scheduler.add(asked)
    sequences = scheduler.samples(asked.key).sequences
    assert all(sequence.token_ids is asked.prompt_token_ids for sequence in sequences)
    run_all(scheduler)
    assert len(asked.prompt_token_ids) == 100


def test_a_group_in_a_long_prefill_leaves_short_prompts_to_others():
    scheduler = Scheduler(replace(CONFIG, max_num_batched_tokens=8, max_model_len=2048, num_inflight_steps=8))
    for group_id in range(2):
        scheduler.add_group(group_id, GroupMemory(num_blocks=512))
    scheduler.add(request(0, 1800, "long"))
    assert scheduler.schedule(0).chunk_num_tokens == [8]
    for handle in range(1, 6):
        scheduler.add(request(handle, 4, f"short {handle}"))
        plan = scheduler.schedule(1)
        assert plan is not None
        assert len(plan.joins) == 1
