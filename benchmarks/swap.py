"""`octavo bench swap`: what running decodes feel of KV blocks that move between device and host beside them.

Prompts of one length, together more than the device holds, come one after another beside streams. As each ends, its
blocks are saved to the host; later ones take their place on the device. When the first comes again, its blocks are
loaded: so does each that follows, in the order of their first coming, since what was used longest ago goes first.
"""

import asyncio
import time
from dataclasses import dataclass, replace

from ..errors import InternalError, InvalidArgumentError
from ..launch.config import ServeConfig
from .presets import ModelSize
from .probe import total_blocks
from .report import Report
from .streams import Watcher, Window, itl_columns, open_watcher
from .summary import Summary
from .system import running_system
from .workload import LengthRange, Workload

_WARM_UP_TOKENS = 16
_POLL_S = 0.01
_SAME_STEP_S = 0.001  # within which the streams' tokens come after a prompt's first, of the same step
_SETTLED_POLLS = 5  # without another block saved
_SPARE_BLOCKS = 16
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class SwapSettings:
    """What moves, and beside what."""

    prompt_len: int  # tokens of each prompt that comes and goes
    num_streams: int
    stream_len: int  # tokens of a stream's prompt
    output_len: int  # that a stream has room for
    num_repeats: int  # prompts that are loaded
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_streams", "stream_len", "num_repeats"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(self, name)}", name)
        if self.output_len < 8 * _WARM_UP_TOKENS:
            least = 8 * _WARM_UP_TOKENS
            raise InvalidArgumentError(f"output_len must be at least {least}, got {self.output_len}", "output_len")

    def num_blocks(self, block_size: int) -> int:
        """Of the device: for the streams at their longest, and for two prompts."""
        of_streams = self.num_streams * _blocks_for(self.stream_len + self.output_len, block_size)
        return of_streams + 2 * _blocks_for(self.prompt_len, block_size) + _SPARE_BLOCKS

    def num_prompts(self, block_size: int) -> int:
        """So many that the first is gone from the device when the last has come."""
        return self.num_blocks(block_size) // max(1, self.prompt_len // block_size) + 2

    def host_bytes(self, block_size: int, block_bytes: int) -> int:
        """For all prompts."""
        return (self.num_prompts(block_size) + 1) * _blocks_for(self.prompt_len, block_size) * block_bytes

    def prompts(self, count: int, length: int, vocab_size: int, index: int) -> list[list[int]]:
        """`index` tells those of one use from those of another."""
        return Workload(count, LengthRange(length, length), 1, self.seed).prompts(vocab_size, repeat=index)


def swap_config(config: ServeConfig, settings: SwapSettings, size: ModelSize) -> ServeConfig:
    """`config` with as many device blocks as make prompts leave, and a host that holds them. Raises
    InvalidArgumentError for what could not be measured."""
    if settings.prompt_len < 2 * config.block_size:
        raise InvalidArgumentError(f"prompt_len must be two blocks or more, got {settings.prompt_len}", "prompt_len")
    longest = max(settings.prompt_len + 1, settings.stream_len + settings.output_len)
    if longest > (config.max_model_len or 0):
        raise InvalidArgumentError(f"{longest} tokens are over max_model_len ({config.max_model_len})", "prompt_len")
    if config.num_groups != 1 or settings.num_streams >= config.max_num_seqs:
        raise InvalidArgumentError("swap takes one group, and fewer streams than max_num_seqs", "streams")
    # Of 4 bytes an element, which no dtype exceeds: what is too much is never used.
    block_bytes = size.kv_elements_per_token * config.block_size * 4 // config.tensor_parallel_size
    host_bytes = settings.host_bytes(config.block_size, block_bytes)
    return replace(
        config,
        enable_prefix_caching=True,
        num_gpu_blocks_override=config.num_gpu_blocks_override or settings.num_blocks(config.block_size),
        swap_space=config.swap_space or host_bytes / _GIB,
    )


def run_swap(config: ServeConfig, settings: SwapSettings, report: Report) -> None:
    """Adds the table `Decodes` to the report. `config` is swap_config's."""
    with running_system(config) as system:
        asyncio.run(_measure(system.address, system.model.config.vocab_size, config.block_size, settings, report))


async def _measure(address: str, vocab_size: int, block_size: int, settings: SwapSettings, report: Report) -> None:
    async with open_watcher(address) as watcher:
        streams = watcher.streams
        prompts = settings.prompts(settings.num_prompts(block_size), settings.prompt_len, vocab_size, 1)
        streams.start(settings.prompts(settings.num_streams, settings.stream_len, vocab_size, 0), settings.output_len)
        await streams.advance(_WARM_UP_TOKENS)
        table = _Table(watcher, report)
        await table.add("alone", [await streams.advance(4 * _WARM_UP_TOKENS)], 0)
        saves, before = [], await table.num_saved()
        for prompt in prompts:
            await watcher.first_token(prompt)
            saves.append(await table.wait_for_saves())
        await table.add("blocks are saved", saves, await table.num_saved() - before)
        hits = [await watcher.first_token(prompts[-1]) for _ in range(settings.num_repeats)]
        await table.add("a prompt is found on the device", hits, 0)
        loads, before = [], await table.num_loaded()
        for index in range(settings.num_repeats):
            loads.append(await watcher.first_token(prompts[index % len(prompts)]))
            await streams.advance(_WARM_UP_TOKENS // 4)
        await table.add("a prompt is loaded from the host", loads, await table.num_loaded() - before)


class _Table:
    """Rows of what the streams felt."""

    def __init__(self, watcher: Watcher, report: Report) -> None:
        self._watcher, self._report = watcher, report
        self._step_ms = 0.0  # of the streams alone, as they see it

    async def add(self, when: str, windows: list[Window], num_moved_blocks: int) -> None:
        """Of the windows' gaps, some of which have not ended yet. What should move and did not is an error."""
        await self._watcher.streams.advance(1)
        gaps_s = self._watcher.streams.gaps_s(windows)
        summary = Summary.of_seconds(gaps_s)
        assert summary is not None, "streams got no tokens"
        self._step_ms = self._step_ms or summary.percentiles_ms[0]
        delay_ms = max(gaps_s) * 1e3 - self._step_ms
        row = {
            "meanwhile": when,
            "times": len(windows),
            "moved_blocks": num_moved_blocks,
            "s": sum(window.duration_s for window in windows),
            **itl_columns(gaps_s),
            "longest_delay_ms": delay_ms,
            "in_steps_alone": delay_ms / self._step_ms,
        }
        self._report.add("Decodes", row)

    async def num_saved(self) -> int:
        return total_blocks(await self._watcher.status()).num_saved_blocks

    async def num_loaded(self) -> int:
        return total_blocks(await self._watcher.status()).num_loaded_blocks

    async def wait_for_saves(self) -> Window:
        """From a prompt's end until no more blocks are saved. Raises InternalError if there were none to save."""
        started = ended = time.perf_counter() + _SAME_STEP_S
        number, unchanged = -1, 0
        while unchanged < _SETTLED_POLLS:
            await asyncio.sleep(_POLL_S)
            self._watcher.streams.check()
            status = await self._watcher.status()
            saved = total_blocks(status).num_saved_blocks
            if saved != number or any(group.blocks.num_in_transfer for group in status.groups):
                number, unchanged, ended = saved, 0, time.perf_counter()
            else:
                unchanged += 1
        if number == 0:
            raise InternalError("no block was saved to the host: is it cheaper to compute them again?")
        return Window(started, ended)


def _blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
