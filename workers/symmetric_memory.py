"""Sums over the ranks of a host through memory that its GPUs share over NVLink. No multicast is used.

Sums on the way to a norm are fused with it: small ones by kernels/ll_all_reduce.py, larger ones by kernels/two_shot.py.
The former sums a few rows without a norm too. Of two ranks, sums larger still are exchanges (share_exchange.py).
Sampled candidates meet here as well, in kernels/ll_take_tokens.py. No kernel of torch's is used: those wait for a peer
that is gone without end, and nothing would free the GPU of them.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch._C import _distributed_c10d as c10d

from ..kernels.ll_all_reduce import MAX_SPLITS, LLInbox, ll_add_rms_norm, ll_sum
from ..kernels.ll_take_tokens import KeyInbox, ll_take_tokens
from ..kernels.peer_flags import PeerFlag
from ..kernels.peer_wait import PeerWait
from ..kernels.two_shot import TwoShotBuffers, two_shot_add_rms_norm
from .meeting import ExchangeStore, Meeting
from .share_exchange import NUM_PLACES, Place, ShareExchange

_log = logging.getLogger(__name__)

Tensor = torch.Tensor

# Up to here (what all ranks sum, taken together) every rank sends all of its part to every other.
_MAX_LL_BYTES = 1024 * 1024
_MAX_LL_ROWS = 64
_MAX_LL_WORDS = 4096  # of a row, 4 bytes each
_MAX_FUSED_BYTES = 32 * 1024 * 1024  # above, sums beside other work are faster
_MAX_EXCHANGED_BYTES = 64 * 1024 * 1024  # half of 8,192 rows of a 70B model
_MAX_ROWS_OF_A_RANK = 2048
_MAX_KEY_ROWS = 2048  # above, NCCL merges candidates


class SymmetricMemory:
    """Buffers that all ranks of a group have, and reach on each other's GPUs. Used by one stream."""

    def __init__(self, meeting: Meeting, device: torch.device) -> None:
        """All ranks at once. Raises RuntimeError where GPUs cannot reach each other's memory, and UnavailableError if
        the epoch ends meanwhile."""
        self._device, self._rank, self._size = device, meeting.rank, meeting.size
        self._exchange = _Exchange(meeting)
        self._wait = PeerWait.on(device)
        self._ll_inbox = self._make_ll_inbox()
        self._two_shot = self._make_two_shot_buffers()
        self._key_inbox = self._make_key_inbox()
        self._share_exchange = self._make_share_exchange() if self._size == 2 else None

    def has_failed(self) -> bool:
        """Whether a rank has waited for another beyond reason. Sums are worthless from then on."""
        return self._wait.has_failed()

    def abandon(self) -> None:
        """The epoch is over: no kernel waits for another rank any more. For any thread."""
        self._wait.abandon()

    def takes(self, tensor: Tensor) -> bool:
        """Whether `all_reduce` can sum it, and faster than NCCL."""
        return 0 < tensor.dim() <= 2 and self._is_small(_rows(tensor))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks: a new tensor."""
        return ll_sum(_rows(tensor), self._ll_inbox).view(tensor.shape)

    def takes_norm(self, partial: Tensor) -> bool:
        """Whether `all_reduce_add_rms_norm` can sum it, and faster than NCCL."""
        return self._is_small(partial) or self._two_shot.takes(partial)

    def all_reduce_add_rms_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The norm of the ranks' `partial` and `residual` added up: the same bits on every rank. And that sum, for the
        next call with as many rows to take as its residual: a rank may have only those rows that it will read.

        partial, residual: [num_rows, width], None for a residual of zeros; weight: [width]. The next call may overwrite
        the norm.
        """
        if self._is_small(partial):
            return ll_add_rms_norm(partial, residual, weight, eps, self._ll_inbox)
        return two_shot_add_rms_norm(partial, residual, weight, eps, self._two_shot)

    def input_buffer(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Where to write a `partial` of this shape so that it need not be copied; None where it never is.

        Its own until the next all_reduce_add_rms_norm has summed it.
        """
        like = torch.empty(num_rows, width, dtype=dtype, device="meta")
        if self._is_small(like) or not self._two_shot.takes(like):
            return None
        return self._two_shot.input_like(like)

    def exchanges(self, share: Tensor) -> bool:
        """Whether `start_exchange` can take it."""
        return self._share_exchange is not None and self._share_exchange.takes(share)

    def start_exchange(self, share: Tensor, only_compiles: bool) -> Callable[[], tuple[Tensor, ...]]:
        """Has the ranks' shares come together beside what is queued next; what is returned gives them all."""
        assert self._share_exchange is not None
        exchange = self._share_exchange
        return exchange.compile_for(share) if only_compiles else exchange.start(share)

    def takes_keys(self, keys: Tensor) -> bool:
        """Whether `take_tokens` can merge them."""
        return self._key_inbox.takes(keys)

    def take_tokens(
        self, keys: Tensor, vocab_size: int, out: Tensor, token_table: Tensor | None = None, cells: Tensor | None = None
    ) -> None:
        """As kernels.sampling.take_tokens, of the keys of all ranks."""
        ll_take_tokens(keys, vocab_size, self._key_inbox, out, token_table, cells)

    def _is_small(self, partial: Tensor) -> bool:
        return partial.nbytes * self._size <= _MAX_LL_BYTES and self._ll_inbox.takes(partial)

    def _make_ll_inbox(self) -> LLInbox:
        _, words = self._allocate((2, _MAX_LL_ROWS, self._size, _MAX_LL_WORDS), torch.int64)
        cells = torch.zeros(2, _MAX_LL_ROWS, MAX_SPLITS, dtype=torch.int64, device=self._device)
        return LLInbox(self._rank, words, num_calls=cells[0], squares=cells[1], wait=self._wait)

    def _make_key_inbox(self) -> KeyInbox:
        _, words = self._allocate(KeyInbox.words_shape(_MAX_KEY_ROWS, self._size), torch.int64)
        num_calls = torch.zeros(_MAX_KEY_ROWS, dtype=torch.int64, device=self._device)
        return KeyInbox(self._rank, words, num_calls, self._wait)

    def _make_two_shot_buffers(self) -> TwoShotBuffers:
        inputs, normed = (self._allocate((_MAX_FUSED_BYTES,), torch.uint8)[1] for _ in range(2))
        flags, all_flags = self._allocate((_MAX_ROWS_OF_A_RANK, 2, self._size), torch.int32)
        addresses = torch.tensor([peer.data_ptr() for peer in all_flags], device=self._device)
        num_calls = torch.zeros(_MAX_ROWS_OF_A_RANK, dtype=torch.int32, device=self._device)
        return TwoShotBuffers(self._rank, inputs, normed, flags, addresses, num_calls, self._wait)

    def _make_share_exchange(self) -> ShareExchange:
        mine, all_places = self._allocate((NUM_PLACES, _MAX_EXCHANGED_BYTES), torch.uint8)
        flags, all_flags = self._allocate((NUM_PLACES, 1), torch.int32)
        peer = 1 - self._rank
        addresses = torch.tensor([[flag.data_ptr()] for flag in all_flags[peer]], device=self._device)
        raised, awaited = torch.zeros(2, NUM_PLACES, 1, dtype=torch.int32, device=self._device)
        places = (
            Place(mine[i], all_places[peer][i], PeerFlag(flags[i], addresses[i], raised[i], awaited[i], self._wait))
            for i in range(NUM_PLACES)
        )
        return ShareExchange(tuple(places), self._device)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Zeros: this rank's, and those of all ranks in their order."""
        mine = symm_mem.empty(shape, dtype=dtype, device=self._device).zero_()
        # Ranks meet in the rendezvous, and write to each other's memory only behind it.
        torch.cuda.synchronize(self._device)
        handle = self._exchange.rendezvous(mine)
        # A view of one's own memory is no second owner, so `mine` stands for it.
        peers = (mine if rank == self._rank else handle.get_buffer(rank, shape, dtype) for rank in range(self._size))
        return mine, tuple(peers)


def _rows(tensor: Tensor) -> Tensor:
    """A number for each row makes a column."""
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


class _Exchange:
    """How ranks tell each other where their memory is: a process group without collectives, over a store of its own.

    Not the group that sums: its store has keys that a rank which was started anew does not share with the others.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._name = f"symmetric memory of epoch {meeting.epoch}"
        self._store = ExchangeStore(meeting)  # held: torch keeps only the part of it that is C++
        self._rank, self._size = meeting.rank, meeting.size
        self._group = dist.ProcessGroup(self._store, meeting.rank, meeting.size)  # held: the registry does not
        register: Any = c10d._register_process_group  # some releases have a type for such names
        register(self._name, self._group)

    def rendezvous(self, mine: Tensor) -> Any:  # noqa: ANN401 (a handle of torch's)
        try:
            return c10d._SymmetricMemory.rendezvous(mine, self._name)
        except RuntimeError as error:
            if "no group info" not in str(error):
                raise
        # Torch releases that do not look groups up by their names.
        c10d._SymmetricMemory.set_group_info(self._name, self._rank, self._size, self._store)
        return c10d._SymmetricMemory.rendezvous(mine, self._name)


def open_symmetric_memory(meeting: Meeting, device: torch.device) -> SymmetricMemory | None:
    """None, said once in the log, where the GPUs cannot reach each other's memory: NCCL then sums everything."""
    try:
        return SymmetricMemory(meeting, device)
    except RuntimeError as error:
        _log.warning("no memory is shared between the GPUs, so NCCL sums everything: %s", str(error).splitlines()[0])
        return None
