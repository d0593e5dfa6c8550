"""How many prompt tokens a step takes beside decodes: few enough that running streams keep their pace."""

import math

from .step_time import StepCosts

_LEAST_TOKENS = 128  # prompts always progress, and on a GPU so few tokens cost a step hardly more than none
_TILE = 64  # tokens: what kernels and graphs round a step up to
_MAX_DELAY_MS = 50.0
# Times its fixed cost that a step computes prompt tokens for before it is cut. Without this a target of 10 ms had
# prompts wait long for streams that ran no smoother. A simulation like that of tests/coordinator/test_pacing.py, which
# agrees with what clients of an H100 saw, gives 32 prompts of 512 tokens a second 28 ms with 2 here, 37 with 1 and 43
# with 0.5; and 14, 10.4 and 9.5 ms between tokens, at p95.
_LEAST_WORK = 2


def paced_num_tokens(itl_target_ms: float, costs: StepCosts, num_decodes: int, num_backlog_tokens: int) -> int:
    """Prompt tokens for a step with `num_decodes` decode rows and these `costs`.

    As many of the `num_backlog_tokens` (at least 1: all that wait to be computed) as fit into the target. But each step
    that a backlog is spread over delays its end by the step's fixed cost: where that would come to more than
    _MAX_DELAY_MS, the step takes more, and beside a deep queue all that it holds. Nor is a step cut until little but
    its fixed cost is left: where that is near the target, more steps would hold up streams as much, and prompts longer.
    A backlog is shared out evenly among its steps, which makes them shorter and not more. Decodes and prompt tokens
    together fill whole tiles.
    """
    within_target = (itl_target_ms - costs.fixed_ms) / costs.token_ms
    within_delay = num_backlog_tokens * costs.fixed_ms / _MAX_DELAY_MS
    worth_cutting = _LEAST_WORK * costs.fixed_ms / costs.token_ms
    most = max(within_target, within_delay, worth_cutting, _LEAST_TOKENS)
    most_in_tiles = int(most + num_decodes) // _TILE * _TILE - num_decodes
    num_steps = math.ceil(num_backlog_tokens / most_in_tiles)
    even = num_backlog_tokens / num_steps
    return math.ceil((even + num_decodes) / _TILE) * _TILE - num_decodes
