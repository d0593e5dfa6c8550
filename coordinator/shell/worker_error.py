"""What goes wrong with a rank, or with a group whose rank at fault is not known."""

import grpc

from ...errors import OctavoError


class WorkerError(OctavoError):
    """A rank answered with an error, or no longer answers."""

    grpc_code = 14  # UNAVAILABLE

    def __init__(self, rank: int | None, why: str) -> None:
        super().__init__(why if rank is None else f"rank {rank}: {why}")
        self.rank = rank  # None: not known

    @classmethod
    def of(cls, rank: int, error: grpc.aio.AioRpcError) -> "WorkerError":
        """A call to a rank failed."""
        return cls(rank, error.details() or error.code().name)
