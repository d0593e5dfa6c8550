"""Large sums over two ranks: each sends the other its share, and what reads the sum adds the two.

A GPU's copy engines send, beside the products of other tokens, and take no multiprocessor from them; NCCL's kernels do.
What is sent is no more than in an all-reduce of two: half of the sum there and half of it back is as much as a share.
For more ranks it would be more.

**When a place may be written again.** Shares are of two halves in turn (`LlamaForCausalLM._in_halves`), and places are
four, taken strictly in turn: a layer's shares are four too, so one that is replayed from a graph keeps its places. A
share of one half is made of what the last sum of that half gave, for which the peer's share had to be here, and the
peer sent that behind the sum before it. So when a rank sends to a place, the peer has read what was sent to it four
shares ago.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..kernels.peer_flags import PeerFlag

Tensor = torch.Tensor

NUM_PLACES = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where a share lies when it was sent: this rank's, which the peer writes, and the peer's."""

    mine: Tensor  # [max_bytes] uint8
    peer: Tensor
    is_there: PeerFlag


class ShareExchange:
    """One of two ranks' side. Both start the same exchanges in the same order. Used by one stream."""

    def __init__(self, places: tuple[Place, ...], device: torch.device) -> None:
        assert len(places) == NUM_PLACES
        self._places, self._next = places, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def takes(self, share: Tensor) -> bool:
        """Whether it fits into a place."""
        return share.is_contiguous() and 0 < share.nbytes <= len(self._places[0].mine)

    def start(self, share: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Sends `share` beside what is queued next. What is returned gives this rank's share and the peer's to what is
        queued after it is called, until the place is used again."""
        place = self._places[self._next]
        self._next = (self._next + 1) % NUM_PLACES
        sent = None
        with self._beside() as stream:
            _view(place.peer, share).copy_(share, non_blocking=True)
            place.is_there.raise_for_peer()
            if stream is not None:
                sent = stream.record_event()

        def finish() -> tuple[Tensor, ...]:
            if sent is not None:
                torch.cuda.current_stream().wait_event(sent)  # the share's memory may be taken from here on
            place.is_there.hold_until_raised()
            return share, _view(place.mine, share)

        return finish

    def compile_for(self, share: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """As `start`, for launches that only compile: nothing is sent."""
        place = self._places[0]
        place.is_there.raise_for_peer()
        place.is_there.hold_until_raised()
        return lambda: (share, _view(place.mine, share))

    @contextmanager
    def _beside(self) -> Iterator[torch.cuda.Stream | None]:
        """Has what is queued meanwhile run behind all that was queued, and beside what follows. On a CPU, at once."""
        if self._stream is None:
            yield None
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield self._stream


def _view(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)
