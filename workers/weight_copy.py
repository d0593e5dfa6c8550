"""A rank's weights from a rank that holds the same: tensor by tensor, as its checkpoint would have given them."""

import hashlib

import torch

from .model_config import ModelConfig
from .models.registry import Model
from .peer_group import PeerGroup, beside_steps


def layout_of(model: Model) -> bytes:
    """A hash over what `model` consists of: two with the same one can copy from each other."""
    shapes = [parameter.shape for parameter in model.parameters()]
    config: ModelConfig = model.config
    described = f"{config.architecture} {model.dtype} {shapes}"
    return hashlib.blake2b(described.encode(), digest_size=16).digest()


def send_weights(model: Model, group: PeerGroup, device: torch.device) -> None:
    """On the copy's thread, and on a stream of its own: steps go on. Raises UnavailableError."""
    with beside_steps(device):
        for parameter in model.parameters():
            group.send([parameter.dense()])


def receive_weights(model: Model, group: PeerGroup, device: torch.device) -> int:
    """Fills a model of the same layout; returns how many bytes came. Raises UnavailableError: it is then worthless."""
    num_bytes = 0

    def fill(tensor: torch.Tensor) -> None:
        nonlocal num_bytes
        group.receive([tensor])
        num_bytes += tensor.nbytes

    with beside_steps(device):
        for parameter in model.parameters():
            parameter.load(fill)
    return num_bytes
