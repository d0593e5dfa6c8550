"""Arrays on their way to the device."""

import numpy as np
import pytest
import torch
from octavo.workers.transfer import Parcel

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.arange(3, dtype=np.float32)[:, None],
    np.zeros(0, dtype=np.int32),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    np.array([True, False, True]),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("room", [1.0, 0.5, 0.0])
def test_a_parcel_brings_what_was_added(device, room):
    """Also what finds no room in it."""
    with Parcel(torch.device(device), int(room * Parcel.size_of(*ARRAYS))) as parcel:
        tensors = [parcel.add(array.copy()) for array in ARRAYS]
    for array, tensor in zip(ARRAYS, tensors, strict=True):
        assert tensor.device.type == device
        assert tensor.cpu().numpy().dtype == array.dtype
        assert np.array_equal(tensor.cpu().numpy(), array)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_parcel_begin_where_kernels_want_them():
    with Parcel(torch.device("cuda"), 4096) as parcel:
        addresses = [parcel.add(np.arange(n, dtype=np.int32)).data_ptr() for n in (1, 3, 5, 8)]
    assert all(address % 16 == 0 for address in addresses)
    assert addresses[-1] - addresses[0] < 128, "they went by themselves"
