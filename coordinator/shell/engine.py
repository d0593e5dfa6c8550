"""The engine: carries events between gateways, the scheduler and the worker groups."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ...errors import FailedPreconditionError, InternalError, OctavoError, UnavailableError
from ...proto import admin_pb2, engine_pb2, worker_pb2
from ..core.block_manager import num_blocks_for
from ..core.scheduler import Scheduler
from ..core.scheduler_config import SchedulerConfig
from ..core.sequence import RequestKey
from ..core.step_outcome import PromptScores, StepReport
from ..core.worker_group import GroupMemory
from .codec import candidates_of, decode_submit, num_rows, skip_rows, unpack
from .group_runner import GroupEvents, GroupRunner
from .session import Session
from .status import engine_counters, group_status

_log = logging.getLogger(__name__)

_NO_SCORE = "the model's scores for the next token are not finite, so none could be sampled; other requests go on"


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
            )
        )
        self._runners: dict[int, GroupRunner] = {}
        self._sessions: dict[int, Session] = {}
        self._session_ids = itertools.count(1)
        self._epochs = itertools.count(1)
        self._num_failed = 0
        self._started_at = time.monotonic()
        self._serving = asyncio.Event()

    # Worker groups

    async def add_group(self, request: engine_pb2.AddGroupRequest, report: Callable[[str, float], Any]) -> GroupMemory:
        """Configures a group and admits it to scheduling; returns what it has room for. Raises WorkerError if a rank
        can't."""
        if request.group_id in self._runners:
            raise FailedPreconditionError(f"group {request.group_id} exists already")
        events = GroupEvents(self._take_result, self._lose_group)
        runner = GroupRunner(request, next(self._epochs), self.scheduler, events)
        self._runners[request.group_id] = runner
        try:
            memory = await runner.link.configure(report)
            self._check_holds_a_sequence(request.group_id, memory.num_blocks)
            self.scheduler.add_group(request.group_id, memory)
        except BaseException:
            del self._runners[request.group_id]
            await runner.close()
            raise
        runner.start()
        self._serving.set()
        self._wake_groups()
        return memory

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
        """A rank failed, and with it its group. Its sequences wait for another; without one, every request ends."""
        _log.error("group %d failed: %s", group_id, error)
        self.scheduler.remove_group(group_id)
        if self.scheduler.groups:
            self._wake_groups()
            return
        self._serving.clear()
        self._fail_all(UnavailableError("the workers failed; no group is left to serve this request"))

    def _fail_all(self, error: OctavoError) -> None:
        keys = self.scheduler.unfinished_requests()
        self._num_failed += len({self.scheduler.samples(key) for key in keys})
        for key in keys:
            self.scheduler.drop(key)
            self._sessions[key.session_id].add_failure(key.handle, error)
        self._flush()

    def _fail_request(self, key: RequestKey, error: OctavoError) -> None:
        self._num_failed += 1
        self._sessions[key.session_id].add_failure(key.handle, error)

    def _wake_groups(self) -> None:
        for runner in self._runners.values():
            runner.wake()

    # Sessions

    async def open_session(self) -> Session:
        """Waits until a group serves: before, nobody could say which requests fit."""
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
                self._fail_request(RequestKey(session.session_id, submit.handle), error)
        for handle in unpack(request.cancel_handles, "<u4", "cancel_handles"):
            self.scheduler.cancel(RequestKey(session.session_id, handle))
        for handle in unpack(request.stop_handles, "<u4", "stop_handles"):
            self.scheduler.stop(RequestKey(session.session_id, handle))
        session.flush()
        self._wake_groups()

    def _submit(self, session: Session, submit: engine_pb2.Submit) -> None:
        if not self.scheduler.groups:
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
        if self.scheduler.waiting:  # one that this group preempted may belong in another, which may be idle
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
            groups=[group_status(runner, self.scheduler, self.config) for runner in self._runners.values()],
            num_gateways=len(self._sessions),
            counters=engine_counters(self.scheduler.counters, self._num_failed),
        )

    async def close(self) -> None:
        self._fail_all(UnavailableError("the server is shutting down"))
        for runner in self._runners.values():
            await runner.close()
