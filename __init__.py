"""Octavo serves large language models from many GPUs as one.

The public face. Names are loaded when they are first used, so that `import octavo` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launch.beam_search import BeamSearchParams
    from .launch.client import Client
    from .launch.llm import LLM
    from .launch.sampling_params import SamplingParams

__all__ = ["LLM", "BeamSearchParams", "Client", "SamplingParams", "__version__"]

_MODULES = {
    "LLM": ".launch.llm",
    "BeamSearchParams": ".launch.beam_search",
    "Client": ".launch.client",
    "SamplingParams": ".launch.sampling_params",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever the name stands for)
    if name == "__version__":
        from importlib.metadata import version

        return version("octavo")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
