"""A GPU, a driver or a Triton too old for the kernels is named in one line."""

import pytest
import torch
from octavo.errors import FailedPreconditionError
from octavo.workers.gpu_support import GpuSupport

GOOD = GpuSupport("NVIDIA H200", (9, 0), "3.6.0")


def test_what_is_new_enough_passes():
    GOOD.check()
    GpuSupport("NVIDIA A100", (8, 0), "3.10.1+cu130").check()


@pytest.mark.parametrize(
    ("support", "line"),
    [
        (GpuSupport("Tesla T4", (7, 5), "3.6.0"), r"Tesla T4 has compute capability 7\.5; .* 8\.0"),
        (GpuSupport("NVIDIA H200", (9, 0), "3.5.1"), r"need Triton 3\.6 .* 3\.5\.1 is installed"),
        (GpuSupport("NVIDIA H200", (9, 0), None), r"none is installed; pip install"),
    ],
)
def test_what_is_too_old_is_named(support, line):
    with pytest.raises(FailedPreconditionError, match=line) as refused:
        support.check()
    assert "\n" not in str(refused.value)


def test_a_cache_in_fp8_needs_more():
    GOOD.check(has_fp8_cache=True)
    GpuSupport("NVIDIA L40S", (8, 9), "3.6.0").check(has_fp8_cache=True)
    a100 = GpuSupport("NVIDIA A100", (8, 0), "3.6.0")
    a100.check()
    with pytest.raises(FailedPreconditionError, match=r"A100 has .* 8\.0; kv_cache_dtype fp8 needs 8\.9"):
        a100.check(has_fp8_cache=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_driver_that_does_not_work_is_one_line_of_torchs():
    with pytest.raises(FailedPreconditionError, match="torch cannot use cuda:0: ") as refused:
        GpuSupport.of(torch.device("cuda:0"))
    assert "\n" not in str(refused.value)
