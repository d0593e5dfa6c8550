"""Where the tokens of one step belong: what every attention kernel takes beside its tensors."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The first tokens of several decodes, which lie in the same blocks."""

    rows: tuple[int, ...]  # of the step; two or more
    slot: int  # of one of them: its row of the block tables has the prefix's blocks
    num_keys: int

    @property
    def num_saved_keys(self) -> int:
        """Reads of a key that others make needless."""
        return (len(self.rows) - 1) * self.num_keys


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's tokens, row by row. A row is a sequence; rows with one query token (decodes) come first.

    Tensors live on the model's device; the rest is known to the host, so that no kernel has to ask the device.
    """

    num_decode_rows: int  # rows [0, num_decode_rows) have exactly one query token each
    positions: torch.Tensor  # [num_tokens] int64: position of each token in its sequence
    kv_indices: torch.Tensor  # [num_tokens] int64: block_id * block_size + offset, where the token's KV is written
    block_tables: (
        torch.Tensor
    )  # [num_slots, max_blocks] int32: block ids of each slot; what lies behind them may be any
    slots: torch.Tensor  # [num_rows] int64: each row's row of block_tables
    seq_lens: torch.Tensor  # [num_rows] int32: tokens of each row, those of this step included
    query_starts: torch.Tensor  # [num_rows + 1] int32: each row's first token, and behind the last one its tokens' end
    host_seq_lens: tuple[int, ...]  # seq_lens and query_starts, known to the host
    host_query_starts: tuple[int, ...]
    # Those that are worth being read once for all of their rows; operations may do without.
    prefixes: tuple[SharedPrefix, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.host_seq_lens)
