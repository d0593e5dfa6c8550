"""`octavo bench long-context`: what short streams feel while one long prompt is computed beside them.

Streams grow meanwhile: each of their tokens reads more than the one before, prompt or not. So they are
watched alone before the prompt and behind it, as long as they are then, and the latter is what it is held against.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidArgumentError
from ..launch.config import ServeConfig
from .probe import StepMeans, total_steps
from .report import Report, Row
from .streams import Watcher, Window, itl_columns, open_watcher
from .summary import Summary
from .system import running_system
from .workload import LengthRange, Workload

_ALONE_TOKENS = 512  # of each stream, each time
_WARM_UP_TOKENS = 16
_WARM_UP_PROMPTS = 4  # beside the streams: from them the coordinator learns what steps with chunks take
_WARM_UP_LEN = 1024


@dataclass(frozen=True, slots=True)
class LongContextSettings:
    """One prompt beside the streams, so many times."""

    prompt_len: int
    num_streams: int
    stream_len: int  # tokens of a stream's prompt
    num_repeats: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("prompt_len", "num_streams", "stream_len", "num_repeats"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(self, name)}", name)

    def check(self, config: ServeConfig) -> None:
        """Raises InvalidArgumentError for what the system could not hold."""
        max_model_len = config.max_model_len or 0
        if self.prompt_len >= max_model_len:
            raise InvalidArgumentError(
                f"a prompt of {self.prompt_len} tokens is over max_model_len ({max_model_len})", "prompt_len"
            )
        least = 2 * (_WARM_UP_TOKENS + _ALONE_TOKENS)
        if self.stream_len + least >= max_model_len:
            raise InvalidArgumentError(f"stream_len leaves streams no {least} tokens to generate", "stream_len")
        if self.num_streams >= config.max_num_seqs:
            raise InvalidArgumentError(f"streams must be under max_num_seqs ({config.max_num_seqs})", "streams")

    def prompts(self, count: int, length: int, vocab_size: int, index: int) -> list[list[int]]:
        """`index` tells those of one use from those of another."""
        return Workload(count, LengthRange(length, length), 1, self.seed).prompts(vocab_size, repeat=index)


def run_long_context(config: ServeConfig, settings: LongContextSettings, report: Report) -> None:
    """Adds the tables `Streams` and `Prompt` to the report."""
    with running_system(config) as system:
        output_len = (config.max_model_len or 0) - settings.stream_len  # nobody may leave before the end
        asyncio.run(_measure(system.address, system.model.config.vocab_size, output_len, settings, report))


async def _measure(
    address: str, vocab_size: int, output_len: int, settings: LongContextSettings, report: Report
) -> None:
    async with open_watcher(address) as watcher:
        streams = watcher.streams
        streams.start(settings.prompts(settings.num_streams, settings.stream_len, vocab_size, 0), output_len)
        await streams.advance(_WARM_UP_TOKENS)
        for prompt in settings.prompts(_WARM_UP_PROMPTS, min(_WARM_UP_LEN, settings.prompt_len), vocab_size, 1):
            await watcher.first_token(prompt)
        await streams.advance(_WARM_UP_TOKENS)
        windows: dict[str, list[Window]] = {"alone, before": [await streams.advance(_ALONE_TOKENS)]}
        for prompt in settings.prompts(settings.num_repeats, settings.prompt_len, vocab_size, 2):
            windows.setdefault("beside the prompt", []).append(await _watch_prompt(watcher, prompt, report))
            await streams.advance(_WARM_UP_TOKENS)  # what came late is there
            windows.setdefault("alone, behind", []).append(await streams.advance(_ALONE_TOKENS))
        gaps_s = {when: streams.gaps_s(those) for when, those in windows.items()}
        for when, those_s in gaps_s.items():
            report.add("Streams", _row(when, those_s, gaps_s["alone, behind"]))


async def _watch_prompt(watcher: Watcher, prompt: list[int], report: Report) -> Window:
    before = total_steps(await watcher.status())
    window = await watcher.first_token(prompt)
    steps = StepMeans.between(before, total_steps(await watcher.status()))
    row: Row = {
        "prompt_tokens": len(prompt),
        "ttft_s": window.duration_s,
        "steps": steps.num_steps,
        "step_ms": steps.step_s * 1e3,
        "tokens_per_step": steps.num_tokens,
    }
    report.add("Prompt", row)
    return window


def _row(when: str, gaps_s: Sequence[float], alone_s: Sequence[float]) -> Row:
    p99_ms, _ = _p99_and_median(gaps_s)
    alone_p99_ms, alone_ms = _p99_and_median(alone_s)
    times = {"p99_times_alone_p50": p99_ms / alone_ms, "p99_times_alone_p99": p99_ms / alone_p99_ms}
    return {"streams": when, **itl_columns(gaps_s), **times, "gaps": len(gaps_s)}


def _p99_and_median(gaps_s: Sequence[float]) -> tuple[float, float]:
    summary = Summary.of_seconds(gaps_s)
    assert summary is not None, "streams got no tokens"
    median, _, p99 = summary.percentiles_ms
    return p99, median
