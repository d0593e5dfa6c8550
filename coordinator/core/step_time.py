"""How long a group's steps take: a line fitted to those that computed prompt tokens.

Its unit is the plain token: what a prompt token costs that nothing stands before. One with a context costs more, since
its attention reads all of it; how much more is a property of model and machine, and learned too.
"""

import math
from dataclasses import dataclass

# A decode row reads the KV of its whole context: it costs about what these prompt tokens do.
_TOKENS_PER_DECODE = 2
# The prior's one assumption: what every step costs, the reading of the weights, is the price of this many tokens.
# Today's GPUs do 180 to 300 multiplications in the time in which they read one bfloat16.
_FIXED_COST_TOKENS = 256
_PRIOR_WEIGHT = 0.05  # of the fitted steps' weight
_MEMORY = 32  # steps after which an observation counts for 1/e
_LEAST_SLOPE = 0.25  # of the prior's: beside ever longer contexts, more tokens may seem to cost nothing
# Tokens before a token that make it cost twice as much. By multiplications they are 30,000 of an 8B model's, and those
# of attention are the slower ones. They hardly change, so they are learned from long ago, and never found far off.
_DOUBLING_CONTEXT = 16_384
_CONTEXT_MEMORY = 4096
_CONTEXT_PRIOR_WEIGHT = 0.002
_MOST_OFF = 4.0


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Of a step with prompt tokens, in milliseconds."""

    fixed_ms: float  # at least 0: before its first prompt token
    token_ms: float  # over 0: what each of them adds that nothing stands before
    doubling_context: float = math.inf  # tokens; behind so many, a token adds twice as much

    def price(self, num_tokens: int, context: int) -> float:
        """What tokens behind `context` others of their sequence cost, in plain ones."""
        return num_tokens * (1 + (context + num_tokens / 2) / self.doubling_context)

    def affordable(self, price: float, context: int) -> float:
        """How many tokens behind `context` others have that price."""
        first = 1 + context / self.doubling_context
        return 2 * price / (first + math.sqrt(first**2 + 2 * price / self.doubling_context))


class _Sums:
    """Of observations, weighted so that errors count relative to the duration, and falling exponentially with age.

    tokens: plain ones, were there no context; attended: what the context adds to them, by the prior.
    """

    __slots__ = ("_decay", "attended", "attended_2", "attended_time", "time", "tokens", "tokens_2", "tokens_attended",
                 "tokens_time", "weight")  # fmt: skip

    def __init__(self, memory: int) -> None:
        self._decay = 1 - 1 / memory
        self.weight = self.time = self.tokens = self.attended = 0.0
        self.tokens_2 = self.attended_2 = self.tokens_attended = self.tokens_time = self.attended_time = 0.0

    def add(self, tokens: float, attended: float, time_ms: float) -> None:
        decay, weight = self._decay, time_ms**-2
        self.weight = decay * self.weight + weight
        self.time = decay * self.time + weight * time_ms
        self.tokens = decay * self.tokens + weight * tokens
        self.attended = decay * self.attended + weight * attended
        self.tokens_2 = decay * self.tokens_2 + weight * tokens**2
        self.attended_2 = decay * self.attended_2 + weight * attended**2
        self.tokens_attended = decay * self.tokens_attended + weight * tokens * attended
        self.tokens_time = decay * self.tokens_time + weight * tokens * time_ms
        self.attended_time = decay * self.attended_time + weight * attended * time_ms


class StepTimeModel:
    """step time = fixed + token_ms * (prompt tokens * (1 + context / doubling context) + 2 * decode rows), from
    durations that the caller measured.

    Weighted least squares. Errors count relative to the duration, so one slow step (a first use of a kernel, a profile)
    weighs little. The slope is drawn a little to that of the prior: this settles it while all chunks have the same
    size. For fixed and token_ms only the last few dozen steps count, so a machine's clocks may drift.
    """

    __slots__ = ("_all", "_recent")

    def __init__(self) -> None:
        self._recent = _Sums(_MEMORY)
        self._all = _Sums(_CONTEXT_MEMORY)

    @property
    def is_fitted(self) -> bool:
        """Whether there has been anything to learn from."""
        return self._recent.weight > 0

    def observe(self, num_decodes: int, num_chunk_tokens: int, num_attended: int, time_ms: float) -> None:
        """A step with prompt tokens took `time_ms`, over 0; `num_attended`: the tokens before each of them, together.
        Steps of decodes alone are another kind: CUDA graphs."""
        tokens, attended = num_chunk_tokens + _TOKENS_PER_DECODE * num_decodes, num_attended / _DOUBLING_CONTEXT
        self._recent.add(tokens, attended, time_ms)
        self._all.add(tokens, attended, time_ms)

    def costs(self, num_decodes: int) -> StepCosts:
        """Of a step with so many decode rows. The model must be fitted."""
        sums, ratio = self._recent, self._attention_ratio()
        mean_tokens, mean_time = (sums.tokens + ratio * sums.attended) / sums.weight, sums.time / sums.weight
        squares = sums.tokens_2 + 2 * ratio * sums.tokens_attended + ratio**2 * sums.attended_2
        variance = squares / sums.weight - mean_tokens**2
        covariance = (sums.tokens_time + ratio * sums.attended_time) / sums.weight - mean_tokens * mean_time
        prior_token_ms = mean_time / (mean_tokens + _FIXED_COST_TOKENS)
        prior_variance = _PRIOR_WEIGHT * (mean_tokens + _FIXED_COST_TOKENS) ** 2
        token_ms = (covariance + prior_variance * prior_token_ms) / (variance + prior_variance)
        token_ms = min(max(token_ms, _LEAST_SLOPE * prior_token_ms), mean_time / mean_tokens)
        fixed_ms = mean_time + token_ms * (_TOKENS_PER_DECODE * num_decodes - mean_tokens)
        return StepCosts(fixed_ms, token_ms, _DOUBLING_CONTEXT / ratio)

    def _attention_ratio(self) -> float:
        """What a context adds, to what the prior says. Two slopes, of tokens and of what their contexts add, fitted to
        all steps that are known. They are drawn a little to one another, so that short contexts leave them the same."""
        sums = self._all
        tokens, attended, time = (each / sums.weight for each in (sums.tokens, sums.attended, sums.time))
        pull = _CONTEXT_PRIOR_WEIGHT * (tokens + attended + _FIXED_COST_TOKENS) ** 2
        prior_token_ms = time / (tokens + attended + _FIXED_COST_TOKENS)
        a = sums.tokens_2 / sums.weight - tokens**2 + 2 * pull
        b = sums.tokens_attended / sums.weight - tokens * attended - pull
        c = sums.attended_2 / sums.weight - attended**2 + pull
        p = sums.tokens_time / sums.weight - tokens * time + pull * prior_token_ms
        q = sums.attended_time / sums.weight - attended * time
        token_ms, attended_ms = p * c - q * b, q * a - p * b  # both times the same determinant, which is over 0
        if token_ms <= 0:
            return _MOST_OFF
        return min(max(attended_ms / token_ms, 1 / _MOST_OFF), _MOST_OFF)
