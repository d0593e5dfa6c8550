"""Names of blocks: equal where all tokens up to the block's last are, and the salt; else not."""

from array import array

import pytest
from octavo.coordinator.core.block_hashes import BlockHashes


def names(tokens, block_size=4, salt=b"") -> list[bytes]:
    return BlockHashes(salt, block_size).first(len(tokens) // block_size, array("i", tokens))


def test_a_name_stands_for_all_tokens_so_far():
    first = names(range(12))
    assert len(set(first)) == 3
    assert names(range(16))[:3] == first
    assert names([*range(11), 99])[:2] == first[:2]
    changed = names([99, *range(1, 12)])
    assert not set(changed) & set(first)


@pytest.mark.parametrize("salt", [b"a", b"\0", b"\0" * 16])
def test_other_salts_and_block_sizes_share_no_name(salt):
    assert not set(names(range(16), salt=salt)) & set(names(range(16)))
    assert names(range(16), salt=salt) == names(range(16), salt=salt)
    # Half the blocks end at the same tokens; a group has one block size.
    assert names(range(16), block_size=8) == names(range(16))[1::2]


def test_a_salt_is_no_prompt():
    tokens = array("i", range(4))
    assert names(range(4, 8), salt=tokens.tobytes()) != names(range(8))[1:]


def test_names_are_the_same_whenever_they_are_asked_for():
    tokens = array("i", range(9))
    hashes = BlockHashes(b"s", 4)
    first = list(hashes.first(1, tokens))
    tokens.extend(range(9, 16))
    assert hashes.first(4, tokens) == names(range(16), salt=b"s")
    assert hashes.first(1, tokens) == first


def test_forks_go_ways_of_their_own():
    shared = array("i", range(6))
    hashes = BlockHashes(b"", 4)
    hashes.first(1, shared)
    forked = hashes.fork()
    one, other = shared + array("i", [1, 1]), shared + array("i", [2, 2])
    assert hashes.first(2, one) == names(one)
    assert forked.first(2, other) == names(other)
