"""What a process can do before it is a rank: import all that one comes to need. It takes nothing of a GPU."""

import importlib

_MODULES = {
    "cpu": ("server", "rank", "model_runner"),
    "cuda": ("server", "rank", "model_runner", "decode_graphs", "segment_graphs", "kernel_compile", "symmetric_memory"),
}
_KERNELS = {"cpu": "cpu", "cuda": "triton_ops"}


def import_for(device_type: str) -> None:
    """`device_type` is "cpu" or "cuda"."""
    package = __package__.rpartition(".")[0]
    for module in _MODULES[device_type]:
        importlib.import_module(f"{__package__}.{module}")
    importlib.import_module(f"{package}.kernels.{_KERNELS[device_type]}")
