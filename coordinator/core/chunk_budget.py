"""How many prompt tokens a step takes beside decodes: few enough that running streams keep their pace.

Counted in plain tokens (core/step_time.py): behind a long context, fewer come to the same.
"""

import math

from .step_time import StepCosts

_LEAST_TOKENS = 128  # prompts always progress, and on a GPU so few plain tokens cost a step hardly more than none
_TILE = 64  # tokens: what kernels and graphs round a step up to
_CHUNK_TILE = 16  # tokens that read a long context once for all of them: what attention rounds a chunk up to
# Tokens. Attention of two tiles takes an H100 hardly longer than of one: 206 us for 192 behind 127,000 tokens, and 273
# of three. For one it waits for memory, and the second finds the keys in the cache.
_LEAST_CHUNK = 2 * _CHUNK_TILE
# Of what a context costs by itself, for the tokens behind it where that leaves nothing of the price: streams are late
# whatever the chunk, and with a quarter more the prompt is soon done.
_LEAST_SHARE = 0.25
_MAX_DELAY_MS = 50.0
# Times its fixed cost that a step computes prompt tokens for before it is cut. Without this a target of 10 ms had
# prompts wait long for streams that ran no smoother. A simulation like that of tests/coordinator/test_pacing.py, which
# agrees with what clients of an H100 saw, gives 32 prompts of 512 tokens a second 28 ms with 2 here, 37 with 1 and 43
# with 0.5; and 14, 10.4 and 9.5 ms between tokens, at p95.
_LEAST_WORK = 2
# Tokens. A longer prompt takes its time in any case, and streams would be held up for all of it.
_LONG_PROMPT = 8192
# Of the target, beside a long prompt: without it, half of its hundreds of steps would be over the target.
_MARGIN = 0.06
# Of each prompt that waits, plain tokens that count as the backlog: beyond them it delays itself, not a queue.
_MOST_COUNTED = 2048


class ChunkBudget:
    """What is left of a step's room for prompt tokens, and where it is paced of the price they may have."""

    __slots__ = ("_costs", "_num_rows", "_num_tokens", "_price")

    def __init__(
        self, num_tokens: int, costs: StepCosts | None = None, price: float = math.inf, num_decodes: int = 0
    ) -> None:
        """`price` in plain tokens; without `costs`, there is none."""
        self._num_tokens = num_tokens
        self._costs = costs
        self._price = price
        self._num_rows = num_decodes  # of the step's tensors so far

    @property
    def is_spent(self) -> bool:
        return self._num_tokens <= 0 or self._price <= 0

    def take(self, num_pending: int, context: int) -> int:
        """Tokens for a chunk of a sequence that has so many to compute behind `context` others; at least 1. It must not
        be spent."""
        num_tokens = min(num_pending, self._num_tokens)
        if self._costs is not None:
            entry = self._costs.entry(context)
            price = entry + self._costs.price(num_tokens, context)
            if price > self._price:
                rest = max(self._price - entry, _LEAST_SHARE * entry)
                num_tokens = min(num_tokens, self._rounded(self._costs.affordable(rest, context)))
                price = self._price  # all of it: what rounding left would make a tile of its own
            self._price -= price
        self._num_tokens -= num_tokens
        self._num_rows += num_tokens
        return num_tokens

    def _rounded(self, num_tokens: float) -> int:
        """So that the step fills whole tiles, where that makes little difference to the chunk."""
        in_tiles = round((self._num_rows + num_tokens) / _TILE) * _TILE - self._num_rows
        if abs(in_tiles - num_tokens) <= num_tokens / 8:
            return in_tiles
        return max(_LEAST_CHUNK, int(num_tokens) // _CHUNK_TILE * _CHUNK_TILE)


def counted_tokens(price: float) -> int:
    """Of a prompt that costs so many plain tokens to compute, those that count as backlog."""
    return math.ceil(min(price, _MOST_COUNTED))


def paced_num_tokens(
    itl_target_ms: float, costs: StepCosts, num_decodes: int, num_backlog_tokens: int, longest_prompt: int = 0
) -> int:
    """Plain prompt tokens for a step with `num_decodes` decode rows and these `costs`.

    As many of the `num_backlog_tokens` (at least 1: all that wait to be computed) as fit into the target. But each step
    that a backlog is spread over delays its end by the step's fixed cost: where that would come to more than
    _MAX_DELAY_MS, the step takes more, and beside a deep queue all that it holds. Nor is a step cut until little but
    its fixed cost is left: where that is near the target, more steps would hold up streams as much, and prompts longer.
    But beside a long prompt the streams go first. A backlog is shared out evenly among its steps, which makes them
    shorter and not more. Decodes and prompt tokens together fill whole tiles.
    """
    within_target = (itl_target_ms - costs.fixed_ms) / costs.token_ms
    within_delay = num_backlog_tokens * costs.fixed_ms / _MAX_DELAY_MS
    worth_cutting = _LEAST_WORK * costs.fixed_ms / costs.token_ms
    if longest_prompt > _LONG_PROMPT:
        within_target -= _MARGIN * itl_target_ms / costs.token_ms
        worth_cutting = 0.0
    most = max(within_target, within_delay, worth_cutting, _LEAST_TOKENS)
    most_in_tiles = int(most + num_decodes) // _TILE * _TILE - num_decodes
    num_steps = math.ceil(num_backlog_tokens / most_in_tiles)
    even = num_backlog_tokens / num_steps
    return math.ceil((even + num_decodes) / _TILE) * _TILE - num_decodes
