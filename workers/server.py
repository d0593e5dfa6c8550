"""The server of one worker: what the launcher starts in a Ray actor, and tests in a process of their own."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
import torch
import uvloop

from ..errors import FailedPreconditionError, InvalidArgumentError
from ..internal_channel import CHANNEL_OPTIONS, read_on_waiting_threads
from ..proto import worker_pb2_grpc
from .copy_thread import CopySettings
from .gpu_support import GpuSupport
from .rendezvous import bind_collectives_to, create_store, keep_process_on_lost_peer, leave_group
from .service import WorkerService
from .step_pipeline import StepPipeline


@dataclass(frozen=True, slots=True)
class WorkerEndpoints:
    """Where others reach a worker, each as "host:port"."""

    address: str  # its gRPC server
    store_address: str  # its rendezvous store; empty if it holds none


class WorkerServer:
    """One rank: a gRPC server on an event loop of its own thread, before the threads that drive the device."""

    def __init__(
        self,
        host: str,
        device: str,
        create_store: bool,
        num_threads: int,
        num_ranks_on_host: int = 1,
        end_process: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        """`host` is this machine's address for the other ranks and the coordinator; the ports are the system's choice.

        `create_store`: whether this is rank 0, which holds the group's rendezvous store. `num_threads`: CPU threads of
        torch's operations. `num_ranks_on_host`: ranks that share a CPU's memory. `end_process`: what a rank does whose
        device is stuck for good.

        Raises InvalidArgumentError for a device that is not there, FailedPreconditionError if torch can use no GPU.
        """
        self._host = host
        self._device = _device(device)
        self._create_store = create_store
        self._num_ranks_on_host = num_ranks_on_host
        self._end_process = end_process
        self._pipeline = StepPipeline(self._device, num_threads)
        self._copy_settings = CopySettings(self._device, num_threads, host)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._release: Callable[[], None] = lambda: None  # of what the service holds
        self._end_copies: Callable[[], Coroutine[Any, Any, None]] | None = None

    def start(self) -> WorkerEndpoints:
        """Serves until `stop`. Raises FailedPreconditionError if no port can be had."""
        read_on_waiting_threads()
        bind_collectives_to(self._host)
        keep_process_on_lost_peer()
        store = create_store(self._host) if self._create_store else None
        self._thread.start()
        service = WorkerService(self._copy_settings, store, self._pipeline, self._num_ranks_on_host, self._end_process)
        self._release, self._end_copies = service.release, service.end_copies
        port = asyncio.run_coroutine_threadsafe(self._serve(service), self._loop).result()
        return WorkerEndpoints(f"{self._host}:{port}", f"{self._host}:{store.port}" if store else "")

    async def _serve(self, service: WorkerService) -> int:
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, self._server)
        port: int = self._server.add_insecure_port(f"{self._host}:0")
        if not port:
            raise FailedPreconditionError(f"a worker cannot listen on {self._host}")
        await self._server.start()
        return port

    def stop(self) -> None:
        """Ends all calls and threads. Peers are not waited for: they may be gone."""
        if self._end_copies is not None:
            asyncio.run_coroutine_threadsafe(self._end_copies(), self._loop).result()
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result()
        if self._device.type == "cpu":
            leave_group()  # a thread may be waiting for a peer that is gone
        self._pipeline.close_launcher()
        self._release()
        leave_group()
        self._pipeline.close_waiter()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device {name!r} is not served; use cpu or cuda", "device")
    if device.type == "cuda" and (device.index is None or device.index >= torch.cuda.device_count()):
        GpuSupport.of(torch.device("cuda:0"))  # says why where torch can use none at all
        count = torch.cuda.device_count()
        raise InvalidArgumentError(f"device {name!r} is not there: this machine has {count} CUDA devices", "device")
    return device
