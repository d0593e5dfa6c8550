"""How many prompt tokens a step takes beside decodes: few enough that running streams keep their pace."""

import math

from .step_time import StepCosts

_LEAST_TOKENS = 128  # of a step: prompts always progress, and on a GPU so few cost hardly more than none
_GRANULE = 64  # tokens: what kernels tile by, so a cut elsewhere saves nothing
_MAX_DELAY_MS = 50.0  # of a prompt, by pacing


class ChunkBudget:
    """Prompt tokens that a step may still take."""

    __slots__ = ("_granule", "_num_tokens")

    def __init__(self, num_tokens: int, granule: int = 1) -> None:
        """A chunk that has to be cut gets a multiple of `granule`, unless `num_tokens` are fewer."""
        self._num_tokens = num_tokens
        self._granule = min(granule, num_tokens)

    @property
    def is_spent(self) -> bool:
        return self._num_tokens == 0

    def take(self, num_wanted: int) -> int:
        """Tokens of the next chunk, at least 1; the budget must not be spent. Less than a granule is not kept over."""
        num_taken = num_wanted if num_wanted <= self._num_tokens else self._num_tokens // self._granule * self._granule
        num_left = self._num_tokens - num_taken
        self._num_tokens = num_left if num_left >= self._granule else 0
        return num_taken


def paced_budget(itl_target_ms: float, costs: StepCosts, num_backlog_tokens: int, limit: int) -> ChunkBudget:
    """The budget of a step with decodes: `costs` are this step's, `limit` its tokens in any case.

    `num_backlog_tokens`, at least 1, are all that wait to be computed. The step takes as many of them as fit into the
    target. But each step that a backlog is spread over delays its end by that step's fixed cost: where this would come
    to more than _MAX_DELAY_MS, the step takes more, and beside a deep queue it is full. The backlog is shared out
    evenly among its steps, which makes them shorter and not more.
    """
    within_target = (itl_target_ms - costs.fixed_ms) / costs.token_ms
    within_delay = num_backlog_tokens * costs.fixed_ms / _MAX_DELAY_MS
    most = int(max(within_target, within_delay, _LEAST_TOKENS)) // _GRANULE * _GRANULE
    num_steps = math.ceil(num_backlog_tokens / most)
    even = math.ceil(num_backlog_tokens / num_steps / _GRANULE) * _GRANULE
    return ChunkBudget(min(even, limit), _GRANULE)
