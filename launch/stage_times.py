"""How long the stages of a group's start took, for people."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class StageTimes:
    """In the order of time."""

    _times: list[tuple[str, float]] = field(default_factory=list)

    def note(self, stage: str, duration_s: float) -> None:
        self._times.append((stage, duration_s))

    def __str__(self) -> str:
        """As in "connect 0.3 s, weights 1.2 s"."""
        return ", ".join(f"{stage} {duration_s:.1f} s" for stage, duration_s in self._times)
