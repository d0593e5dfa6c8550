"""CUDA graphs of a step's segments, for steps with prompt chunks: attention runs between them, without a graph.

Such steps are bound by launches otherwise: a layer of a few hundred tokens takes the GPU less time than the host. A
graph serves a bucket of token counts. Rows behind the step's tokens are padding: tokens of earlier steps, or token 0.
Segments work row by row, and so do sums over ranks, so what becomes of padding reaches no real row.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ..kernels.batch import AttentionBatch
from .bucket_choice import sizes_worth_having
from .graph_recorder import Recorder, Recording, Tensors
from .kv_cache import KVCache
from .models.registry import Model
from .parallel import TensorParallel
from .segments import Segment, SegmentRunner, run_now

# Above, a step's launches hide behind the GPU's own time: 8B takes one H200 47 ms for 2,048 tokens, and four of them 34
# for 4,096, which their hosts launch in about 22.
_MAX_NUM_TOKENS = 2048
_NUM_SAMPLES = 3  # segments of a bucket that are timed


def bucket_sizes(max_num_tokens: int) -> list[int]:
    """Token counts that have graphs, ascending, for steps of up to `max_num_tokens`."""
    largest = min(max_num_tokens, _MAX_NUM_TOKENS)
    sizes = {16, 32, *range(64, 1024, 64), *range(1024, _MAX_NUM_TOKENS, 128)}
    return sorted({size for size in sizes if size < largest} | {largest})


@dataclass(frozen=True, slots=True)
class _Replayable:
    """One segment at one size."""

    inputs: Tensors  # where it reads its arguments, [size, ...] each
    recording: Recording


@dataclass(frozen=True, slots=True)
class _Bucket:
    """All segments at one size."""

    size: int
    segments: dict[Segment, _Replayable] = field(default_factory=dict)

    def samples(self) -> list[Recording]:
        """What stands for all segments where they are timed: some of the middle, which are alike."""
        recordings = [replayable.recording for replayable in self.segments.values()]
        return recordings[1 : 1 + _NUM_SAMPLES] or recordings


@dataclass(frozen=True, slots=True)
class _Replay:
    """The runner of one step of `num_tokens` rows, at most the bucket's size."""

    bucket: _Bucket
    token_ids: torch.Tensor  # [num_tokens] int32
    num_tokens: int

    def __call__(self, segment: Segment, *inputs: torch.Tensor) -> Tensors:
        replayable = self.bucket.segments[segment]
        for place, given in zip(replayable.inputs, inputs, strict=True):
            # What another segment made is where this one reads it already, and so is what was written to `input_of`.
            if place.data_ptr() != given.data_ptr():
                place[: self.num_tokens].copy_(given)
        replayable.recording.replay()
        return tuple(output[: self.num_tokens] for output in replayable.recording.outputs)

    def input_of(self, segment: Segment) -> torch.Tensor:
        return self.bucket.segments[segment].inputs[0][: self.num_tokens]


class _Places:
    """Owner of the tensors that segments read what was made outside of graphs from, but for tokens: attention's output.

    All segments and sizes share them. Allocated for the first one, which is to be of the largest size.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, torch.Size, torch.dtype], torch.Tensor] = {}

    def take(self, argument: int, like: torch.Tensor) -> torch.Tensor:
        """The place of a segment's argument, by its index."""
        key = argument, like.shape[1:], like.dtype
        if key not in self._places:
            self._places[key] = torch.zeros_like(like)
        return self._places[key][: len(like)]


class SegmentGraphs:
    """Owner of the graphs and their inputs. Belongs to the device thread, and to one stream. Knows no KV cache.

    What a segment returns is overwritten by the next step's: all that reads it is queued before.
    """

    def __init__(
        self,
        model: Model,
        max_num_tokens: int,
        recorder: Recorder,
        tp: TensorParallel,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Records nothing yet: see `capture`. `sizes`, ascending: those that were found to be worth having before."""
        self._model, self.recorder, self._tp = model, recorder, tp
        self._is_to_choose = sizes is None
        self._buckets = [_Bucket(size) for size in (bucket_sizes(max_num_tokens) if sizes is None else sizes)]
        self._places = _Places()
        # Its first tokens are those of a step, where the first segment of each bucket reads them.
        self._token_ids = torch.zeros(self._buckets[-1].size, dtype=torch.int32, device=tp.device)

    @property
    def sizes(self) -> Sequence[int]:
        """Of the buckets, ascending."""
        return [bucket.size for bucket in self._buckets]

    @torch.inference_mode()
    def capture(self, kv_cache: KVCache) -> None:
        """Records every bucket, the largest first: the others then share its memory. On all ranks at once. Those that a
        larger one outruns are dropped, unless that was found before.

        Leaves a meaningless key and value in the first cell of `kv_cache`, which the graphs do not keep.
        """
        with self.recorder.session():
            for bucket in reversed(self._buckets):
                batch = _one_chunk(bucket.size, kv_cache)
                token_ids = self._token_ids[: bucket.size]
                # Kernels compile, and libraries make their workspaces, before the recording.
                self._model.forward(token_ids, batch, kv_cache)
                recorder = _BucketRecorder(self.recorder, self._places, bucket, token_ids)
                self._model.forward(token_ids, batch, kv_cache, recorder)
            if self._is_to_choose:
                self._drop_outrun()

    def _drop_outrun(self) -> None:
        samples = {bucket.size: bucket.samples() for bucket in self._buckets}
        worth_having = sizes_worth_having(
            list(samples), lambda size, num_times: self.recorder.time_ms(samples[size], num_times), self._tp
        )
        self._buckets = [bucket for bucket in self._buckets if bucket.size in worth_having]

    def runner(self, num_tokens: int) -> SegmentRunner:
        """Runs the segments of one step of `num_tokens`: from graphs, or as they are called if none is large enough."""
        index = bisect_left(self._buckets, num_tokens, key=lambda bucket: bucket.size)
        if index == len(self._buckets):
            return run_now
        return _Replay(self._buckets[index], self._token_ids[:num_tokens], num_tokens)


class _BucketRecorder:
    """The runner that records one bucket."""

    def __init__(self, recorder: Recorder, places: _Places, bucket: _Bucket, token_ids: torch.Tensor) -> None:
        self._recorder, self._places, self._bucket = recorder, places, bucket
        self.token_ids = token_ids
        # Where inputs lie already when a segment is replayed, by address: the tokens, and results.
        self._made = {token_ids.data_ptr(): token_ids}

    def __call__(self, segment: Segment, *inputs: torch.Tensor) -> Tensors:
        places = tuple(self._place(*argument) for argument in enumerate(inputs))
        recording, outputs = self._recorder.record(partial(segment, *places))
        self._bucket.segments[segment] = _Replayable(places, recording)
        self._made |= {output.data_ptr(): output for output in recording.outputs}
        return outputs

    def input_of(self, segment: Segment) -> None:
        """Any place will do: replays read from one of ours."""
        del segment

    def _place(self, argument: int, given: torch.Tensor) -> torch.Tensor:
        made = self._made.get(given.data_ptr())
        if made is None:
            return self._places.take(argument, given)
        assert made.shape == given.shape, "segments take each other's results whole"
        return made


def _one_chunk(size: int, kv_cache: KVCache) -> AttentionBatch:
    """A prompt of `size` tokens whose keys and values all go to one cell, for attention that nobody reads."""
    device, num_blocks = kv_cache.device, -(-size // kv_cache.block_size)
    zeros = torch.zeros(size, dtype=torch.int64, device=device)
    return AttentionBatch(
        num_decode_rows=0,
        positions=zeros,
        kv_indices=zeros,
        block_tables=torch.zeros((1, num_blocks), dtype=torch.int32, device=device),
        slots=zeros[:1],
        seq_lens=torch.tensor([size], dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, size], dtype=torch.int32, device=device),
        host_seq_lens=(size,),
        host_query_starts=(0, size),
    )
