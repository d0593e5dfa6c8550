"""Whether a GPU and its software can run the kernels: asked once, before anything is built on them."""

import importlib.metadata
from dataclasses import dataclass

import torch

from ..errors import FailedPreconditionError

# Asynchronous copies and bfloat16 products.
_MIN_CAPABILITY = (8, 0)
# What kernels over a KV cache in FP8 need more: conversions of e4m3.
_MIN_FP8_CAPABILITY = (8, 9)
# The oldest that the kernels are tested with.
_MIN_TRITON = (3, 6)


@dataclass(frozen=True, slots=True)
class GpuSupport:
    """What a GPU's machine offers."""

    name: str
    capability: tuple[int, int]
    triton_version: str | None  # None: not installed

    @classmethod
    def of(cls, device: torch.device) -> "GpuSupport":
        """Of one CUDA device. Raises FailedPreconditionError if torch cannot use it."""
        try:
            name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        except (RuntimeError, AssertionError) as error:  # the second: a build of torch without CUDA
            # Torch's own first line says what is wrong: a driver too old, a GPU that has failed.
            raise FailedPreconditionError(f"torch cannot use {device}: {str(error).splitlines()[0]}") from error
        try:
            triton_version = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton_version = None
        return cls(name, capability, triton_version)

    def check(self, has_fp8_cache: bool = False) -> None:
        """Raises FailedPreconditionError naming what is too old."""
        if self.capability < _MIN_CAPABILITY:
            raise FailedPreconditionError(
                f"{self.name} has compute capability {_dotted(self.capability)}; the kernels need "
                f"{_dotted(_MIN_CAPABILITY)} or newer (--device cpu serves without a GPU)"
            )
        if has_fp8_cache and self.capability < _MIN_FP8_CAPABILITY:
            raise FailedPreconditionError(
                f"{self.name} has compute capability {_dotted(self.capability)}; kv_cache_dtype fp8 needs "
                f"{_dotted(_MIN_FP8_CAPABILITY)} or newer; drop --kv-cache-dtype"
            )
        found = "none" if self.triton_version is None else self.triton_version
        if self.triton_version is None or _release(self.triton_version) < _MIN_TRITON:
            raise FailedPreconditionError(
                f"the kernels need Triton {_dotted(_MIN_TRITON)} or newer, and {found} is installed; "
                f"pip install 'triton>={_dotted(_MIN_TRITON)}'"
            )


def _release(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
