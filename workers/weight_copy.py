"""A rank's weights from a rank that holds the same: tensor by tensor, as its checkpoint would have given them."""

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch

from .model_config import ModelConfig
from .models.registry import Model
from .peer_group import PeerGroup


def layout_of(model: Model) -> bytes:
    """A hash over what `model` consists of: two with the same one can copy from each other."""
    shapes = [parameter.shape for parameter in model.parameters()]
    config: ModelConfig = model.config
    described = f"{config.architecture} {model.dtype} {shapes}"
    return hashlib.blake2b(described.encode(), digest_size=16).digest()


def send_weights(model: Model, group: PeerGroup, device: torch.device) -> None:
    """On the copy's thread, and on a stream of its own: steps go on. Raises UnavailableError."""
    with _beside_steps(device):
        for parameter in model.parameters():
            group.send([parameter.dense()])


def receive_weights(model: Model, group: PeerGroup, device: torch.device) -> int:
    """Fills a model of the same layout; returns how many bytes came. Raises UnavailableError: it is then worthless."""
    num_bytes = 0

    def fill(tensor: torch.Tensor) -> None:
        nonlocal num_bytes
        group.receive([tensor])
        num_bytes += tensor.nbytes

    with _beside_steps(device):
        for parameter in model.parameters():
            parameter.load(fill)
    return num_bytes


def _beside_steps(device: torch.device) -> AbstractContextManager[object]:
    """A stream of its own, which begins behind what the device was given before. None on a CPU."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(stream)
