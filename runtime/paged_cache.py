"""A pool of pages for the keys and values of sequences, which gives back what the pattern can no longer read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.eviction import Retention
from attndsl.keeping import Kept
from attndsl.paging import PageChoice
from attndsl.runtime.decode import DecodeTensors
from attndsl.runtime.keep import Entries, Keeper
from attndsl.runtime.page_books import Books, DeviceBooks, HostBooks
from attndsl.runtime.page_choice import PageKernels
from attndsl.runtime.token_inputs import TokenInputs


class Decode(Protocol):
    """A compiled attention."""

    def decode(self, q: Tensor, *call: Any, **options: Any) -> Any: ...


class PagePool:
    """`attndsl.serving.PagedCache` is the public class; see there."""

    def __init__(
        self,
        attend: Decode,
        retention: Retention,
        batch: int,
        kv_heads: int,
        head_dim: int,
        v_dim: int,
        pages: int,
        max_len: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        bounds: PageKernels | None,
        choices: Sequence[PageChoice],
        program: str,
        kept: Sequence[Kept],
        on_device: bool,
        tokens: TokenInputs,
    ) -> None:
        self.attend, self.retention, self.page, self.max_len = attend, retention, retention.page, max_len
        self._check_size(pages)
        shape = (pages + on_device, kv_heads, self.page)
        # Zeros, since a pool is read in tiles: a masked key counts nothing only if its value is a number. Beside a pool
        # whose books the device keeps there is a page for tokens that do not fit.
        self._pools = tuple(torch.zeros(*shape, dim, dtype=dtype, device=device) for dim in (head_dim, v_dim))
        self.k, self.v = (pool[:pages] for pool in self._pools)
        self.page_table = torch.full((batch, -(-max_len // self.page)), -1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.k_min = self.k_max = None
        self._bounds, self.choices = bounds, tuple(choices) if bounds is not None else ()
        if bounds is not None:
            exact = torch.float32 if self.k.element_size() == 1 else self.k.dtype
            self.k_min = torch.zeros(pages, kv_heads, head_dim, dtype=exact, device=device)
            self.k_max = torch.zeros_like(self.k_min)
        call = DecodeTensors(self.k, self.k, self.v, self.seq_lens, self.page_table, None, None)
        self._keeper = Keeper(program, kept, call) if kept else None
        self._tokens = tokens
        make = DeviceBooks if on_device else HostBooks
        self._books: Books = make(retention, self.page_table, self.seq_lens, pages, max_len, self._tokens)

    @property
    def lengths(self) -> list[int]:
        """The length of each sequence. Where the device keeps the books, this waits for it."""
        return self._books.lengths

    @property
    def pages_held(self) -> int:
        """Pages in use. Where the device keeps the books, this waits for it."""
        return self._books.pages_held

    @property
    def full(self) -> Tensor | None:
        """Where the device keeps the books, for which sequences there was no room: bool [batch]."""
        return self._books.full if isinstance(self._books, DeviceBooks) else None

    @property
    def views(self) -> Entries | None:
        """What is kept beside the pool, as `attn.decode` takes it; None where that is nothing."""
        return None if self._keeper is None else self._keeper.entries

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What inputs hold at tokens, by name, with room for all: given to `decode`, and to be changed in place."""
        return self._tokens.tensors

    @property
    def bytes(self) -> int:
        """Memory of the pool, its table, its bounds and views, and of what inputs hold at tokens."""
        entries = (x for each in (self.views or {}).values() for x in each)
        tensors = (self.k, self.v, self.page_table, self.seq_lens, self.k_min, self.k_max, *entries)
        return sum(x.numel() * x.element_size() for x in tensors if x is not None) + self._tokens.bytes

    def append(self, k: Tensor, v: Tensor, sequences: Sequence[int] | None = None, **inputs: Tensor) -> None:
        """Add the keys [b, Hkv, n, D] and values [b, Hkv, n, Dv] of n new tokens to each sequence (default: all).

        inputs: what the inputs in `at_tokens` hold at them, [b, …, n].

        Before that, pages that no row from here on can read are given back. Raises `PatternError` (A557) where the pool
        has no page left, or a sequence would pass `max_len`; nothing has changed then but what was given back. Where
        the device keeps the books nothing is raised: such a sequence takes no more tokens, and `full` says so. Tensors
        of other sizes (A504) and sequences that are none of the cache's, or come twice (A557), change nothing.
        """
        sequences = None if sequences is None else self._known(sequences)
        self._check(k, v, len(self.seq_lens) if sequences is None else len(sequences))
        device = self.k.device
        rows = slice(None) if sequences is None else torch.tensor(sequences, dtype=torch.long, device=device)
        new, first = k.shape[2], self.seq_lens[rows].clone()
        self._tokens.check(inputs, len(first), new)
        self._write(k, v, rows, first, self._books.take(sequences, rows, new), inputs)
        lengths, table = self.seq_lens[rows], self.page_table[rows]
        if self._bounds is not None and self.k_min is not None and self.k_max is not None:
            self._bounds.update(self.k, self.k_min, self.k_max, lengths, table, new)
        if self._keeper is not None:
            call = DecodeTensors(self.k, self.k, self.v, lengths, table, None, None)
            self._keeper.update(call, new, None if isinstance(rows, slice) else rows)

    def _known(self, sequences: Sequence[int]) -> list[int]:
        """Raises `PatternError` (A557) where these are not sequences of the cache, each once."""
        found, batch = [int(b) for b in sequences], len(self.seq_lens)
        if len(set(found)) < len(found) or not all(0 <= b < batch for b in found):
            what = f"{found} are not sequences of this cache, which has {batch}"
            raise error("A557", what, help="name them by numbers from 0 on, each once")
        return found

    def _check(self, k: Tensor, v: Tensor, sequences: int) -> None:
        """Raises `PatternError` (A504) where these are not new tokens of so many sequences: they would be broadcast, or
        refused by torch after the books have counted them."""
        for x, pool in ((k, self.k), (v, self.v)):
            if x.dim() != 4 or x.shape != (sequences, pool.shape[1], k.shape[2], pool.shape[3]):
                raise error(
                    "A504", f"k {list(k.shape)} and v {list(v.shape)} do not go together with {sequences} sequences "
                    f"and pools {list(self.k.shape)} and {list(self.v.shape)}",
                    help="k is [sequences, Hkv, n, D] and v [sequences, Hkv, n, Dv]",
                )  # fmt: skip

    def _write(
        self, k: Tensor, v: Tensor, rows: slice | Tensor, first: Tensor, fits: Tensor | None,
        inputs: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Put the new tokens of sequences into their pages, from the place `first` of each on; those that do not fit
        go to a page beside."""
        at = first[:, None] + torch.arange(k.shape[2], device=first.device, dtype=torch.int32)
        if inputs:
            self._tokens.write(inputs, rows, at, fits)
        places = (at // self.page).long().clamp(max=self.page_table.shape[1] - 1)
        page = self.page_table[rows].gather(1, places).long()
        if fits is not None:
            page = torch.where(fits[:, None], page, len(self.k))
        for pool, x in zip(self._pools, (k, v), strict=True):
            x = x.to(pool.dtype).transpose(1, 2)
            if pool.element_size() == 1:
                # Few operators take 8-bit floats.
                pool, x = pool.view(torch.uint8), x.view(torch.uint8)
            pool[page, :, at % self.page] = x

    def decode(self, q: Tensor, *, plans: Mapping[str, Tensor] | None = None, **options: Any) -> Any:
        """`attn.decode` of q [B, Hq, n, D], the last n tokens of each sequence, over the pool.

        plans: of the attention's selections, by name. Those that go by bounds which the cache keeps are chosen by
        them, the others by what it keeps of views.
        """
        if self.choices or plans:
            options["plans"] = self._by_bounds(q, plans)
        if self._keeper is not None:
            options["views"] = self.views
        options |= {name: x for name, x in self.inputs.items() if name not in options}
        return self.attend.decode(q, self.k, self.v, self.seq_lens, self.page_table, **options)

    def _by_bounds(self, q: Tensor, plans: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The plans of the selections that go by pages' bounds, by name, with those given."""
        found = dict(plans or {})
        for x in self.choices:
            if x.name not in found:
                found[x.name] = self.top(q, x.count, x.recent, x.shared)
        return found

    def top(self, q: Tensor, count: int, recent: int = 1, shared: bool = True) -> Tensor:
        """The `count` pages that each row of q [B, Hq, n, D] may get most from, by their bounds (Quest).

        recent: so many pages, the row's own and those before it, come first. shared: the heads of a key head choose
        together, by the sum of what each may get. Of equal pages the earlier one is taken.

        Returns int32 [B, Hkv if shared else Hq, n, count]: places in the sequence, in increasing order, then -1.
        Raises `PatternError` (A560) unless the cache keeps bounds.
        """
        if self._bounds is None or self.k_min is None or self.k_max is None:
            raise error("A560", "this cache keeps no bounds of its pages", help="make it with bounds=True")
        return self._bounds.top(
            q, self.k_min, self.k_max, self.seq_lens, self.page_table, self.page, count, recent, shared
        )  # fmt: skip

    def release(self, b: int) -> None:
        """Give back all pages of a sequence, which is then empty."""
        self._books.release(*self._known([b]))

    def _check_size(self, pages: int) -> None:
        """Raises `PatternError` (A562) where one sequence of `max_len` tokens would not fit: a pattern that comes back
        to its columns keeps more than one that leaves them."""
        places = np.arange(-(-self.max_len // self.page))
        needed = places[~self.retention.evictable(self.max_len, places)]
        if len(needed) <= pages:
            return
        first = int(needed[0]) * self.page
        raise error(
            "A562", f"{len(needed)} pages of a sequence of {self.max_len} tokens may be read again, and the pool has "
            f"{pages}: tokens {first} to {first + self.page - 1} are the first",
            help="make the pool larger or max_len less, or leave columns for good, as windows and sinks do",
        )  # fmt: skip
