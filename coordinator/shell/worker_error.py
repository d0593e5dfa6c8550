"""What goes wrong with a rank, or with a group whose rank at fault is not known."""

import grpc

from ...errors import OctavoError


class WorkerError(OctavoError):
    """A rank answered with an error, or no longer answers."""

    grpc_code = 14  # UNAVAILABLE

    def __init__(self, rank: int | None, why: str, step_id: int = 0) -> None:
        super().__init__(why if rank is None else f"rank {rank}: {why}")
        self.rank = rank  # None: not known
        self.step_id = step_id  # that failed; 0: not known

    @classmethod
    def of(cls, rank: int, error: grpc.aio.AioRpcError) -> "WorkerError":
        """A call to a rank failed."""
        return cls(rank, error.details() or error.code().name)
