"""When the next step is planned: late, and in time."""

import asyncio
from types import SimpleNamespace

import pytest
from octavo.coordinator.core.step_lead import StepLead
from octavo.coordinator.core.worker_group import GroupMemory, WorkerGroup


def test_short_steps_are_planned_at_once():
    assert StepLead().hold_ms(0.0) == 0.0
    assert StepLead().hold_ms(1.3) == 0.0


def test_long_steps_leave_time_and_may_end_a_little_early():
    assert StepLead().hold_ms(20.0) == pytest.approx(20.0 - 2.0 - 1.2)


def test_who_lets_the_workers_wait_plans_earlier_for_a_while():
    lead = StepLead()
    holds = []
    for idle_ms in [4.0, 0.4, *[0.1] * 100]:
        lead.observe(idle_ms)
        holds.append(lead.hold_ms(100.0))
    assert holds[1] < holds[0] < 88.8
    assert holds[2:] == sorted(holds[2:])
    assert holds[-1] == pytest.approx(88.8)
    for _ in range(100):
        lead.observe(50.0)
    assert lead.hold_ms(100.0) == 90.0 - 24.0


def test_a_step_without_rows_holds_nothing_back():
    group = WorkerGroup(0, GroupMemory(num_blocks=8), block_size=16, max_num_seqs=2)
    for _ in range(2):
        plan = group.begin_step()
        plan.rows = [SimpleNamespace(sequence=SimpleNamespace(dispatch=lambda *_: None), num_tokens=1, samples=True)]
        group.dispatch(plan)
        group.take_result(9000)
    plan.step_id = 3
    group.dispatch(plan)
    assert group.expected_ms == 9.0
    group.take_result(9000)
    group.dispatch(group.begin_step())
    assert group.expected_ms == 0.0


@pytest.mark.parametrize(("itl_target_ms", "joins_at_step"), [(10.0, 6), (0.0, 7)])
def test_the_next_step_has_who_comes_while_one_runs(itl_target_ms, joins_at_step, cluster, submit, run):
    """The worker says that its steps take a minute. Without a target, the step behind one is sent at once."""

    async def main():
        async with cluster(num_ranks=1, num_inflight_steps=2, itl_target_ms=itl_target_ms) as it:
            (worker,) = it.workers
            worker.model_time_us, worker.hold_at_step = 60_000_000, 5
            await it.add_group()
            session = await it.session()
            await session.submit(submit(1, max_tokens=30))
            while len(worker.plans) < 5:
                await asyncio.sleep(0.01)
            await session.submit(submit(2, max_tokens=3))
            while not it.engine.scheduler.waiting:
                await asyncio.sleep(0.01)
            worker.hold.set()
            await session.read_until_done(2)
            assert [plan.step_id for plan in worker.plans if plan.joins] == [1, joins_at_step]

    run(main())
