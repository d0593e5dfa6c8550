"""How long a group's steps take: a line fitted to those that computed prompt tokens."""

from dataclasses import dataclass

# A decode row reads the KV of its whole context: it costs about what these prompt tokens do.
_TOKENS_PER_DECODE = 2
# The prior's one assumption: what every step costs, the reading of the weights, is the price of this many tokens.
# Today's GPUs do 180 to 300 multiplications in the time in which they read one bfloat16.
_FIXED_COST_TOKENS = 256
_PRIOR_WEIGHT = 0.05  # of the fitted steps' weight
_MEMORY = 32  # steps after which an observation counts for 1/e
_LEAST_SLOPE = 0.25  # of the prior's: beside ever longer contexts, more tokens may seem to cost nothing


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Of a step with prompt tokens, in milliseconds."""

    fixed_ms: float  # at least 0: before its first prompt token
    token_ms: float  # over 0: what each of them adds


class StepTimeModel:
    """step time = fixed + token_ms * (prompt tokens + 2 * decode rows), from durations that the caller measured.

    Weighted least squares, the weights falling exponentially with age. Errors count relative to the duration, so one
    slow step (a first use of a kernel, a profile) weighs little. The slope is drawn a little to that of the prior: this
    settles it while all chunks have the same size. Only the last few dozen steps count, so contexts and a machine's
    clocks may drift.
    """

    __slots__ = ("_sum_time", "_sum_tokens", "_sum_tokens_squared", "_sum_tokens_time", "_weight")

    def __init__(self) -> None:
        self._weight = 0.0
        self._sum_tokens = self._sum_time = self._sum_tokens_squared = self._sum_tokens_time = 0.0

    @property
    def is_fitted(self) -> bool:
        """Whether there has been anything to learn from."""
        return self._weight > 0

    def observe(self, num_decodes: int, num_chunk_tokens: int, time_ms: float) -> None:
        """A step with prompt tokens took `time_ms`, over 0. Steps of decodes alone are another kind: CUDA graphs."""
        decay = 1 - 1 / _MEMORY
        weight = time_ms**-2
        tokens = num_chunk_tokens + _TOKENS_PER_DECODE * num_decodes
        self._weight = decay * self._weight + weight
        self._sum_tokens = decay * self._sum_tokens + weight * tokens
        self._sum_time = decay * self._sum_time + weight * time_ms
        self._sum_tokens_squared = decay * self._sum_tokens_squared + weight * tokens**2
        self._sum_tokens_time = decay * self._sum_tokens_time + weight * tokens * time_ms

    def costs(self, num_decodes: int) -> StepCosts:
        """Of a step with so many decode rows. The model must be fitted."""
        mean_tokens, mean_time = self._sum_tokens / self._weight, self._sum_time / self._weight
        variance = self._sum_tokens_squared / self._weight - mean_tokens**2
        covariance = self._sum_tokens_time / self._weight - mean_tokens * mean_time
        prior_token_ms = mean_time / (mean_tokens + _FIXED_COST_TOKENS)
        prior_variance = _PRIOR_WEIGHT * (mean_tokens + _FIXED_COST_TOKENS) ** 2
        token_ms = (covariance + prior_variance * prior_token_ms) / (variance + prior_variance)
        token_ms = min(max(token_ms, _LEAST_SLOPE * prior_token_ms), mean_time / mean_tokens)
        return StepCosts(mean_time + token_ms * (_TOKENS_PER_DECODE * num_decodes - mean_tokens), token_ms)
