"""Weights that cannot fit are refused with both figures, before anything is allocated."""

import pytest
import torch
from octavo.errors import ResourceExhaustedError
from octavo.workers.device_memory import DeviceMemory, check_weights_fit

MIB = 1024 * 1024
CUDA = torch.device("cuda:0")
MEMORY = DeviceMemory(total_bytes=100 * MIB, free_bytes=8 * MIB)
SHAPES = [(1024, 4096), (4096, 1024)]  # 16 MiB in bfloat16


def test_weights_that_fit_pass():
    check_weights_fit(SHAPES, torch.bfloat16, 2, CUDA, MEMORY)


def test_weights_that_do_not_fit_are_refused_with_the_figures_and_the_remedy():
    with pytest.raises(ResourceExhaustedError, match=r"16\.0 MiB on each of 1 .* 8\.0 MiB free of 100\.0 MiB"):
        check_weights_fit(SHAPES, torch.bfloat16, 1, CUDA, MEMORY)
    with pytest.raises(ResourceExhaustedError, match="--tensor-parallel-size"):
        check_weights_fit(SHAPES, torch.float32, 2, CUDA, MEMORY)


def test_the_host_is_asked_for_its_own_memory():
    memory = DeviceMemory.of(torch.device("cpu"))
    assert 0 < memory.free_bytes <= memory.total_bytes
    with pytest.raises(ResourceExhaustedError, match="cpu has"):
        check_weights_fit([(2**40, 2**10)], torch.float32, 1, torch.device("cpu"))
