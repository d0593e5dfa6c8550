"""How the ranks of a group find each other: a store that rank 0 holds, and the process group over it."""

import os
import socket
from dataclasses import replace
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from ..errors import UnavailableError
from .meeting import TIMEOUT, Meeting
from .parallel import TensorParallel

_GLOO_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def create_store(host: str) -> dist.TCPStore:
    """Rank 0's store, on a port that the system chooses."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


def join_group(meeting: Meeting, device: torch.device) -> TensorParallel:
    """Waits for all ranks. Raises UnavailableError if they do not meet."""
    rank, size = meeting.rank, meeting.size
    try:
        meeting.await_all()  # first: what follows takes all to be there, and cannot be told that one is not
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=meeting.own_store("group"),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
            pg_options=_nccl_options() if device.type == "cuda" else None,
        )
    except (RuntimeError, dist.DistError) as error:
        raise UnavailableError(f"the {size} ranks did not meet; is one unreachable, or its GPU taken?") from error
    group = dist.group.WORLD
    assert group is not None, "it was initialised above"
    tp = TensorParallel(rank, size, device, group)
    if device.type != "cuda":
        return tp
    from .symmetric_memory import open_symmetric_memory  # slow to import, and for GPUs alone

    memory = open_symmetric_memory(meeting, device)
    # Ranks that sum in different ways would wait for each other for ever.
    return replace(tp, symmetric_memory=memory) if tp.min_int(int(memory is not None)) else tp


def keep_process_on_lost_peer() -> None:
    """Torch would end the process when NCCL meets an error: it has the weights that the next epoch goes on with. To be
    called before the first group is joined: it is read from the environment, and from nowhere else."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # It asks the store whether to end the process, each second and aloud where the store went with rank 0.
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")


def _nccl_options() -> "dist.ProcessGroupNCCL.Options":
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True  # sums that run beside products are waited for sooner than these
    return options


def connect_store(address: str, timeout_s: float = TIMEOUT.total_seconds()) -> dist.TCPStore:
    """Another rank's store, at "host:port". Raises UnavailableError."""
    host, port = address.rsplit(":", 1)
    try:
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, dist.DistError) as error:
        raise UnavailableError(f"the other rank's store at {address} does not answer") from error


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone. Gloo says so only in the text of a RuntimeError."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _GLOO_LOST_PEER)
    )


def leave_group() -> None:
    """Drops this process's group without waiting for its peers, which may be gone."""
    if dist.is_initialized() and (group := dist.group.WORLD) is not None:
        group.abort()
        dist.destroy_process_group()


def bind_collectives_to(host: str) -> None:
    """Has gloo use the interface that `host` is an address of: it would otherwise guess from the machine's name.

    Gloo reads this from the environment of the process, and from nowhere else.
    """
    address = socket.gethostbyname(host)
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            return
