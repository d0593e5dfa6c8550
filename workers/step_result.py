"""A step's result on its way from the device to the wire."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..proto import sampling_pb2, worker_pb2
from .parallel import TensorParallel
from .sampler.logprobs import Logprobs
from .step_clock import StepClock


@dataclass(frozen=True, slots=True)
class ChunkLogprobs:
    """Logprobs of prompt tokens that one chunk computed."""

    chunk: int  # index into the plan's chunks
    start: int  # position in the prompt of the first row
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Logprobs of sampled tokens."""

    rows: tuple[int, ...]  # indexes into the step's sampled tokens, ascending
    counts: tuple[int, ...]  # likeliest tokens that each row asked for
    logprobs: Logprobs


class PendingResult:
    """A step that the device may still be running. Copies to the host are queued behind it when this is made."""

    def __init__(
        self,
        tp: TensorParallel,
        clock: StepClock,
        token_ids: torch.Tensor | None,
        rows: RowLogprobs | None,
        chunks: list[ChunkLogprobs],
    ) -> None:
        """token_ids: [num_samples], -1 for rows that failed; None: no row samples."""
        self._token_ids = None if token_ids is None else _to_host(token_ids.int())
        self._rows = None if rows is None else (rows, _logprobs_to_host(rows.logprobs))
        self._chunks = [(chunk, _logprobs_to_host(chunk.logprobs)) for chunk in chunks]
        self._tp, self._clock = tp, clock
        self._finished_transfers: Callable[[], int] = lambda: 0
        clock.stop()

    def report_transfers(self, finished: Callable[[], int]) -> None:
        """Has the result say what `finished` says when the device is done with the step."""
        self._finished_transfers = finished

    def wait(self) -> worker_pb2.StepResult:
        """Waits for the device; the caller fills in epoch and step_id. Raises UnavailableError if ranks lost touch."""
        model_time_us, idle_us = self._clock.wait_us()
        self._tp.check()
        finished_transfers = self._finished_transfers()
        result = worker_pb2.StepResult(
            model_time_us=model_time_us, idle_us=idle_us, finished_transfers=finished_transfers
        )
        if self._token_ids is not None:
            token_ids = self._token_ids.numpy()
            result.token_ids = token_ids.tobytes()
            if token_ids.min(initial=0) < 0:
                result.failed_rows = np.flatnonzero(token_ids < 0).astype("<u4").tobytes()
        if self._rows is not None:
            rows, logprobs = self._rows
            for index, (row, count) in enumerate(zip(rows.rows, rows.counts, strict=True)):
                table = _encode_table(logprobs, slice(index, index + 1), count)
                result.logprobs.append(worker_pb2.RowLogprobs(row=row, table=table))
        for chunk, logprobs in self._chunks:
            table = _encode_table(logprobs, slice(None), logprobs.token_ids.shape[1] - 1)
            result.prompt_logprobs.append(worker_pb2.ChunkLogprobs(chunk=chunk.chunk, start=chunk.start, table=table))
        return result


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queued, not waited for: torch gives the copy pinned memory."""
    return tensor.to("cpu", non_blocking=True)


def _logprobs_to_host(logprobs: Logprobs) -> Logprobs:
    return Logprobs(_to_host(logprobs.token_ids), _to_host(logprobs.logprobs), _to_host(logprobs.ranks))


def _encode_table(logprobs: Logprobs, rows: slice, num_top: int) -> sampling_pb2.LogprobTable:
    columns = slice(0, 1 + num_top)
    return sampling_pb2.LogprobTable(
        num_columns=1 + num_top,
        token_ids=logprobs.token_ids[rows, columns].numpy().astype("<i4").tobytes(),
        logprobs=logprobs.logprobs[rows, columns].numpy().astype("<f4").tobytes(),
        ranks=logprobs.ranks[rows].numpy().astype("<i4").tobytes(),
    )


assert np.little_endian, "token ids go to the wire as the host has them"
