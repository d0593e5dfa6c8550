"""The slice of the vocabulary whose logits this rank holds, and how ranks agree on a maximum."""

from dataclasses import dataclass

import torch

from ..parallel import TensorParallel

_LOW_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class VocabSlice:
    """Columns [start, start + size) of the padded vocabulary; padding logits are -inf. Slices ascend with the rank."""

    tp: TensorParallel
    start: int
    size: int
    vocab_size: int  # without padding

    def local(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of int64 `token_ids`, and a mask of those that are here; others get an arbitrary valid column."""
        columns = token_ids - self.start
        return columns.clamp(0, self.size - 1), (columns >= 0) & (columns < self.size)

    def max(self, logits: torch.Tensor) -> torch.Tensor:
        """[n, size] to [n]: each row's greatest logit over all ranks."""
        return self.tp.all_reduce_max(logits.amax(dim=-1))

    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        """[n, size] float32 to [n] int64 token ids: each row's greatest score over all ranks, the lowest id of equals.

        Always a valid token id, also for rows of NaN or -inf.
        """
        return self.take_best(*scores.max(dim=-1))

    def take_best(self, best: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """As argmax, of each row's greatest score here, [n] float32, and its column, [n] int64."""
        token_ids = columns + self.start
        if self.tp.size > 1:
            token_ids = _token_ids(self.tp.all_reduce_max(_keys(best, token_ids)))
        return token_ids.clamp_(max=self.vocab_size - 1)

    def merge(self, keys: torch.Tensor) -> torch.Tensor:
        """Candidates of this rank, [n, m] int64 keys as kernels/sampling.py makes them, to those that may yet win.

        With one rank they are the same; of more, each row's greatest over all ranks, [n, 1].
        """
        return keys if self.tp.size == 1 else self.tp.all_reduce_max(keys.amax(dim=1, keepdim=True))


def _keys(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Scores [n] float32 and tokens [n] int64 as the keys of kernels/sampling.py, so that one message carries both."""
    bits = (scores + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LOW_BITS - token_ids)


def _token_ids(keys: torch.Tensor) -> torch.Tensor:
    return _LOW_BITS - (keys & _LOW_BITS)
