"""Kernels compiled before any runs, on a machine without a GPU: Triton needs to be told of one, no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from octavo.workers.kernel_compile import UnrecordedGraphs, launches_compile
from triton.runtime.jit import JITFunction


def test_kernels_compile_beside_each_other():
    """In a process of its own: what Triton's interpreter leaves of itself, its compiler stumbles over."""
    checks = Path(__file__).with_name("kernel_compile_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_launches_run_again_afterwards():
    run = JITFunction.run
    with pytest.raises(KeyError), launches_compile():
        raise KeyError
    assert JITFunction.run is run


def test_new_memory_is_zeros_while_nothing_writes_it():
    like = torch.ones(8)
    with launches_compile():
        made = torch.empty(8), torch.empty_like(like), like.new_empty(8), torch.empty((2, 2), dtype=torch.int64)
    assert not any(tensor.any() for tensor in made)


def test_what_is_not_recorded_runs_once():
    graphs, calls = UnrecordedGraphs(), []
    with graphs.session():
        recording, outputs = graphs.record(lambda: (calls.append(1), (torch.ones(1),))[1])
    recording.replay()
    assert calls == [1]
    assert recording.outputs is outputs


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8"])
def test_no_step_compiles_a_kernel_after_the_start(kv_cache_dtype, make_llama):
    shape = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    first, *late = run_served_kernels(device, make_llama(**shape), kv_cache_dtype)
    assert int(first.split()[0]) > 60
    assert not late


def test_a_rank_finds_its_kernels_without_the_others(make_llama):
    """They may have theirs, and not come."""
    shape = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    (first,) = run_served_kernels("cpu", make_llama(**shape), "bfloat16", "2")
    assert int(first.split()[0]) > 60


def run_served_kernels(*arguments) -> list[str]:
    """The lines that it says."""
    script = Path(__file__).with_name("served_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
