"""`octavo bench memory`: KV memory lost in partial blocks and saved by sharing, as the PagedAttention paper counts it.

The figures are of the block table of a running system, summed over its steps: places in partial blocks that hold no
token (section 4.3 of arXiv 2309.06180), and blocks that sequences share (section 6.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InternalError, InvalidArgumentError
from ..launch.beam_search import BeamSearchParams
from ..launch.bulk import BulkClient, BulkRequest
from ..launch.client import Client
from ..launch.config import ServeConfig
from ..launch.prompts import AnyParams, RequestOptions, build_request
from ..launch.sampling_params import SamplingParams
from ..proto import admin_pb2
from .length_mix import ALPACA, SHAREGPT, LengthMix
from .probe import total_blocks
from .report import Report, Row
from .system import System, open_bulk, running_system

SAMPLING, BEAM_SEARCH = "parallel sampling", "beam search"
WASTE_GOAL_PERCENT = 4.0
# Of the paper, from 2 to 6 sequences for a prompt.
_PAPER_PERCENT = {
    (ALPACA.name, SAMPLING): "6.1 to 9.8",
    (SHAREGPT.name, SAMPLING): "16.2 to 30.5",
    (ALPACA.name, BEAM_SEARCH): "37.6 to 55.2",
    (SHAREGPT.name, BEAM_SEARCH): "44.3 to 66.3",
}
_OUTPUTS = RequestOptions(only_end=True, return_prompt_token_ids=False)


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What is measured: each mix alone, and with each way of sharing at each width."""

    num_prompts: dict[str, int]  # by mix
    widths: tuple[int, ...]  # sequences for a prompt
    seed: int

    def __post_init__(self) -> None:
        if wrong := [count for count in self.num_prompts.values() if count < 1]:
            raise InvalidArgumentError(f"num_prompts must be at least 1, got {wrong[0]}", "num_prompts")
        if wrong := [width for width in self.widths if width < 2]:
            raise InvalidArgumentError(
                f"width must be at least 2: one sequence shares nothing, got {wrong[0]}", "width"
            )


@dataclass(frozen=True, slots=True)
class BlockMeans:
    """Over the steps between two snapshots."""

    num_steps: int
    waste: float  # of the places of all tables' blocks, those without a token
    saved: float  # of the blocks that tables would take if none were shared
    num_copied: int

    @classmethod
    def between(cls, before: admin_pb2.BlockCounters, after: admin_pb2.BlockCounters, block_size: int) -> "BlockMeans":
        num_steps = after.num_steps - before.num_steps
        entries = after.sum_table_entries - before.sum_table_entries
        if not (num_steps and entries):
            raise InternalError("no step held a block between two snapshots of the status")
        return cls(
            num_steps,
            waste=(after.sum_empty_places - before.sum_empty_places) / (entries * block_size),
            saved=1 - (after.sum_used - before.sum_used) / entries,
            num_copied=after.num_copied_blocks - before.num_copied_blocks,
        )


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """One workload: requests of a mix, each with so many sequences."""

    mix: LengthMix
    way: str
    width: int

    def params(self, output_len: int) -> AnyParams:
        if self.way == BEAM_SEARCH:
            return BeamSearchParams(self.width, max_tokens=output_len, ignore_eos=True)
        return SamplingParams(n=self.width, temperature=1.0, max_tokens=output_len, ignore_eos=True)


def sharing_cases(widths: Sequence[int]) -> list[MemoryCase]:
    return [
        MemoryCase(mix, way, width) for way in (SAMPLING, BEAM_SEARCH) for mix in (ALPACA, SHAREGPT) for width in widths
    ]


def run_memory(config: ServeConfig, settings: MemorySettings, report: Report) -> None:
    """Adds the tables `Waste in partial blocks` and `Memory saved by sharing` to the report."""
    with (
        running_system(config) as system,
        open_bulk(system.address, config.max_num_waiting) as bulk,
        Client(system.address) as client,
    ):
        meter = _Meter(system, bulk, client, config.block_size, settings)
        for mix in (SHAREGPT, ALPACA):
            report.add("Waste in partial blocks", _waste_row(mix, config.block_size, meter))
        for case in sharing_cases(settings.widths):
            report.add("Memory saved by sharing", _sharing_row(case, meter.run(case)))


def _waste_row(mix: LengthMix, block_size: int, meter: "_Meter") -> Row:
    means = meter.run(MemoryCase(mix, SAMPLING, 1))
    lengths = meter.lengths(mix)
    return {
        "lengths_as": mix.name,
        "requests": len(lengths),
        "mean_input": float(np.mean([length for length, _ in lengths])),
        "mean_output": float(np.mean([output for _, output in lengths])),
        "block_size": block_size,
        "waste_percent": 100 * means.waste,
        "goal_percent": WASTE_GOAL_PERCENT if mix is SHAREGPT else None,
        "steps": means.num_steps,
    }


def _sharing_row(case: MemoryCase, means: BlockMeans) -> Row:
    return {
        "way": case.way,
        "lengths_as": case.mix.name,
        "sequences": case.width,
        "saved_percent": 100 * means.saved,
        "paper_percent": _PAPER_PERCENT[case.mix.name, case.way],
        "waste_percent": 100 * means.waste,
        "copied_blocks": means.num_copied,
        "steps": means.num_steps,
    }


class _Meter:
    """Runs cases on one system."""

    def __init__(
        self, system: System, bulk: BulkClient, client: Client, block_size: int, settings: MemorySettings
    ) -> None:
        self._vocab_size = system.model.config.vocab_size
        self._max_model_len = system.model.max_model_len
        self._bulk, self._client, self._block_size, self._settings = bulk, client, block_size, settings

    def lengths(self, mix: LengthMix) -> list[tuple[int, int]]:
        return mix.sample(self._settings.num_prompts[mix.name], self._max_model_len, self._settings.seed)

    def run(self, case: MemoryCase) -> BlockMeans:
        """All requests at once. Raises InternalError if a sequence is not as long as it was to be."""
        lengths = self.lengths(case.mix)
        rng = np.random.default_rng(self._settings.seed)
        requests = []
        for input_len, output_len in lengths:
            prompt: list[int] = rng.integers(0, self._vocab_size, input_len).tolist()
            requests.append(BulkRequest(build_request(prompt, case.params(output_len), _OUTPUTS), None))
        before = total_blocks(self._client.status())
        outputs = self._bulk.run(requests, lambda output: None)
        after = total_blocks(self._client.status())
        counts = [[len(sample.token_ids) for sample in output.outputs] for output in outputs]
        if counts != [[output_len] * case.width for _, output_len in lengths]:
            raise InternalError(f"{case.way} on {case.mix.name} lengths generated other lengths than were asked")
        return BlockMeans.between(before, after, self._block_size)
