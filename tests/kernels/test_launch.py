"""A launch made again on other memory does what it did on the first."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from octavo.kernels.launch import Launch


@triton.jit
def _scale_kernel(x_ptr, out_ptr, factor, count, block: tl.constexpr):
    columns = tl.program_id(0) * block + tl.arange(0, block)
    mask = columns < count
    tl.store(out_ptr + columns, tl.load(x_ptr + columns, mask) * factor, mask)


def make(x, out, factor=3.0):
    arguments = {"x_ptr": x, "out_ptr": out, "factor": factor, "count": len(x), "block": 16}
    return Launch(_scale_kernel, (triton.cdiv(len(x), 16), 1, 1), arguments, {"num_warps": 1})


def test_each_run_takes_the_tensors_it_is_given_and_keeps_the_others(device):
    xs = torch.randn(4, 36, device=device)  # rows 16 bytes aligned
    outs = torch.zeros(5, 36, device=device)
    launch = make(xs[0], outs[0])
    launch.run()
    launch.run(x_ptr=xs[1], out_ptr=outs[1])
    launch.run(out_ptr=outs[2])
    launch.run(x_ptr=xs[2], out_ptr=outs[3])
    torch.testing.assert_close(outs, torch.stack([*(xs[[0, 1, 1, 2]] * 3), torch.zeros_like(xs[0])]))


def test_arguments_keep_their_tensors_alive(device):
    out = torch.zeros(20, device=device)
    launch = make(torch.ones(20, device=device), out)
    launch.run()
    other = torch.full((20,), 7.0, device=device)  # would take the place of what was given, had it gone
    launch.run()
    assert (out == 3).all()
    assert (other == 7).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_is_aligned_otherwise_is_refused(device):
    x, out = torch.ones(64, device=device), torch.zeros(64, device=device)
    launch = make(x[:16], out[:16])
    launch.run()
    with pytest.raises(AssertionError, match="x_ptr"):
        launch.run(x_ptr=x[1:17])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_launch_made_again_is_recorded_in_a_graph(device):
    x, outs = torch.ones(32, device=device), torch.zeros(3, 32, device=device)
    make(x, outs[0]).run()  # compiles
    outs.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch = make(x, outs[0])
        for out in outs:
            launch.run(out_ptr=out)
    assert not outs.any()
    graph.replay()
    assert (outs == 3).all()
