"""Whether it is cheaper to copy KV blocks from another group than to compute their tokens, by what both took."""

from .worker_group import WorkerGroup

_DECAY = 0.8  # of an observation's weight with each that follows: the way between two groups hardly changes
_FADING = 0.95  # of an estimate with each copy that it rules out: in the end it is tried again
_BOLDNESS = 2  # so many times the blocks of any copy that was measured are tried: their price is not known


class _Line:
    """duration = fixed + slope * blocks, fitted to the last few copies."""

    __slots__ = ("_sums", "most_blocks")

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, n, t, n * n, n * t
        self.most_blocks = 0

    def add(self, num_blocks: int, duration_ms: float) -> None:
        terms = (1.0, num_blocks, duration_ms, num_blocks**2, num_blocks * duration_ms)
        self._sums = tuple(_DECAY * old + new for old, new in zip(self._sums, terms, strict=True))  # type: ignore[assignment]
        self.most_blocks = max(self.most_blocks, num_blocks)

    def fade(self) -> None:
        one, n, t, nn, nt = self._sums
        self._sums = (one, n, t * _FADING, nn, nt * _FADING)

    def duration_ms(self, num_blocks: int) -> float:
        one, n, t, nn, nt = self._sums
        mean_n, mean_t = n / one, t / one
        variance, covariance = nn / one - mean_n**2, nt / one - mean_n * mean_t
        proportional = mean_t / mean_n
        slope = min(max(covariance / variance, 0.0), proportional) if variance > 1e-6 * mean_n**2 else proportional
        return mean_t + slope * (num_blocks - mean_n)


class CopyCosts:
    """What copies between each two groups took."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, int], _Line] = {}

    def observe(self, source: WorkerGroup, target: WorkerGroup, num_blocks: int, duration_ms: float) -> None:
        self._lines.setdefault((source.group_id, target.group_id), _Line()).add(num_blocks, duration_ms)

    def pays(self, source: WorkerGroup, target: WorkerGroup, num_blocks: int) -> bool:
        """Of so many blocks. While there is nothing to tell it by, a copy is tried."""
        line = self._lines.get((source.group_id, target.group_id))
        if line is None or not target.step_time.is_fitted or num_blocks > _BOLDNESS * line.most_blocks:
            return True
        num_tokens = num_blocks * target.blocks.block_size
        if line.duration_ms(num_blocks) < num_tokens * target.step_time.costs(num_decodes=0).token_ms:
            return True
        line.fade()
        return False
