"""How long a group's steps take: a line fitted to those that computed prompt tokens.

Its unit is the plain token: what a prompt token costs that nothing stands before. One with a context costs more, since
its attention reads all of it; how much more is a property of model and machine, and learned too.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

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
_CONTEXT_PRIOR_WEIGHT = 0.001
_MOST_OFF = 4.0
_TILE = 64  # tokens that attention computes at once, however few there are: the unit of what a context costs by itself
_NUM_FEATURES = 3
# (tokens - prior)^2 + (tokens - attended)^2 + context^2, of slopes: what draws them, as the matrix of a quadratic form.
_PULLS = np.array(((2.0, -1.0, 0.0), (-1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step with prompt tokens computed."""

    num_decodes: int
    num_chunk_tokens: int
    num_attended: int = 0  # tokens before each of the chunks' tokens in its sequence, together
    num_context: int = 0  # tokens before each of the chunks, together


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Of a step with prompt tokens, in milliseconds."""

    fixed_ms: float  # at least 0: before its first prompt token
    token_ms: float  # over 0: what each of them adds that nothing stands before
    doubling_context: float = math.inf  # tokens; behind so many, a token adds twice as much
    entry_price: float = 0.0  # plain tokens for each token of a chunk's context, however short the chunk

    def entry(self, context: int) -> float:
        """What any chunk behind `context` tokens costs before its first token, in plain ones."""
        return self.entry_price * context

    def price(self, num_tokens: int, context: int) -> float:
        """What tokens behind `context` others of their sequence cost beyond that, in plain ones."""
        return num_tokens * (1 + (context + num_tokens / 2) / self.doubling_context)

    def affordable(self, price: float, context: int) -> float:
        """How many tokens behind `context` others have that price."""
        first = 1 + context / self.doubling_context
        return 2 * price / (first + math.sqrt(first**2 + 2 * price / self.doubling_context))


class _Moments:
    """Of observations (1, *features, time), weighted so that errors count relative to the duration, and falling
    exponentially with age."""

    __slots__ = ("_decay", "_sums")

    def __init__(self, memory: int) -> None:
        self._decay = 1 - 1 / memory
        self._sums = np.zeros((_NUM_FEATURES + 2, _NUM_FEATURES + 2))

    @property
    def weight(self) -> float:
        return float(self._sums[0, 0])

    def add(self, features: tuple[float, ...], time_ms: float) -> None:
        row = np.array((1.0, *features, time_ms)) / time_ms
        self._sums = self._decay * self._sums + np.outer(row, row)

    def means(self) -> Floats:
        means: Floats = self._sums[0, 1:] / self._sums[0, 0]
        return means

    def covariances(self) -> Floats:
        means = self.means()
        covariances: Floats = self._sums[1:, 1:] / self._sums[0, 0] - np.outer(means, means)
        return covariances


class StepTimeModel:
    """step time = fixed + token_ms * (2 * decode rows + price of the chunks), from durations that the caller measured.

    Weighted least squares. Errors count relative to the duration, so one slow step (a first use of a kernel, a profile)
    weighs little. The slope is drawn a little to that of the prior: this settles it while all chunks have the same
    size. For fixed and token_ms only the last few dozen steps count, so a machine's clocks may drift.
    """

    __slots__ = ("_all", "_costs", "_recent")

    def __init__(self) -> None:
        self._recent = _Moments(_MEMORY)
        self._all = _Moments(_CONTEXT_MEMORY)
        self._costs: StepCosts | None = None  # without decodes, as of the last observation

    @property
    def is_fitted(self) -> bool:
        """Whether there has been anything to learn from."""
        return self._recent.weight > 0

    def observe(self, load: StepLoad, time_ms: float) -> None:
        """A step with prompt tokens took `time_ms`, over 0. Steps of decodes alone are another kind: CUDA graphs."""
        features = (
            load.num_chunk_tokens + _TOKENS_PER_DECODE * load.num_decodes,
            load.num_attended / _DOUBLING_CONTEXT,
            load.num_context * _TILE / _DOUBLING_CONTEXT,
        )
        self._recent.add(features, time_ms)
        self._all.add(features, time_ms)
        self._costs = None

    def costs(self, num_decodes: int) -> StepCosts:
        """Of a step with so many decode rows. The model must be fitted."""
        if self._costs is None:
            self._costs = self._fit()
        fixed_ms = self._costs.fixed_ms + self._costs.token_ms * _TOKENS_PER_DECODE * num_decodes
        return replace(self._costs, fixed_ms=fixed_ms)

    def expected_ms(self, load: StepLoad) -> float:
        """Of such a step. The model must be fitted."""
        costs = self.costs(load.num_decodes)
        price = load.num_chunk_tokens + load.num_attended / costs.doubling_context + costs.entry(load.num_context)
        return costs.fixed_ms + costs.token_ms * price

    def _fit(self) -> StepCosts:
        """Of a step without decode rows."""
        prices = self._prices()
        means, covariances = self._recent.means(), self._recent.covariances()
        mean_tokens, mean_time = float(prices @ means[:-1]), float(means[-1])
        variance, covariance = float(prices @ covariances[:-1, :-1] @ prices), float(prices @ covariances[:-1, -1])
        prior_token_ms = mean_time / (mean_tokens + _FIXED_COST_TOKENS)
        prior_variance = _PRIOR_WEIGHT * (mean_tokens + _FIXED_COST_TOKENS) ** 2
        token_ms = (covariance + prior_variance * prior_token_ms) / (variance + prior_variance)
        token_ms = min(max(token_ms, _LEAST_SLOPE * prior_token_ms), mean_time / mean_tokens)
        fixed_ms = mean_time - token_ms * mean_tokens
        _, attended, context = prices.tolist()
        return StepCosts(fixed_ms, token_ms, _DOUBLING_CONTEXT / attended, context * _TILE / _DOUBLING_CONTEXT)

    def _prices(self) -> Floats:
        """Of the features, in plain tokens: by the prior 1, 1, 0. Slopes fitted to all steps that are known; those of
        tokens and of what is attended are drawn a little to one another, so that short contexts leave them the same."""
        means, covariances = self._all.means(), self._all.covariances()
        scale = means[0] + means[1] + _FIXED_COST_TOKENS
        pull = _CONTEXT_PRIOR_WEIGHT * scale**2
        slopes = np.linalg.solve(
            covariances[:-1, :-1] + pull * _PULLS, covariances[:-1, -1] + pull * np.array((means[-1] / scale, 0.0, 0.0))
        )
        if slopes[0] <= 0:
            return np.array((1.0, _MOST_OFF, 0.0))
        attended, context = slopes[1] / slopes[0], slopes[2] / slopes[0]
        return np.array((1.0, min(max(attended, 1 / _MOST_OFF), _MOST_OFF), min(max(context, 0.0), _MOST_OFF)))
