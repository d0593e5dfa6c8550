"""Log probabilities as they come from the coordinator (packed tables), and row by row as the doors write them."""

from dataclasses import dataclass

import numpy as np

from ..proto import sampling_pb2


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of one token at one position; rank 1 is the likeliest of the vocabulary."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """One position: the token that stands there, and the likeliest ones in order."""

    token: Logprob
    top: tuple[Logprob, ...]


def unpack_table(table: sampling_pb2.LogprobTable) -> list[PositionLogprobs]:
    """The rows of the table. Columns after the first are ranked 1, 2, ..."""
    num_columns = table.num_columns
    token_ids = np.frombuffer(table.token_ids, "<i4").reshape(-1, num_columns).tolist()
    logprobs = np.frombuffer(table.logprobs, "<f4").reshape(-1, num_columns).tolist()
    ranks = np.frombuffer(table.ranks, "<i4").tolist()
    return [_row(*row) for row in zip(token_ids, logprobs, ranks, strict=True)]


def _row(token_ids: list[int], logprobs: list[float], rank: int) -> PositionLogprobs:
    top = zip(token_ids[1:], logprobs[1:], range(1, len(token_ids)), strict=True)
    return PositionLogprobs(Logprob(token_ids[0], logprobs[0], rank), tuple(Logprob(*entry) for entry in top))
