"""The coordinator process: `python -m octavo.coordinator CONFIG.json`.

CONFIG.json is an octavo.internal.v1.EngineConfig in protobuf's JSON form. Runs until SIGTERM, or until its stdin
closes: then the launcher is gone, and nothing may be left behind.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import grpc
import uvloop
from google.protobuf import json_format

from ..internal_channel import CHANNEL_OPTIONS, read_on_waiting_threads
from ..proto import engine_pb2, engine_pb2_grpc
from .shell.engine import Engine
from .shell.service import EngineService


async def serve(config: engine_pb2.EngineConfig) -> None:
    """Serves `config.address` until a signal or the end of stdin."""
    engine = Engine(config)
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    engine_pb2_grpc.add_EngineServicer_to_server(EngineService(engine), server)
    server.add_insecure_port(config.address)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    _watch_stdin(loop, stop)
    await server.start()
    gc.collect()
    gc.freeze()  # modules: a collection need not look at them again
    await stop.wait()
    await engine.close()
    await server.stop(grace=0.5)


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """A closed pipe means that the launcher is gone. A terminal or a file says nothing."""

    def on_readable() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            stop.set()
            loop.remove_reader(sys.stdin)

    if Path("/proc/self/fd/0").is_fifo():
        loop.add_reader(sys.stdin, on_readable)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    config = json_format.Parse(Path(sys.argv[1]).read_text(), engine_pb2.EngineConfig())
    read_on_waiting_threads()
    uvloop.run(serve(config))


if __name__ == "__main__":
    main()
