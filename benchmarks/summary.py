"""Many measured times as a few numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Summary:
    """Of times, in milliseconds."""

    count: int
    mean_ms: float
    percentiles_ms: tuple[float, ...]  # as PERCENTILES

    @classmethod
    def of_seconds(cls, times_s: Sequence[float]) -> "Summary | None":
        """None when nothing was measured."""
        if not times_s:
            return None
        times_ms = np.asarray(times_s) * 1e3
        percentiles = np.percentile(times_ms, PERCENTILES)
        return cls(len(times_ms), float(times_ms.mean()), tuple(float(value) for value in percentiles))


def percentile_columns(name: str, times_s: Sequence[float]) -> dict[str, float | None]:
    """Columns of a report's row: name_p50_ms and so on."""
    summary = Summary.of_seconds(times_s)
    values = summary.percentiles_ms if summary else (None,) * len(PERCENTILES)
    return {f"{name}_p{percent}_ms": value for percent, value in zip(PERCENTILES, values, strict=True)}
