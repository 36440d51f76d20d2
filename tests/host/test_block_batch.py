"""The padded batch of a user's own model."""

import numpy as np
import pytest

from jpaged.host.blocks.manager import BlockManager


@pytest.fixture
def blocks():
    manager = BlockManager(num_blocks=16, block_size=4)
    manager.reserve("a", 6)
    manager.reserve("b", 9)
    return manager


def test_rows_are_laid_out_one_after_the_other_and_padded(blocks):
    batch = blocks.batch([("a", 0, 6), ("b", 8, 9)], num_tokens=10, num_rows=4, max_blocks=5)
    a, b = blocks.block_table("a"), blocks.block_table("b")
    np.testing.assert_array_equal(batch.slots, [*blocks.slots("a", 0, 6), *blocks.slots("b", 8, 9), 0, 0, 0])
    np.testing.assert_array_equal(batch.block_tables, [[*a, 0, 0, 0], [*b, 0, 0], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(batch.kv_lens, [6, 9, 0, 0])
    np.testing.assert_array_equal(batch.cu_q_lens, [0, 6, 7, 7, 7])
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}


def test_shape_is_the_same_for_any_rows(blocks):
    def shapes(*rows):
        return [array.shape for array in blocks.batch(rows, num_tokens=16, num_rows=3, max_blocks=4)]

    assert shapes() == shapes(("b", 0, 1)) == shapes(("a", 0, 6), ("b", 0, 9))


def test_row_shows_only_the_blocks_that_it_reads(blocks):
    batch = blocks.batch([("b", 0, 4)], num_tokens=4, num_rows=1, max_blocks=1)
    np.testing.assert_array_equal(batch.block_tables, [blocks.block_table("b")[:1]])


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"num_tokens": 6}, "num_tokens=6 is too small: the rows need 7; raise it or compute fewer tokens"),
        ({"num_rows": 1}, "num_rows=1 is too small: the rows need 2"),
        ({"max_blocks": 2}, "max_blocks=2 is too small: the rows need 3"),
    ],
)
def test_rows_that_do_not_fit_are_refused(blocks, shape, why):
    with pytest.raises(ValueError, match=why):
        blocks.batch([("a", 0, 6), ("b", 8, 9)], **({"num_tokens": 7, "num_rows": 2, "max_blocks": 3} | shape))


@pytest.mark.parametrize(("row", "why"), [(("c", 0, 1), "'c'"), (("a", 5, 8), r"holds \[0, 6\)")])
def test_positions_that_no_sequence_holds_are_refused(blocks, row, why):
    with pytest.raises(ValueError, match=why):
        blocks.batch([row], num_tokens=8, num_rows=1, max_blocks=2)


def test_a_sequence_given_twice_is_refused():
    blocks = BlockManager(num_blocks=8, block_size=4)
    blocks.reserve("a", 6)
    with pytest.raises(ValueError, match=r"rows name \['a'\] more than once"):
        blocks.batch([("a", 0, 4), ("a", 2, 6)], num_tokens=16, num_rows=4, max_blocks=4)
