"""Where and with what a figure was measured."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

_LIBRARIES = ("octavo", "torch", "ray", "transformers", "grpcio", "numpy", "triton")
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    num_cores: int  # that this process may use
    memory_gib: float
    gpus: list[str]
    python: str
    versions: dict[str, str]  # of installed libraries


def describe_machine() -> Machine:
    return Machine(
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=gpu_names(),
        python=platform.python_version(),
        versions=_versions(),
    )


def gpu_names() -> list[str]:
    """Asked of nvidia-smi: torch would make a CUDA context in this process, whose memory the workers would miss."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip().splitlines() if asked.returncode == 0 else []


def git_commit() -> str | None:
    """Of the source tree, "-dirty" if it was edited since. Outside a checkout what OCTAVO_COMMIT says, if anything."""
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        return os.environ.get("OCTAVO_COMMIT")
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    installed = {distribution.name for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in _LIBRARIES if name in installed}
