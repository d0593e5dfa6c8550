"""Options of the gRPC channels between Octavo's own processes, the same at both ends."""

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
