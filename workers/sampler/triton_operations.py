"""The sampler's operations on a GPU: Triton kernels over all rows at once."""

import torch

from ...kernels.penalties import penalise
from ...kernels.sampling import candidate_keys, take_tokens
from ...kernels.truncation import Cuts, find_kept
from .batch import SamplingBatch
from .operations import SamplerOperations
from .penalties import Penalties
from .vocab import VocabSlice


class TritonSamplerOperations(SamplerOperations):
    """Nothing of the vocabulary's size is written but the penalties' counts; logits of half precision stay so."""

    def penalise(
        self,
        logits: torch.Tensor,
        penalties: Penalties,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        vocab: VocabSlice,
    ) -> None:
        penalise(
            logits,
            penalties.rows,
            tokens,
            positions,
            penalties.num_prompt,
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
            vocab.start,
        )

    def draw(
        self, logits: torch.Tensor, batch: SamplingBatch, positions: torch.Tensor, vocab: VocabSlice
    ) -> torch.Tensor:
        columns, tp = batch.columns, vocab.tp
        kept = None
        if batch.is_cut:
            cuts = Cuts(columns.log_min_p, columns.top_k, columns.top_p)
            kept = find_kept(logits, columns.temperature, cuts, tp.all_reduce, tp.all_reduce_max)
        keys = candidate_keys(logits, columns.temperature, columns.seeds, positions, vocab.start, kept)
        token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        take_merged_tokens(keys, vocab, token_ids)
        return token_ids


def take_merged_tokens(
    keys: torch.Tensor,
    vocab: VocabSlice,
    out: torch.Tensor,
    token_table: torch.Tensor | None = None,
    cells: torch.Tensor | None = None,
) -> None:
    """As kernels.sampling.take_tokens, of the keys of all ranks: the same tokens on each."""
    memory = vocab.tp.symmetric_memory
    if memory is not None and memory.takes_keys(keys):
        memory.take_tokens(keys, vocab.vocab_size, out, token_table, cells)
    else:
        take_tokens(vocab.merge(keys), vocab.vocab_size, out, token_table, cells)
