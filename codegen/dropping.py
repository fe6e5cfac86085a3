"""Which pairs of a tile dropout keeps, as a call of the prelude's."""

from __future__ import annotations

from attndsl.layout import Permutation


def kept_pairs(helpers: set[str], in_row: bool, order: Permutation | None, transposed: bool, of_entries: bool) -> str:
    """The call, whose function is added to the helpers. in_row: the keys of a tile are tokens in a row, which share
    draws; transposed: rows lie in the second dimension; of_entries: keys are those of a view."""
    b = "~b" if of_entries else "b"
    if in_row:
        helpers.add("kept")
        found = f"kept(seed, {b}, h, start + q_rows[:, None], k_tile * BLOCK_K, drop_below, BLOCK_Q, BLOCK_K)"
    else:
        helpers.add("kept_apart")
        # Places of a permutation count from 0, and the rows that stand there are those of the call.
        first = "start" if order is None or order.aligned else "k_len - rows"
        found = f"kept_apart(seed, {b}, h, {first} + q_rows[:, None], k_rows[None, :], drop_below)"
    return f"tl.trans({found})" if transposed else found
