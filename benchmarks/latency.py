"""`octavo bench latency`: the time of one decode step by batch size, and of the prefill of one prompt."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidArgumentError
from ..launch.config import ServeConfig
from .probe import DecodeCase, DecodeTimes, Probe, StepMeans, open_probe, total_blocks, total_steps
from .report import Report, Row
from .roof import Roof, percent_of_roof
from .summary import percentile_columns
from .system import System, running_system
from .workload import LengthRange, Workload


@dataclass(frozen=True, slots=True)
class LatencySettings:
    """What is measured, in this order."""

    batch_sizes: tuple[int, ...]
    context_len: int  # tokens that each sequence of a decode knows
    num_steps: int  # of each decode case
    prefill_lens: tuple[int, ...]
    num_repeats: int  # of each prefill
    seed: int
    repeated_lens: tuple[int, ...] = ()  # of prompts that are sent twice

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "prefill_lens", "repeated_lens"):
            if any(value < 1 for value in getattr(self, name)):
                raise InvalidArgumentError(f"{name} must be at least 1", name)
        for name in ("num_steps", "num_repeats"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(self, name)}", name)


def check_latency(settings: LatencySettings, config: ServeConfig, vocab_size: int) -> list[DecodeCase]:
    """The cases of decode. Raises InvalidArgumentError for those that the system could not hold."""
    max_model_len = config.max_model_len or 0
    if config.num_groups != 1:
        raise InvalidArgumentError("latency measures one group; leave num_groups at 1", "num_groups")
    if settings.repeated_lens and not config.enable_prefix_caching:
        raise InvalidArgumentError(
            "--repeated-prompt shows what prefix caching does; add --enable-prefix-caching", "repeated_prompt"
        )
    if over := [length for length in (*settings.prefill_lens, *settings.repeated_lens) if length >= max_model_len]:
        raise InvalidArgumentError(f"a prefill of {over[0]} tokens is over max_model_len ({max_model_len})", "prefill")
    if over := [size for size in settings.batch_sizes if size > config.max_num_seqs]:
        raise InvalidArgumentError(f"batch size {over[0]} is over max_num_seqs ({config.max_num_seqs})", "batch_size")
    context_len, num_steps = settings.context_len, settings.num_steps
    return [
        DecodeCase(size, context_len, num_steps, vocab_size, max_model_len, settings.seed)
        for size in settings.batch_sizes
    ]


def run_latency(config: ServeConfig, settings: LatencySettings, cases: Sequence[DecodeCase], report: Report) -> None:
    """Adds the tables `Decode`, `Prefill` and `Repeated prompt` to the report, as far as they are asked for."""
    with running_system(config) as system:
        asyncio.run(_measure(system, config.tensor_parallel_size, settings, cases, report))


async def _measure(
    system: System, num_ranks: int, settings: LatencySettings, cases: Sequence[DecodeCase], report: Report
) -> None:
    async with open_probe(system.address) as probe:
        await probe.measure_ttft(cases[0].prompts()[0] if cases else [0])  # what is slow only once is done here
        roof = Roof.of(system.model.config, await probe.status(), num_ranks)
        for case in cases:
            report.add("Decode", _decode_row(case, await probe.measure_decode(case), roof))
        for length in settings.prefill_lens:
            report.add("Prefill", await _prefill_row(probe, length, system.model.config.vocab_size, settings, roof))
        for length in settings.repeated_lens:
            prompts = _prompts(length, system.model.config.vocab_size, settings)
            report.add("Repeated prompt", await _repeated_row(probe, prompts))


def _decode_row(case: DecodeCase, times: DecodeTimes, roof: Roof | None) -> Row:
    steps, roof_s = times.steps, None if roof is None else roof.decode_s(case.batch_size, case.context_len)
    itl = percentile_columns("itl", times.gaps_s)
    return {
        "batch": case.batch_size,
        "step_ms": steps.step_s * 1e3,
        "model_ms": steps.model_s * 1e3,
        "outside_model_percent": 100 * steps.share_outside_model,
        "plan_bytes": steps.plan_bytes,
        **itl,
        "roof_ms": None if roof_s is None else roof_s * 1e3,
        "roof_percent": percent_of_roof(roof_s, steps.step_s),
        "tokens_per_step": steps.num_tokens,
        "steps": steps.num_steps,
    }


async def _prefill_row(probe: Probe, length: int, vocab_size: int, settings: LatencySettings, roof: Roof | None) -> Row:
    prompts = _prompts(length, vocab_size, settings)
    await probe.measure_ttft(prompts.pop())
    before = total_steps(await probe.status())
    times_ms = [await probe.measure_ttft(prompt) * 1e3 for prompt in prompts]
    steps = StepMeans.between(before, total_steps(await probe.status()))
    roof_s, ttft_p50_ms = None if roof is None else roof.prefill_s(length), float(np.median(times_ms))
    return {
        "prompt_tokens": length,
        "ttft_p50_ms": ttft_p50_ms,
        "ttft_min_ms": min(times_ms),
        "model_ms": steps.model_s * steps.num_steps / len(prompts) * 1e3,
        "roof_ms": None if roof_s is None else roof_s * 1e3,
        "roof_percent": percent_of_roof(roof_s, ttft_p50_ms / 1e3),
        "steps": steps.num_steps / len(prompts),
    }


async def _repeated_row(probe: Probe, prompts: list[list[int]]) -> Row:
    """Each prompt twice, one right after the other; the first pair does what is slow only once."""
    counters = total_blocks(await probe.status())
    times_ms = [[await probe.measure_ttft(prompt) * 1e3 for _ in ("unseen", "seen")] for prompt in prompts]
    hits = total_blocks(await probe.status()).num_device_hit_tokens - counters.num_device_hit_tokens
    unseen_ms, seen_ms = zip(*times_ms[1:], strict=True)
    return {
        "prompt_tokens": len(prompts[0]),
        "cached_tokens": hits / len(prompts),
        "unseen_ttft_p50_ms": float(np.median(unseen_ms)),
        "unseen_ttft_min_ms": min(unseen_ms),
        "seen_ttft_p50_ms": float(np.median(seen_ms)),
        "seen_ttft_min_ms": min(seen_ms),
    }


def _prompts(length: int, vocab_size: int, settings: LatencySettings) -> list[list[int]]:
    """One more than there are repeats. Those of one length are not the beginning of those of another."""
    seed = settings.seed + length
    return Workload(settings.num_repeats + 1, LengthRange(length, length), 1, seed).prompts(vocab_size)
