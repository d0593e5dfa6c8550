"""A feature's parameters for those rows of a batch that use it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..transfer import to_device


@dataclass(frozen=True, slots=True)
class Column:
    """Rows of a batch and one value for each."""

    rows: torch.Tensor  # [m] int64
    values: torch.Tensor  # [m]


def build_column(values: NDArray[Any], used: NDArray[np.bool_], device: torch.device) -> Column | None:
    """The entries of `values` [n] where `used`, on the device; None if there are none."""
    (rows,) = np.nonzero(used)
    if not len(rows):
        return None
    return Column(to_device(rows, device), to_device(values[rows], device))
