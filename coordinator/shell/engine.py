"""The engine: carries events between gateways, the scheduler and the worker groups."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection
from importlib.metadata import version
from typing import Any

from ...errors import FailedPreconditionError, InternalError, OctavoError, UnavailableError
from ...proto import admin_pb2, engine_pb2, worker_pb2
from ..core.block_manager import num_blocks_for
from ..core.membership import GroupState, Membership
from ..core.scheduler import Scheduler
from ..core.scheduler_config import SchedulerConfig
from ..core.sequence import RequestKey, Sequence
from ..core.step_deadlines import StepDeadlines
from ..core.step_outcome import PromptScores, StepReport
from ..core.worker_group import GroupMemory
from .block_copier import BlockCopier
from .codec import candidates_of, decode_submit, num_rows, skip_rows, unpack
from .group_runner import GroupEvents, GroupRunner
from .mover import Mover
from .session import Session
from .status import engine_counters, failure_of, group_status
from .worker_error import WorkerError

_log = logging.getLogger(__name__)

_NO_SCORE = "the model's scores for the next token are not finite, so none could be sampled; other requests go on"
_POISON = "the forward pass failed each time that it came to this request, the last time alone with it; others go on"


class Engine:
    """Owner of the scheduler, the sessions and the group runners. All methods run on one event loop."""

    def __init__(self, config: engine_pb2.EngineConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(
            SchedulerConfig(
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                max_num_waiting=config.max_num_waiting,
                num_inflight_steps=config.num_inflight_steps,
                itl_target_ms=config.itl_target_ms,
                copies_blocks=True,
            )
        )
        self._membership = Membership(config.rebuilds_groups, config.incarnation)
        self._runners: dict[int, GroupRunner] = {}  # of the groups' last incarnations
        self._copier = BlockCopier(self.scheduler, lambda group_id: self._runners[group_id].link)
        self._mover = Mover(self.scheduler, self._copier, self._wake_groups)
        self._sessions: dict[int, Session] = {}
        self._session_ids = itertools.count(1)
        self._num_refused = 0
        self.is_closing = False
        self._started_at = time.monotonic()
        self._serving = asyncio.Event()
        self._failed = asyncio.Event()  # for those who wait for the next failure
        self._stirred = asyncio.Event()  # likewise for anything that may empty a group

    # Worker groups

    async def add_group(self, request: engine_pb2.AddGroupRequest, report: Callable[[str, float], Any]) -> GroupMemory:
        """Configures a group, or rebuilds one that failed, and admits it to scheduling; returns what it has room for.

        Raises WorkerError if a rank can't: a new group is forgotten then, a failed one has failed again.
        """
        epoch = self._membership.begin(request.group_id, request.has_served).epoch
        self._open_to_sessions()
        try:
            runner = await self._replace_runner(request, epoch)
            memory = await runner.configure(report)
            self._check_holds_a_sequence(request.group_id, memory.num_blocks)
            self.scheduler.add_group(request.group_id, memory)
        except BaseException as error:
            await self._drop_start(request.group_id, str(error) or "its start was cancelled")
            raise
        self._membership.admit(request.group_id)
        runner.start()
        self._open_to_sessions()
        self._settle_requests()
        return memory

    def _open_to_sessions(self) -> None:
        """Once a group serves, or one that did is rebuilt: as when the only group fails, requests wait for it."""
        if self._membership.has_prospects:
            self._serving.set()

    async def _replace_runner(self, request: engine_pb2.AddGroupRequest, epoch: int) -> GroupRunner:
        """The last incarnation's streams have ended when the next one's ranks are configured."""
        previous = self._runners.get(request.group_id)
        events = GroupEvents(self._take_result, self._lose_group, self._mover.begin)
        deadlines = previous.deadlines if previous is not None else StepDeadlines(self.config.step_timeout_s)
        runner = GroupRunner(request, epoch, self.scheduler, events, deadlines)
        self._runners[request.group_id] = runner
        if previous is not None:
            await previous.close()
        return runner

    async def _drop_start(self, group_id: int, why: str) -> None:
        self._membership.fail(group_id, why)
        runner = self._runners[group_id]
        if group_id not in self._membership.groups:
            del self._runners[group_id]
        self._tell_failure()
        await runner.close()

    def _check_holds_a_sequence(self, group_id: int, num_blocks: int) -> None:
        """Raises FailedPreconditionError if the longest request could never run: most name no bound."""
        block_size, max_model_len = self.config.block_size, self.config.max_model_len
        needed = num_blocks_for(max_model_len - 1, block_size)  # the last token's KV is never written
        if num_blocks < needed:
            raise FailedPreconditionError(
                f"one sequence of max_model_len {max_model_len} needs {needed} KV blocks of {block_size} tokens, and "
                f"group {group_id} has {num_blocks}: set --max-model-len to at most {num_blocks * block_size}, or give "
                "the KV cache more memory"
            )

    def _lose_group(self, group_id: int, error: OctavoError) -> None:
        """A rank failed, and with it its group: its epoch is over. Its sequences wait for another group, or for this
        one to be rebuilt; if nobody does that, every request ends."""
        _log.error("group %d failed: %s", group_id, error)
        ended = self.scheduler.remove_group(group_id, error.step_id if isinstance(error, WorkerError) else 0)
        for key in ended:
            _log.error("group %d: a request ended, since its steps are what fails", group_id)
            self._fail_request(key, InternalError(f"{_POISON}: {error}"))
        self._flush()
        self._membership.fail(group_id, str(error), is_explained=bool(ended))
        self._copier.notice()
        self._tell_failure()
        self._settle_requests()

    def abandon_group(self, group_id: int) -> None:
        """A failed group will not come back. Raises FailedPreconditionError for one that has not failed."""
        self._membership.abandon(group_id)
        self._settle_requests()

    async def remove_group(self, group_id: int, report: Callable[[int], Any]) -> None:
        """Has what a group runs go on elsewhere; forgets the group when nothing of it is left, or when it fails
        meanwhile; one that has failed already, at once. `report(num_running)` when that number has changed.

        Raises NotFoundError for a group that there is not; FailedPreconditionError for one that neither serves nor has
        failed, and for the last one that serves, also when it becomes the last while it drains: then it serves on.
        Without the caller the group goes on draining, and the next call waits for it.
        """
        state = self._membership.state(group_id)
        if state is GroupState.FAILED:
            self._membership.remove(group_id)
            self._settle_requests()
        elif state is not GroupState.DRAINING:
            self._membership.drain(group_id)
            self.scheduler.drain_group(group_id)
            self._wake_groups()
        await self._until_drained(group_id, report)
        if runner := self._runners.pop(group_id, None):
            await runner.close()

    async def _until_drained(self, group_id: int, report: Callable[[int], Any]) -> None:
        num_reported = -1
        while member := self._membership.groups.get(group_id):
            if member.state is not GroupState.DRAINING:
                raise FailedPreconditionError(
                    f"group {group_id} serves on: it is the last one, since the others failed"
                )
            group = self.scheduler.groups[group_id]
            if self.scheduler.is_drained(group_id):  # its runner is closed before it runs again
                self.scheduler.remove_group(group_id)
                self._membership.remove(group_id)
                return
            if len(group.running) != num_reported:
                num_reported = len(group.running)
                report(num_reported)
            await self._stirred.wait()

    def _settle_requests(self) -> None:
        """What has become of the groups decides what becomes of the requests."""
        if not self._membership.has_prospects:
            for group_id in self._membership.cancel_drains():
                self.scheduler.drain_group(group_id, is_draining=False)
        if self._membership.has_prospects:
            if self._membership.is_settled:
                self._fail_misfits()
        else:
            self._serving.clear()
            self._fail_all(UnavailableError("the workers failed; no group is left to serve this request"))
        self._wake_groups()

    def _tell_failure(self) -> None:
        self._failed.set()
        self._failed = asyncio.Event()

    async def await_failures(self, known_epochs: Collection[int]) -> engine_pb2.AwaitFailureResponse:
        """Waits for groups that failed, that nobody rebuilds and that are not known; says which, and why."""
        while not (news := [m for m in self._membership.awaiting_rebuild if m.epoch not in known_epochs]):
            await self._failed.wait()
        return engine_pb2.AwaitFailureResponse(
            failures=[failure_of(member, self._runners[member.group_id]) for member in news]
        )

    def _fail_all(self, error: OctavoError) -> None:
        for key in self.scheduler.unfinished_requests():
            self.scheduler.drop(key)
            self._sessions[key.session_id].add_failure(key.handle, error)
        self._flush()

    def _fail_misfits(self) -> None:
        for key, error in self.scheduler.misfits().items():
            self.scheduler.drop(key)
            self._fail_request(key, error)
        self._flush()

    def _fail_request(self, key: RequestKey, error: OctavoError) -> None:
        self._sessions[key.session_id].add_failure(key.handle, error)

    def _wake_groups(self) -> None:
        for runner in self._runners.values():
            runner.wake()
        self._stirred.set()
        self._stirred = asyncio.Event()

    async def copy_sequence_blocks(self, sequence: Sequence, from_group: int, to_group: int) -> int:
        """As BlockCopier.copy_sequence_blocks: before a sequence is moved, while it runs on."""
        num_blocks = await self._copier.copy_sequence_blocks(sequence, from_group, to_group)
        self._wake_groups()  # blocks were let go
        return num_blocks

    # Sessions

    async def open_session(self) -> Session:
        """Waits until a group serves or has served: before, nobody could say which requests fit."""
        await self._serving.wait()
        session = Session(next(self._session_ids))
        self._sessions[session.session_id] = session
        return session

    def close_session(self, session: Session) -> None:
        """The gateway is gone, and with it the readers of its requests."""
        del self._sessions[session.session_id]
        for key in self.scheduler.unfinished_requests():
            if key.session_id == session.session_id:
                self.scheduler.cancel(key)
        self._wake_groups()

    def take_request(self, session: Session, request: engine_pb2.SessionRequest) -> None:
        """Accepts, refuses and cancels what one message asks for."""
        for submit in request.submits:
            try:
                self._submit(session, submit)
            except OctavoError as error:
                self._num_refused += 1
                self._fail_request(RequestKey(session.session_id, submit.handle), error)
        if self._membership.is_settled and any(submit.resumed for submit in request.submits):
            self._fail_misfits()
        for handle in unpack(request.cancel_handles, "<u4", "cancel_handles"):
            self.scheduler.cancel(RequestKey(session.session_id, handle))
        for handle in unpack(request.stop_handles, "<u4", "stop_handles"):
            self.scheduler.stop(RequestKey(session.session_id, handle))
        session.flush()
        self._wake_groups()

    def _submit(self, session: Session, submit: engine_pb2.Submit) -> None:
        if not self._membership.has_prospects:
            raise UnavailableError("no worker group is left to serve this request")
        share_prefixes = self.config.enable_prefix_caching
        self.scheduler.add(decode_submit(session.session_id, submit, self.config.vocab_size, share_prefixes))

    # Steps

    def _take_result(self, group_id: int, result: worker_pb2.StepResult) -> None:
        scores = [PromptScores(chunk.chunk, chunk.start, num_rows(chunk.table)) for chunk in result.prompt_logprobs]
        logprobs = {row.row: row.table for row in result.logprobs}
        report = StepReport(
            unpack(result.token_ids, "<i4", "token_ids"),
            scores,
            lambda row: candidates_of(logprobs[row]),
            result.model_time_us,
            result.finished_transfers,
            unpack(result.failed_rows, "<u4", "failed_rows"),
        )
        outcome = self.scheduler.update(group_id, report)
        self._copier.notice()
        for accepted in outcome.scores:
            chunk = result.prompt_logprobs[accepted.index]
            table = skip_rows(chunk.table, accepted.num_skipped)
            start = chunk.start + accepted.num_skipped
            self._sessions[accepted.key.session_id].add_prompt_logprobs(accepted.key.handle, start, table)
        for token in outcome.tokens:
            self._sessions[token.key.session_id].add_token(token, logprobs.get(token.row))
        for output in outcome.beams:
            self._sessions[output.key.session_id].add_beam(output)
        for key in outcome.failed:
            _log.error("group %d: a request ended, since no score for its next token was finite", group_id)
            self._fail_request(key, InternalError(_NO_SCORE))
        self._flush()
        if self.scheduler.has_newcomers:  # one that this group preempted may belong in another, which may be idle
            self._wake_groups()

    def _flush(self) -> None:
        for session in self._sessions.values():
            session.flush()

    # Status

    def status(self) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(
            version=version("octavo"),
            model=self.config.model,
            uptime_s=time.monotonic() - self._started_at,
            num_waiting=len(self.scheduler.waiting),
            groups=[
                group_status(member, self._runners[group_id], self.scheduler, self.config)
                for group_id, member in self._membership.groups.items()
            ],
            num_gateways=len(self._sessions),
            counters=engine_counters(self.scheduler.counters, self._num_refused),
        )

    async def close(self) -> None:
        """Ends every request, unless another coordinator may follow: then the gateways keep them for that one."""
        self.is_closing = True
        if not self.config.rebuilds_groups:
            self._fail_all(UnavailableError("the server is shutting down"))
        await self._mover.close()
        for runner in list(self._runners.values()):  # one that is to leave may do so meanwhile
            await runner.close()
