import pytest

from hpcinfer.config import SamplingParams
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Sequence


def sequence(token_ids, seq_id=0):
    return Sequence(seq_id, Request(0, tuple(token_ids), SamplingParams()), 0)


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
    assert blocks.grow(seq, num_tokens)
    assert len(seq.blocks) == expected == 4 - blocks.num_free and len(set(seq.blocks)) == expected
    assert blocks.grow(seq, num_tokens) and blocks.grow(seq, 0)
    assert len(seq.blocks) == expected


def test_growth_beyond_what_is_free_gives_nothing():
    blocks, seq = BlockManager(3, 4), sequence(range(16))
    assert not blocks.grow(seq, 13) and not seq.blocks and blocks.num_free == 3
    assert blocks.grow(seq, 12) and len(seq.blocks) == 3


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
    assert reuse(blocks, [2, 1, 1, 1, 5, 6, 7, 8, 9]).blocks.tolist() == []
    assert reuse(blocks, [1, 1, 1, 1, 5, 6, 7, 0, 9]).blocks == first.blocks[:1]
    assert reuse(blocks, [5, 6, 7, 8, 9]).blocks.tolist() == []


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
    table = first.blocks[:]
    blocks.release(first)
    other = computed(blocks, range(100, 104))
    assert other.blocks == table[2:]
    blocks.release(reuse(blocks, range(13)))
    assert reuse(blocks, range(13)).blocks == table[:2]


def test_block_given_away_is_found_under_its_new_prefix_only():
    blocks = BlockManager(1, 4)
    blocks.release(computed(blocks, range(4)))
    blocks.release(computed(blocks, range(50, 54)))
    assert reuse(blocks, range(5)).blocks.tolist() == []
    assert reuse(blocks, range(50, 55)).blocks.tolist() == [0]


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
    assert reuse(blocks, [2**31 - 2, 2**31 - 1]).blocks.tolist() == []


def announced(blocks, token_ids, seq_id):
    """A sequence that is going to compute all its tokens."""
    seq = sequence(token_ids, seq_id)
    blocks.grow(seq, len(seq.token_ids))
    blocks.announce(seq)
    return seq


def test_prefix_is_coming_until_it_is_there():
    blocks = BlockManager(16, 4)
    first = announced(blocks, range(13), 1)
    for length, is_coming in ((4, False), (5, True), (9, True), (30, True)):
        assert blocks.is_coming(sequence(range(length))) == is_coming
    assert not blocks.is_coming(sequence([7, *range(1, 30)]))
    for num_computed, is_coming in ((6, True), (11, True), (13, False)):  # the third block fills in two chunks
        first.num_computed = num_computed
        blocks.remember(first)
        assert blocks.is_coming(sequence(range(30))) == is_coming
        assert len(reuse(blocks, range(30)).blocks) == num_computed // 4
    first.token_ids += [13, 14, 15]
    blocks.announce(first)
    assert blocks.is_coming(sequence(range(17))) and not blocks.is_coming(sequence(range(16)))


def test_only_the_first_block_that_is_missing_counts():
    """Those behind it cannot be shared without it."""
    blocks = BlockManager(8, 4)
    blocks.release(computed(blocks, range(8)))
    late = sequence(range(16), 1)
    blocks.reuse_prefix(late)
    blocks.grow(late, 16)
    blocks.announce(late)
    assert blocks.is_coming(sequence(range(16)))
    blocks._forget(late.blocks[0])
    assert not blocks.is_coming(sequence(range(16)))


def test_what_is_released_is_not_coming():
    blocks = BlockManager(16, 4)
    first = announced(blocks, range(12), 1)
    first.num_computed = 4
    blocks.remember(first)
    assert blocks.is_coming(sequence(range(12)))
    blocks.release(first)
    assert not blocks.is_coming(sequence(range(12))) and not blocks._announced
    assert len(reuse(blocks, range(12)).blocks) == 1


def test_block_that_two_compute_is_there_with_the_first():
    for order in ((0, 1), (1, 0)):
        blocks = BlockManager(8, 4)
        both = [announced(blocks, range(4), 1), announced(blocks, range(4), 2)]
        for i in order:
            both[i].num_computed = 4
            blocks.remember(both[i])
            assert not blocks.is_coming(sequence(range(5)))
        assert reuse(blocks, range(5)).blocks == both[order[0]].blocks and not blocks._announced


def test_without_reuse_nothing_is_shared_or_awaited():
    blocks = BlockManager(16, 4, reuse=False)
    first = announced(blocks, range(12), 1)
    assert not blocks.is_coming(sequence(range(12)))
    first.num_computed = 12
    blocks.remember(first)
    assert reuse(blocks, range(12)).blocks.tolist() == []
    blocks.release(first)
    assert blocks.num_free == 16


def test_integrity_check_finds_damage():
    blocks, seq = BlockManager(4, 4), sequence(range(4))
    blocks.grow(seq, 4)
    blocks._free[seq.blocks[0]] = None
    with pytest.raises(AssertionError, match="block = "):
        blocks.check_integrity()
