"""What a process that is no rank yet has imported: all that is slow, and nothing that takes a GPU."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from octavo.workers.preparation import import_for

import_for({device_type!r})
import torch

assert not torch.cuda.is_initialized()
print(*sys.modules)
"""


@pytest.mark.parametrize(
    ("device_type", "needed"),
    [
        ("cpu", {"octavo.workers.server", "octavo.workers.models.llama", "octavo.kernels.cpu", "numba.np.linalg"}),
        (
            "cuda",
            {"octavo.workers.server", "octavo.workers.decode_graphs", "octavo.workers.segment_graphs"}
            | {"octavo.workers.symmetric_memory", "octavo.kernels.triton_ops", "torch.fx.experimental.symbolic_shapes"}
            | {"triton.experimental.gluon.nvidia.hopper"},
        ),
    ],
)
def test_what_a_rank_comes_to_need_is_imported(device_type, needed):
    if device_type == "cuda":
        pytest.importorskip("triton")
    program = PROGRAM.format(device_type=device_type)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    imported = set(run.stdout.split())
    assert needed <= imported
    assert device_type == "cuda" or "triton" not in imported, "it comes with no build of torch for CPUs"
