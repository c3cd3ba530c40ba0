import pytest

from hpcinfer.errors import ConfigError
from hpcinfer.partition.split import align_up, split


def test_every_split_is_disjoint_complete_and_even():
    for total in range(101):
        for parts in range(1, total + 1):
            ranges = split(total, parts)
            sizes = [len(each) for each in ranges]
            assert [i for each in ranges for i in each] == list(range(total)), (total, parts)
            assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True) and len(ranges) == parts


def test_more_parts_than_things_leave_the_last_ones_empty():
    assert [len(each) for each in split(2, 8)] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert [list(each) for each in split(0, 2)] == [[], []]


@pytest.mark.parametrize(("total", "parts"), [(3, 0), (3, -1), (-1, 2)])
def test_impossible_splits_are_refused(total, parts):
    with pytest.raises(ConfigError, match=f"{total} things into {parts} parts"):
        split(total, parts)


def test_align_up_gives_the_next_multiple():
    for value in range(200):
        aligned = align_up(value, 64)
        assert aligned % 64 == 0 and 0 <= aligned - value < 64
