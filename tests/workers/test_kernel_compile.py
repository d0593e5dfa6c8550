"""Kernels compiled before any runs, on a machine without a GPU: Triton needs to be told of one, no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from octavo.workers.kernel_compile import UnrecordedGraphs, compiled_in_parallel, launches_compile
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _Hopper:
    """A driver of a GPU that is not there."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def _add(x_ptr, out_ptr, block: tl.constexpr):
    columns = tl.arange(0, block)
    tl.store(out_ptr + columns, tl.load(x_ptr + columns) + 1)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Names of the kernels that were compiled, in a new cache."""
    names = []

    def listen(*, src, cache_hit, **rest):
        assert not cache_hit
        names.append(src.name)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Hopper())
    return names


def test_launches_compile_each_variant_once_and_run_nothing(compiled):
    kernel, x, out = JITFunction(_add), torch.ones(64), torch.zeros(64)
    with compiled_in_parallel(num_ranks_on_host=1), launches_compile():
        for block in (32, 64, 32):
            kernel[(1,)](x, out, block=block)
    assert compiled == ["_add"] * 2
    assert not out.any()
    with launches_compile():
        kernel[(1,)](x, out, block=64)
    assert len(compiled) == 2, "a compiled kernel does not run either, nor is it compiled again"


def test_a_kernel_that_does_not_compile_says_so_when_it_is_launched(compiled):
    def broken(x_ptr, block: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, block), no_such_name)  # noqa: F821

    kernel, good, x = JITFunction(broken), JITFunction(_add), torch.ones(4)
    with compiled_in_parallel(num_ranks_on_host=1), launches_compile():
        kernel[(1,)](x, block=4)
        good[(1,)](x, x, block=4)
    assert compiled == ["_add"]
    with pytest.raises(triton.CompilationError, match="no_such_name"):
        kernel[(1,)](x, block=4)


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


def test_no_step_compiles_a_kernel_after_the_start(make_llama):
    shape = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    script = Path(__file__).with_name("served_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, device, make_llama(**shape)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *late = done.stdout.splitlines()
    assert int(first.split()[0]) > 60
    assert not late
