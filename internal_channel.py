"""How Octavo's own processes speak gRPC to each other: the options of both ends, who reads the sockets, and what
tells an error that was answered from a call that broke."""

import os

_WINDOW_BYTES = 4 * 1024 * 1024  # what a peer may send before it is read: joins of many prompts, a step's logprobs

CHANNEL_OPTIONS = [
    # A join carries a whole prompt, a result its logprobs.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Without probes, which answer every message with a ping to find a window that is known here. They cost a tenth of
    # a round trip.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    ("grpc.http2.max_frame_size", _WINDOW_BYTES),
]


# Behind each error that the coordinator itself answers with. A call that ends without it broke: the process has died,
# ends, or is not there yet.
ANSWERED = ("octavo-answered", "1")


def read_on_waiting_threads() -> None:
    """Has gRPC read sockets on the thread that waits for its events. To be called before the first channel or server.

    By default each read is made on another thread first, and handed over: a round trip of a stream takes 205 us so, and
    130 us without, at two thirds of the CPU time. What the user has set stays.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
