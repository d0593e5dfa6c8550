"""Which requests are accepted: those that can be served by some group alone, however full it is now."""

from collections.abc import Collection, Iterable

from ...errors import InvalidArgumentError, OctavoError
from .block_manager import num_blocks_for
from .placement import could_hold
from .scheduler_config import SchedulerConfig
from .sequence import RequestKey
from .sequence_group import SequenceGroup
from .worker_group import WorkerGroup


def check_fits(samples: SequenceGroup, config: SchedulerConfig, groups: Collection[WorkerGroup]) -> None:
    """Raises InvalidArgumentError, naming the field, for a request that could never run to its end on `groups`; without
    any, they are not asked."""
    limit = config.max_model_len
    num_prompt_tokens = len(samples.request.prompt_token_ids)
    if not 0 < num_prompt_tokens < limit:
        raise InvalidArgumentError(
            f"the prompt has {num_prompt_tokens} tokens; it must have at least 1 and leave room for "
            f"one more within the context length of {limit}",
            field="prompt",
        )
    # The last token's KV is never written.
    needed = num_blocks_for(samples.max_num_tokens - 1, config.block_size)
    available = max((group.blocks.num_blocks for group in groups), default=0)
    if groups and needed > available:
        raise InvalidArgumentError(
            f"prompt plus max_tokens need {needed} KV blocks of {config.block_size} tokens; a group has {available}",
            field="max_tokens",
        )
    if samples.beams is not None:
        least = min((group.blocks.num_blocks for group in groups), default=None)
        _check_beams(samples, samples.beams.num_beams, needed, least, config)


def check_resumed(samples: SequenceGroup) -> None:
    """Raises InvalidArgumentError for outputs that no reader can be in the middle of."""
    request, stop = samples.request, samples.request.stop
    max_tokens = samples.max_num_tokens - len(request.prompt_token_ids)
    indices = [output.index for output in request.resumed]
    if len(set(indices)) < len(indices) or max(indices, default=0) >= request.num_samples:
        raise _bad_resumption(f"the outputs {indices} of {request.num_samples}")
    for output in request.resumed:
        num_tokens = len(output.token_ids)
        if num_tokens >= (1 if request.beam_search else max_tokens):
            raise _bad_resumption(f"{num_tokens} tokens of output {output.index}, which takes {max_tokens}")
        if num_tokens >= max(1, stop.min_tokens) and output.token_ids[-1] in stop.stop_token_ids:
            raise _bad_resumption(f"output {output.index}, which has ended")
        if output.num_prompt_logprobs >= (1 if output.index else len(request.prompt_token_ids)):
            raise _bad_resumption(f"{output.num_prompt_logprobs} prompt logprobs of output {output.index}")


def _bad_resumption(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the request cannot go on from {what}", field="resumed")


def find_misfits(
    requests: Iterable[SequenceGroup], config: SchedulerConfig, groups: Collection[WorkerGroup]
) -> dict[RequestKey, OctavoError]:
    """Which of `requests` could never run to their ends, and why: accepted for a group that is gone, or while there was
    none. One that any group can hold, and be it the only one, goes on there. By the key of the first open output."""
    misfits: dict[RequestKey, OctavoError] = {}
    for samples in requests:
        if any(could_hold(group, samples) for group in groups):
            continue
        try:
            check_fits(samples, config, groups)
        except InvalidArgumentError as error:
            misfits[samples.keys[0]] = error
    return misfits


def _check_beams(
    samples: SequenceGroup, num_beams: int, needed: int, available: int | None, config: SchedulerConfig
) -> None:
    """Beams run together or not at all, and may have nothing in common when they come back from a preemption. The
    smallest group must hold them: it may be the one that is left."""
    if num_beams > config.max_num_seqs:
        raise InvalidArgumentError(
            f"num_beams ({num_beams}) must be at most max_num_seqs ({config.max_num_seqs})", field="num_beams"
        )
    if samples.request.num_samples > num_beams:
        raise InvalidArgumentError(
            f"num_beams ({num_beams}) must be at least n ({samples.request.num_samples})", field="num_beams"
        )
    if available is not None and num_beams * needed > available:
        raise InvalidArgumentError(
            f"{num_beams} beams of prompt plus max_tokens may need {num_beams * needed} KV blocks of "
            f"{config.block_size} tokens; a group has {available}",
            field="num_beams",
        )
