"""One gateway process: both doors and the session to the coordinator in one event loop, from start to stop."""

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import uvicorn

from ..errors import UnavailableError
from .config import GatewaySettings
from .engine_client import EngineClient
from .generation import GenerationService
from .grpc_server import Readiness, build_grpc_server
from .http_app import build_http_app
from .listen import shared_socket
from .open_calls import OpenCalls
from .slow_readers import UNSENT_BYTES, LenientHttpProtocol
from .text import load_text_model

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0  # for the last bytes of what has ended, and for errors of what has not


class _HttpServer(uvicorn.Server):
    """Leaves signals to the process's own handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """Owner of the process's servers. `run` serves until `stop`."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Loads the tokenizer. Raises OctavoError for what cannot be served."""
        self._settings = settings
        self._text = None if settings.skip_tokenizer_init else load_text_model(settings.model_path)
        self._calls = OpenCalls()
        self._stop = asyncio.Event()
        self._give_up = asyncio.Event()

    def stop(self, timeout_s: float | None = None) -> None:
        """Refuses new requests, and ends `run` after those that run: by default within the configured time, when it is
        called again at once. Of several times the earliest counts."""
        if timeout_s is None:
            timeout_s = 0.0 if self._stop.is_set() else self._settings.shutdown_timeout_s
        self._calls.refuse_new()
        self._stop.set()
        asyncio.get_running_loop().call_later(timeout_s, self._give_up.set)

    async def run(self) -> None:
        """Raises FailedPreconditionError if a door's address cannot be had."""
        readiness = Readiness()
        await readiness.set(False)
        changes: asyncio.Queue[bool] = asyncio.Queue()
        engine = EngineClient(self._settings.engine_address, changes.put_nowait, self._settings.max_outage_s)
        service = GenerationService(self._settings, self._text, engine, self._calls)
        grpc_server = build_grpc_server(self._settings, service, readiness)
        http_server, http_sockets = self._build_http(service)
        await grpc_server.start()
        http_task = asyncio.ensure_future(http_server.serve(http_sockets)) if http_server else None
        session = asyncio.ensure_future(engine.run())
        health = asyncio.ensure_future(_publish(changes, readiness))
        try:
            await self._until_stopped(session, health, http_task)
            health.cancel()
            await readiness.set(False)
            await self._drain(engine)
        finally:
            health.cancel()
            await _shut_down(grpc_server, http_server, http_task)
            session.cancel()
            await asyncio.gather(session, health, return_exceptions=True)

    async def _drain(self, engine: EngineClient) -> None:
        """Lets calls end until it is time to give them up; the doors stay open meanwhile, to say so."""
        logger.info("stopping: %d calls are open", self._calls.num_open)
        ended, late = asyncio.ensure_future(self._calls.wait_for_end()), asyncio.ensure_future(self._give_up.wait())
        await asyncio.wait([ended, late], return_when=asyncio.FIRST_COMPLETED)
        if self._calls.num_open:
            logger.warning("%d calls are given up", self._calls.num_open)
            engine.give_up(UnavailableError("the server shut down before this request had ended; send it again"))
            await asyncio.wait([ended], timeout=_LAST_WORDS_S)
        ended.cancel()
        late.cancel()

    def _build_http(self, service: GenerationService) -> tuple[_HttpServer | None, list[socket.socket]]:
        if not self._settings.http_port:
            return None, []
        config = uvicorn.Config(
            build_http_app(service),
            http=LenientHttpProtocol,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
        )
        listener = shared_socket(self._settings.host, self._settings.http_port, "--port")
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)  # its connections inherit it
        return _HttpServer(config), [listener]

    async def _until_stopped(self, *tasks: "asyncio.Future[None] | None") -> None:
        """Until `stop`, or the failure of a task that should go on, which is raised."""
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        running: list[asyncio.Future[Any]] = [task for task in tasks if task is not None]
        await asyncio.wait([stopped, *running], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        for task in running:
            if task.done():
                task.result()


async def _publish(changes: "asyncio.Queue[bool]", readiness: Readiness) -> None:
    while True:
        ready = await changes.get()
        await readiness.set(ready)
        logger.info("ready" if ready else "not ready: waiting for the coordinator")


async def _shut_down(
    grpc_server: grpc.aio.Server,
    http_server: _HttpServer | None,
    http_task: "asyncio.Future[None] | None",
) -> None:
    stops = [asyncio.ensure_future(grpc_server.stop(_LAST_WORDS_S))]
    if http_server is not None and http_task is not None:
        http_server.config.timeout_graceful_shutdown = math.ceil(_LAST_WORDS_S)
        http_server.should_exit = True
        stops.append(http_task)
    await asyncio.gather(*stops, return_exceptions=True)


async def serve(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT, finishing what runs, or until a second one or the end of a piped stdin."""
    gateway = Gateway(settings)
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, gateway.stop)
    if sys.stdin is not None and stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        _watch_launcher(loop, sys.stdin.fileno(), gateway)
    gc.collect()
    gc.freeze()  # modules and the tokenizer: a collection that looked at them all would hold streams up
    await gateway.run()


def _watch_launcher(loop: asyncio.AbstractEventLoop, stdin: int, gateway: Gateway) -> None:
    """Nobody is left to serve for, or to clean up after, when the launcher is gone: what runs is given up."""

    def on_readable() -> None:
        if not os.read(stdin, 4096):
            logger.error("stdin closed: the launcher is gone")
            loop.remove_reader(stdin)
            gateway.stop(timeout_s=0)

    loop.add_reader(stdin, on_readable)
