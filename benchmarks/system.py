"""Starts a whole system for one benchmark: Ray workers, coordinator, gateways; and ends it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from rich.console import Console

from ..launch.bulk import BulkClient
from ..launch.config import ServeConfig
from ..launch.resolve import ServedModel
from ..launch.rpc_errors import from_rpc_error
from ..launch.signals import StopSignals
from ..launch.start_display import StartDisplay
from ..launch.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the start, as the supervisor reports it."""

    name: str
    detail: str
    duration_s: float


class RecordingDisplay(StartDisplay):
    """Shows the start and keeps its times."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.stages: list[Stage] = []

    def report(self, name: str, detail: str, duration_s: float) -> None:
        self.stages.append(Stage(name.strip(), detail, duration_s))
        super().report(name, detail, duration_s)


@dataclass(frozen=True, slots=True)
class System:
    """One that is ready."""

    model: ServedModel
    address: str  # of a gateway, as gRPC writes it
    stages: list[Stage]


@contextmanager
def running_system(config: ServeConfig) -> Iterator[System]:
    """Until the body ends. Raises OctavoError if it cannot start, and for calls of the body that fail."""
    display = RecordingDisplay(Console(stderr=True))
    supervisor = Supervisor(config, display)
    with StopSignals() as signals:
        try:
            model = supervisor.start()
            address = supervisor.local_addresses[0]
            with _octavo_errors(address):
                yield System(model, address, display.stages)
        finally:
            signals.begin_stop()
            supervisor.stop(signals.hurry)


@contextmanager
def open_bulk(address: str, max_num_requests: int) -> Iterator[BulkClient]:
    """A client for many requests, `max_num_requests` of them on their way at once."""
    client = BulkClient(address, max_num_requests)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _octavo_errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address) from error
