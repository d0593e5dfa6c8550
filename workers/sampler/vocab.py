"""The slice of the vocabulary whose logits this rank holds, and how ranks agree on a maximum."""

from dataclasses import dataclass

import torch

from ..parallel import TensorParallel

_LOW_BITS = 0xFFFFFFFF
_LARGEST = torch.finfo(torch.float32).max  # of a score; the draw takes infinity for this


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

        NaN counts as -inf. -1 where the greatest score is infinite: no token can be told from the others.
        """
        best, columns = scores.max(dim=-1)
        if best.isnan().any():  # which torch takes for the greatest
            best, columns = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).max(dim=-1)
        return self.take_best(best, columns)

    def take_best(self, best: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """As argmax, of each row's greatest score here, [n] float32 without NaN, and its column, [n] int64."""
        token_ids = columns + self.start
        if self.tp.size > 1:
            keys = self.tp.all_reduce_max(_keys(best, token_ids))
            best, token_ids = _scores(keys), _LOW_BITS - (keys & _LOW_BITS)
        return torch.where(best.abs() < _LARGEST, token_ids.clamp_(max=self.vocab_size - 1), -1)

    def merge(self, keys: torch.Tensor) -> torch.Tensor:
        """Candidates of this rank, [n, m] int64 keys as kernels/sampling.py makes them, to those that may yet win.

        With one rank they are the same; of more, each row's greatest over all ranks, [n, 1].
        """
        return keys if self.tp.size == 1 else self.tp.all_reduce_max(keys.amax(dim=1, keepdim=True))


def _keys(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Scores [n] float32 and tokens [n] int64 as the keys of kernels/sampling.py, so that one message carries both."""
    bits = (scores + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LOW_BITS - token_ids)


def _scores(keys: torch.Tensor) -> torch.Tensor:
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
