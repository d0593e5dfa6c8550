"""What libraries in C++ say aloud in our processes: errors only, unless whoever runs Octavo wants more.

gRPC tells of every connection that ends in order, torch of every peer that is gone, with a stack: in a log of deaths
and scaling that are ours to report, and are.
"""

import os

_SETTINGS = {"GRPC_VERBOSITY": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def quiet_libraries() -> dict[str, str]:
    """Variables for the environment of a new process, which both libraries read when they are loaded."""
    return {name: os.environ.get(name, level) for name, level in _SETTINGS.items()}
