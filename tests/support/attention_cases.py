"""The list of cases that every implementation of paged attention passes: a backend's test class inherits it."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention import NO_OPTIONS, Batch, Options, Shape, dense_attention, make_batch, share_front

SLOPES, SINKS = np.array([0.5, 0.25, 0.125, 0.0625]), np.array([-1.0, 0.0, 2.0, 5.0])
OPTIONS = {
    "plain": Options(),
    "window": Options(sliding_window=20),
    "soft_cap": Options(soft_cap=1.5),
    "alibi": Options(alibi_slopes=SLOPES),
    "sinks": Options(sinks=SINKS),
    "all": Options(0.7, 33, 2.0, SLOPES, SINKS),
}


@dataclass(frozen=True)
class Rows:
    """A batch before its numbers are drawn."""

    shape: Shape
    q_lens: list[int]
    kv_lens: list[int]

    def make(self, **changes) -> Batch:
        return make_batch(replace(self.shape, **changes), self.q_lens, self.kv_lens)


class AttentionCases:
    """Cases of one implementation, with four query heads.

    Args:
        MIXED: decodes, a prompt, a piece of a prompt, and padding.
        DECODE: decodes of several lengths, a block's end among them, and a padding row.
        SHARED: rows of which the first two or more share their first ``NUM_SHARED`` blocks.
    """

    MIXED: ClassVar[Rows]
    DECODE: ClassVar[Rows]
    SHARED: ClassVar[Rows]
    NUM_SHARED: ClassVar[int] = 2

    def attend(self, batch: Batch, options: Options = NO_OPTIONS) -> np.ndarray:
        raise NotImplementedError

    def assert_near(self, out: np.ndarray, right: np.ndarray, dtype: type) -> None:
        raise NotImplementedError

    def check(self, batch: Batch, options: Options = NO_OPTIONS) -> None:
        """Dense attention's outputs, and zeros for padding."""
        out, num_tokens = self.attend(batch, options), int(batch.q_starts[-1])
        np.testing.assert_array_equal(out[num_tokens:], 0)
        self.assert_near(out[:num_tokens], dense_attention(batch, options)[:num_tokens], batch.shape.dtype)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
    def test_mixed_batch_beside_padding(self, options):
        self.check(self.MIXED.make(), options)

    @pytest.mark.parametrize(
        "options", [Options(), Options(sliding_window=1), OPTIONS["all"]], ids=["plain", "window_1", "all"]
    )
    def test_decode_batch(self, options):
        self.check(self.DECODE.make(), options)

    @pytest.mark.parametrize("quantized", [jnp.float8_e4m3fn, jnp.int8])
    def test_decode_over_a_quantised_pool(self, quantized):
        self.check(self.DECODE.make(quantized=quantized))

    def test_prompt_in_a_batch_of_no_more_tokens_than_rows(self):
        self.check(make_batch(self.DECODE.shape, [1, 3, 1], [9, 12, 40]))

    @pytest.mark.parametrize("rows", ["MIXED", "DECODE"])
    def test_batch_of_padding_alone_gives_zeros(self, rows):
        assert not self.attend(make_batch(getattr(self, rows).shape, [], []), Options(sinks=SINKS)).any()

    def test_rows_may_share_blocks(self):
        batch, num_tokens = self.SHARED.make(), self.NUM_SHARED * self.SHARED.shape.block_size
        for row in range(1, len(self.SHARED.q_lens)):
            batch.tables[row, : self.NUM_SHARED] = batch.tables[0, : self.NUM_SHARED]
            batch.keys[row][:num_tokens] = batch.keys[0][:num_tokens]
            batch.values[row][:num_tokens] = batch.values[0][:num_tokens]
        self.check(batch)


class SharedPrefixCases(AttentionCases):
    """More cases, of an implementation that reads shared tokens once, by the table of the first row that has them."""

    def decodes_that_share(self, *, is_read_once: bool) -> Batch:
        """Decodes of which three share half of a table, among them the row of one token more, and one shares none."""
        shape = self.DECODE.shape
        num_blocks = shape.max_blocks // 2
        end = num_blocks * shape.block_size
        batch = make_batch(shape, [1, 1, 1, 1], [shape.block_size + 3, end + 2 * shape.block_size, end + 1, end + 5])
        return share_front(batch, [1, 2, 3], num_blocks, is_read_once=is_read_once)

    @pytest.mark.parametrize(
        "options", [Options(), Options(0.7, None, 1.5, None, SINKS)], ids=["plain", "scale_cap_and_sinks"]
    )
    def test_decodes_read_shared_tokens_once(self, options):
        self.check(self.decodes_that_share(is_read_once=True), options)

    def test_shared_tokens_behind_windows_and_under_slopes_are_read_by_each_row(self):
        self.check(self.decodes_that_share(is_read_once=False), OPTIONS["all"])

    def test_batch_that_shares_nothing_may_say_so(self):
        batch = self.DECODE.make()
        self.check(replace(batch, shared_lens=np.zeros_like(batch.kv_lens)))
