"""Which pairs of a tile dropout keeps, as a call of the prelude's."""

from __future__ import annotations

from attndsl.layout import Permutation


def kept_pairs(in_row: bool, order: Permutation | None) -> tuple[str, str]:
    """The function of the prelude, and its call. in_row: the keys of a tile are tokens in a row, which share draws."""
    if in_row:
        return "kept", "kept(seed, b, h, start + q_rows[:, None], k_tile * BLOCK_K, drop_below, BLOCK_Q, BLOCK_K)"
    # Places of a permutation count from 0, and the rows that stand there are those of the call.
    first = "start" if order is None or order.aligned else "k_len - rows"
    return "kept_apart", f"kept_apart(seed, b, h, {first} + q_rows[:, None], k_rows[None, :], drop_below)"
