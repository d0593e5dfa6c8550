"""Tests that compile kernels as a GPU would have them, without one. test_kernel_compile.py runs them."""

import pytest
import torch
import triton
from octavo.workers.kernel_compile import compiled_in_parallel, launches_compile
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _Hopper:
    """A driver of a GPU that is not there."""

    def __init__(self):
        self.launched = []  # names of the kernels that have a launcher

    def launcher_cls(self, src, metadata):
        self.launched.append(src.name)

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
    assert triton.runtime.driver.active.launched == ["_add"] * 2, "made at the start, not when the kernel first runs"
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
