"""python -m octavo.gateway CONFIG.json: one gateway process."""

import argparse
import logging
import sys
from pathlib import Path

import uvloop

from ..errors import OctavoError
from ..internal_channel import read_on_waiting_threads
from .config import load_config
from .server import serve


def main() -> int:
    """The exit status: 0 after SIGTERM, 1 with one line that says why it cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m octavo.gateway", description="One gateway process of Octavo.")
    parser.add_argument("config", type=Path, help="octavo.internal.v1.GatewayConfig as protobuf JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s gateway %(levelname)s %(message)s")
    read_on_waiting_threads()
    try:
        uvloop.run(serve(load_config(arguments.config)))
    except OctavoError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
