"""Which ranks of a group are lost: asked directly, for Ray notices a death after seconds, and a stopped one never."""

from collections.abc import Sequence
from enum import Enum

import grpc

from ..internal_channel import CHANNEL_OPTIONS
from ..proto import worker_pb2, worker_pb2_grpc

# A rank answers beside its steps, so only one that is starved of CPU takes long.
_TIMEOUT_S = 2.0


class RankLoss(Enum):
    """How a rank was lost."""

    DIED = "died"  # nothing listens at its address
    HANGS = "hangs"  # its process may live, and does not answer


def find_lost_ranks(addresses: Sequence[str]) -> dict[int, RankLoss]:
    """The ranks, by number, that give no sign of life."""
    channels = [grpc.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
    try:
        asked = [
            worker_pb2_grpc.WorkerStub(channel).Ping.future(worker_pb2.PingRequest(), timeout=_TIMEOUT_S)
            for channel in channels
        ]
        losses = {rank: _loss(answer) for rank, answer in enumerate(asked)}
        return {rank: loss for rank, loss in losses.items() if loss is not None}
    finally:
        for channel in channels:
            channel.close()


def _loss(answer: grpc.Future) -> RankLoss | None:
    error = answer.exception()
    if error is None:
        return None
    return RankLoss.HANGS if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else RankLoss.DIED
