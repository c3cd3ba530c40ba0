import pytest

from hpcinfer.config import SamplingParams
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Sequence


def sequence(token_ids):
    return Sequence(0, Request(0, tuple(token_ids), SamplingParams()), 0)


def computed(blocks, token_ids):
    """A sequence whose tokens are all computed and offered for reuse."""
    seq = sequence(token_ids)
    blocks.grow(seq, len(seq.token_ids))
    seq.num_computed = len(seq.token_ids)
    blocks.remember(seq)
    return seq


def reuse(blocks, token_ids):
    seq = sequence(token_ids)
    blocks.reuse_prefix(seq)
    blocks.check_integrity()
    return seq


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (16, 4)])
def test_growth_is_by_whole_blocks_and_once(num_tokens, expected):
    blocks, seq = BlockManager(4, 4), sequence(range(16))
    assert blocks.missing(seq, num_tokens) == expected
    blocks.grow(seq, num_tokens)
    assert len(seq.blocks) == expected == 4 - blocks.num_free and len(set(seq.blocks)) == expected
    blocks.grow(seq, num_tokens)
    assert len(seq.blocks) == expected and blocks.missing(seq, 0) == 0


def test_growth_beyond_what_is_free_is_seen_before():
    blocks, seq = BlockManager(3, 4), sequence(range(16))
    assert blocks.can_grow(seq, 12) and not blocks.can_grow(seq, 13)


def test_full_blocks_are_shared_but_the_last_token_is_left_to_compute():
    blocks = BlockManager(16, 4)
    first = computed(blocks, range(10))
    for length, shared in ((10, 2), (9, 2), (8, 1), (5, 1), (4, 0), (1, 0)):
        seq = reuse(blocks, range(length))
        assert seq.blocks == first.blocks[:shared] and seq.num_computed == 4 * shared == 4 * seq.num_remembered
        blocks.release(seq)


def test_equal_blocks_after_different_beginnings_are_not_shared():
    blocks = BlockManager(16, 4)
    first = computed(blocks, [1, 1, 1, 1, 5, 6, 7, 8, 9])
    assert reuse(blocks, [2, 1, 1, 1, 5, 6, 7, 8, 9]).blocks == []
    assert reuse(blocks, [1, 1, 1, 1, 5, 6, 7, 0, 9]).blocks == first.blocks[:1]
    assert reuse(blocks, [5, 6, 7, 8, 9]).blocks == []


def test_what_is_not_computed_is_not_offered():
    blocks, seq = BlockManager(16, 4), sequence(range(12))
    blocks.grow(seq, 12)
    seq.num_computed = 7
    blocks.remember(seq)
    assert reuse(blocks, range(12)).blocks == seq.blocks[:1]


def test_shared_block_is_free_when_its_last_holder_lets_go():
    blocks = BlockManager(4, 4)
    first = computed(blocks, range(8))
    second = reuse(blocks, range(9))
    blocks.release(first)
    assert blocks.num_free == 2 and len(second.blocks) == 2
    blocks.release(second)
    blocks.check_integrity()
    assert blocks.num_free == 4 and not second.blocks and second.num_computed == 0


def test_free_blocks_keep_their_prefix_until_they_are_handed_out():
    blocks = BlockManager(4, 4)
    blocks.release(computed(blocks, range(12)))
    other = sequence(range(100, 108))
    blocks.grow(other, 4)  # the one that never held anything
    assert len(reuse(blocks, range(12)).blocks) == 2


def test_ends_of_prefixes_are_given_away_before_their_beginnings():
    blocks = BlockManager(3, 4)
    first = computed(blocks, range(12))
    table = list(first.blocks)
    blocks.release(first)
    other = computed(blocks, range(100, 104))
    assert other.blocks == table[2:]
    blocks.release(reuse(blocks, range(13)))
    assert reuse(blocks, range(13)).blocks == table[:2]


def test_block_given_away_is_found_under_its_new_prefix_only():
    blocks = BlockManager(1, 4)
    blocks.release(computed(blocks, range(4)))
    blocks.release(computed(blocks, range(50, 54)))
    assert reuse(blocks, range(5)).blocks == []
    assert reuse(blocks, range(50, 55)).blocks == [0]


def test_same_prefix_computed_twice_is_offered_once():
    blocks = BlockManager(8, 4)
    first, twin = computed(blocks, range(8)), computed(blocks, range(8))
    assert not set(first.blocks) & set(twin.blocks)
    assert reuse(blocks, range(9)).blocks == first.blocks
    blocks.release(twin)
    blocks.check_integrity()


def test_large_token_ids_are_told_apart():
    blocks = BlockManager(8, 1)
    computed(blocks, [2**31 - 1, 2**31 - 2])
    assert reuse(blocks, [2**31 - 2, 2**31 - 1]).blocks == []


def test_integrity_check_finds_damage():
    blocks, seq = BlockManager(4, 4), sequence(range(4))
    blocks.grow(seq, 4)
    blocks._free[seq.blocks[0]] = None
    with pytest.raises(AssertionError, match="block = "):
        blocks.check_integrity()
