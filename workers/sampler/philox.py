"""Philox 4x32-10: a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

Torch has no unsigned 32-bit arithmetic, so each word is an int64 in [0, 2**32). Products wrap modulo 2**64, which
leaves the right bits: the low word is the product's low half, the high word its high half. Between rounds the words
that are not multiplied next keep what stands above their 32 bits, to save masking it.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four random words of each counter; every word is int64 in [0, 2**32), and shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_ROUNDS):
        if round_index:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) ^ c1 ^ k0) & _MASK, ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product1, product0
    return c0, c1 & _MASK, c2, c3 & _MASK
