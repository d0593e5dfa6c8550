"""Runs the steps of one rank: plan in, tokens out, with the sampled tokens kept on the device for the next step."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import FailedPreconditionError
from .block_rows import BlockRows
from .host_tier import HostTier
from .kv_cache import KVCache
from .models.registry import Model
from .parallel import TensorParallel
from .plan import Ints, Plan
from .prefix_groups import PrefixGroups
from .sampler.batch import SamplingBatch, build_batch
from .sampler.logprobs import Logprobs, logprobs_of, measure
from .sampler.operations import sampler_operations_for
from .sampler.sampler import Context, Sampled, sample
from .sampler.vocab import VocabSlice
from .segments import run_now
from .slot_table import SlotTable, SlotTableShape
from .step_batch import ChunkRow, SampleRows, StepRows, send_step, take_step
from .step_clock import StepClock
from .step_result import ChunkLogprobs, PendingResult, RowLogprobs

if TYPE_CHECKING:
    from .decode_graphs import DecodeGraphs
    from .segment_graphs import SegmentGraphs

# Logits of a prompt's tokens are made this many rows at a time: 128 rows of 128k float32 are 64 MiB.
_PROMPT_LOGPROB_ROWS = 128


class ModelRunner:
    """Owner of a rank's slot table. Steps are queued on the device in the order of the calls; nothing waits for it."""

    def __init__(
        self,
        model: Model,
        kv_cache: KVCache,
        shape: SlotTableShape,
        tp: TensorParallel,
        host_tier: HostTier | None = None,
    ) -> None:
        self.shape = shape
        self._model, self._kv_cache, self._tp = model, kv_cache, tp
        self._host_tier = host_tier
        self._slots = SlotTable(shape, tp.device)
        self._sampler_ops = sampler_operations_for(tp.device)
        self._vocab = VocabSlice(tp, model.vocab_start, model.local_vocab_size, shape.vocab_size)
        # None where attention would read shared prefixes for each sequence anyway.
        self.prefix_groups: PrefixGroups | None = None
        if model.ops.reads_prefixes_once(model.config.num_heads // tp.size, model.num_kv_heads):
            self.prefix_groups = PrefixGroups(self._slots, kv_cache.bytes_per_key)
        # None on a CPU, and before they are captured.
        self._decode_graphs: DecodeGraphs | None = None
        self._segment_graphs: SegmentGraphs | None = None
        self._sampling: SamplingBatch | None = None
        self._last_step = 0  # that was queued
        self._clock: StepClock | None = None  # its own
        self._sampling_key: tuple[int, bytes] | None = None  # what _sampling was built for

    @property
    def least_num_tokens_in_halves(self) -> int | None:
        """Of the smallest step whose sums over ranks are those of halves; None if there is none."""
        return self._tp.least_num_rows_in_halves(self._model.config.hidden_size * self._model.dtype.itemsize)

    @property
    def block_rows(self) -> BlockRows:
        """Of the KV cache."""
        return self._kv_cache.rows

    def has_queued(self, step_id: int) -> bool:
        """As BlockHolder; for any thread."""
        return self._last_step >= step_id

    def wait_for_transfers(self) -> None:
        """As BlockHolder; for any thread."""
        if self._host_tier is not None:
            self._host_tier.wait()

    @torch.inference_mode()
    def capture_graphs(
        self, segment_graphs: "SegmentGraphs", decode_sizes: Sequence[int] | None = None
    ) -> Sequence[int]:
        """Has steps run as CUDA graphs from now on: those of decodes alone as a whole, others but for their attention.

        The slot table must be empty. `segment_graphs` are captured already, and may serve several runners.
        `decode_sizes` and what is returned: as DecodeGraphs.capture.
        """
        from .decode_graphs import DecodeGraphs  # Triton is there only beside a CUDA build of torch

        graphs = DecodeGraphs(self._model, self._kv_cache, self._slots, self._vocab, segment_graphs.recorder)
        sizes = graphs.capture(decode_sizes)
        self._decode_graphs, self._segment_graphs = graphs, segment_graphs
        return sizes

    @torch.inference_mode()
    def execute(self, plan: Plan) -> PendingResult:
        """Applies the plan and queues its step.

        Raises FailedPreconditionError or InvalidArgumentError for a plan that does not fit the slot table; the runner
        is then not to be used on.
        """
        self._transfer(plan)  # which is none of the step's time, where the host does it
        clock = self._clock = StepClock(self._tp.device, self._clock)
        self._slots.apply(plan)
        if len(plan.copies):
            self._kv_cache.copy(plan.copies)
        rows = take_step(self._slots, plan)
        result = self._compute(clock, rows) if rows else PendingResult(self._tp, clock, None, None, [])
        if self._host_tier is not None:
            result.report_transfers(partial(self._host_tier.finished, 0 if rows else plan.step_id))
        self._last_step = plan.step_id
        return result

    def _transfer(self, plan: Plan) -> None:
        if self._host_tier is not None:
            self._host_tier.apply(plan)
        elif len(plan.saves) or len(plan.loads):
            raise FailedPreconditionError("a plan moves blocks to or from the host, where this rank has none")

    def _compute(self, clock: StepClock, rows: StepRows) -> PendingResult:
        prefixes = self.prefix_groups.of(rows) if self.prefix_groups is not None else ()
        # How prefixes are read hangs on who shares them, so no graph can have that in it.
        if self._decode_graphs is not None and not rows.chunks and not prefixes:
            return self._replay(clock, rows, self._decode_graphs)
        batch = send_step(rows, self._slots, prefixes)
        run = run_now if self._segment_graphs is None else self._segment_graphs.runner(len(rows.positions))
        token_ids = self._slots.tokens_at(batch.token_cells, run.token_ids)
        clock.ready()
        hidden = self._model.forward(token_ids, batch.attention, self._kv_cache, run)
        chunks = self._prompt_logprobs(hidden, rows)
        if not len(rows.sampling):
            return PendingResult(self._tp, clock, None, None, chunks)
        indices = batch.samples.token_indices
        logits = self._model.logits(hidden if indices is None else hidden.index_select(0, indices))
        sampled, wanted = self._sample(logits, rows, batch.samples)
        return PendingResult(self._tp, clock, sampled.token_ids, wanted, chunks)

    def _replay(self, clock: StepClock, rows: StepRows, graphs: "DecodeGraphs") -> PendingResult:
        """A step of decodes alone, by CUDA graphs; what sampling needs beyond a temperature runs without one."""
        output = graphs.forward(rows, clock.ready)
        if self._slots.sampling.is_plain[rows.slots].all():
            return PendingResult(self._tp, clock, graphs.sample(len(rows.slots)), None, [])
        sampled, wanted = self._sample(output.logits, rows, output.samples)
        return PendingResult(self._tp, clock, sampled.token_ids, wanted, [])

    def _sample(self, logits: torch.Tensor, rows: StepRows, samples: SampleRows) -> tuple[Sampled, RowLogprobs | None]:
        sampling = self._sampling_batch(rows.sample_slots)
        context = Context(self._slots.token_ids, samples.positions, int(rows.sample_positions.max()))
        sampled = sample(logits, sampling, context, self._vocab, self._sampler_ops)
        # Steps are sent ahead, so a row that failed goes on for a while: with a token that exists.
        self._slots.token_ids.view(-1).index_copy_(0, samples.cells, sampled.token_ids.int().clamp_(min=0))
        if sampling.logprobs is None or sampled.logprobs is None:
            return sampled, None
        return sampled, RowLogprobs(sampling.logprobs.host_rows, sampling.logprobs.counts, sampled.logprobs)

    def _sampling_batch(self, slots: Ints) -> SamplingBatch:
        """The sampling parameters of `slots`, kept while neither they nor their sequences change."""
        key = (self._slots.version, slots.tobytes())
        if self._sampling is None or key != self._sampling_key:
            num_prompt = self._slots.num_prompt[slots]
            self._sampling = build_batch(self._slots.sampling, slots, num_prompt, self._vocab)
            self._sampling_key = key
        return self._sampling

    def _prompt_logprobs(self, hidden: torch.Tensor, rows: StepRows) -> list[ChunkLogprobs]:
        found = []
        for index, chunk in enumerate(rows.chunks):
            num_top = int(self._slots.sampling.num_prompt_logprobs[chunk.slot])
            # The last prompt token predicts the first sample, which is not part of the prompt.
            num_rows = min(chunk.num_tokens, int(self._slots.num_prompt[chunk.slot]) - 1 - chunk.num_computed)
            if num_top >= 0 and num_rows > 0:
                logprobs = self._chunk_logprobs(hidden, chunk, num_rows, num_top)
                found.append(ChunkLogprobs(index, chunk.num_computed + 1, logprobs))
        return found

    def _chunk_logprobs(self, hidden: torch.Tensor, chunk: ChunkRow, num_rows: int, num_top: int) -> Logprobs:
        first = chunk.num_computed + 1
        targets = self._slots.token_ids[chunk.slot, first : first + num_rows].long()
        rows = hidden[chunk.start : chunk.start + num_rows]
        parts = []
        for start in range(0, num_rows, _PROMPT_LOGPROB_ROWS):
            part = slice(start, start + _PROMPT_LOGPROB_ROWS)
            distribution = measure(self._model.logits(rows[part]), num_top, self._vocab)
            parts.append(logprobs_of(distribution, targets[part], self._vocab))
        return Logprobs(
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.ranks for part in parts]),
        )
