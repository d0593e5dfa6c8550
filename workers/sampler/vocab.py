"""The slice of the vocabulary whose logits this rank holds, and how ranks agree on a maximum."""

from dataclasses import dataclass

import torch

from ..parallel import TensorParallel


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
        """[n, size] to [n] int64 token ids: each row's greatest score over all ranks, the lowest id among equals.

        Always a valid token id, also for rows of NaN or -inf. Ranks exchange one (score, id) pair a row.
        """
        best, columns = scores.max(dim=-1)
        return self.best(best, columns + self.start)

    def best(self, scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Each row's best score here [n] float32 and its token [n] int64 to the best over all ranks, [n] int64."""
        if self.tp.size == 1:
            return token_ids.clamp_(max=self.vocab_size - 1)
        # float64 holds a float32 score and a token id exactly, so one message carries both.
        pairs = torch.stack([scores.double(), token_ids.double()], dim=-1)
        gathered = self.tp.all_gather(pairs)  # [size, n, 2]
        winner = gathered[..., 0].argmax(dim=0, keepdim=True)
        return gathered[..., 1].gather(0, winner).squeeze(0).long().clamp_(max=self.vocab_size - 1)
