"""What two levels weigh members by: the probabilities of a branch, given to members for each row, and their gradient.

The operators `attndsl::shares` and `attndsl::shares_backward`: what is whole is an entry a row and member, never one a
row and key. On a GPU the kernel that observes a branch makes them, where its tiles hold whole members; elsewhere, and
for the gradient, torch does, strip by strip of rows. The branch's logits are computed again from its keys, its lse is
handed in; the gradient flows to both, and through the lse into the branch's own backward pass. Nothing waits for the
device. In a decode, `attndsl::shares_ragged`, sequences have lengths of their own, and there is no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.functional import pad

from attndsl.branch_mass import BranchMass, mass_of
from attndsl.diagnostics import error
from attndsl.observing import Cells
from attndsl.program import CallShape, Program
from attndsl.runtime.call import present_lengths
from attndsl.runtime.derive import Deriver
from attndsl.runtime.derive_ragged import RaggedDeriver
from attndsl.runtime.document_blocks import BlockSums
from attndsl.runtime.documents import Members, members_of
from attndsl.runtime.engine import MAX_PREPARED
from attndsl.runtime.entry_members import of_members
from attndsl.runtime.entry_tokens import EntryTokens
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.masses import shares as given_to_members
from attndsl.runtime.ops import traced
from attndsl.runtime.outputs import empty_gradient
from attndsl.runtime.registry import engine_of
from attndsl.runtime.select import MAX_PAIRS
from attndsl.runtime.strips import STRIP
from attndsl.runtime.touched import as_rows, call_values
from attndsl.runtime.transforms import transformed
from attndsl.runtime.values import Values

_LIBRARY = Library("attndsl", "FRAGMENT")
_CALL = (
    "str program, Tensor q, Tensor keys, Tensor lse, Tensor[] inputs, SymInt[] args, float? scale, int member, "
    "SymInt k_len, int part"
)
_LIBRARY.define(f"shares({_CALL}) -> Tensor")
_LIBRARY.define(f"shares_ragged({_CALL}, Tensor seq_lens) -> Tensor")
_LIBRARY.define(f"shares_observed({_CALL}, int rows, bool largest) -> Tensor")
_LIBRARY.define(f"shares_backward(Tensor gradient, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor[])")
_KEPT: dict[Any, _Kind] = {}
# Where kernels run.
_DEVICES = ("cuda",)
# Keys of a cell that the kernel's tiles hold whole, at most, of 16-bit and of other numbers: a power of two.
_HALF_CELL, _CELL = 64, 16


def member_shares(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int,
) -> Tensor:  # fmt: skip
    """The probabilities of the keys of a branch's part as those of members of `member` tokens: [B, Hq, rows, members],
    float32 (float64 for float64 tensors). A branch gives what its parts give, added up.

    key: the registered program of the branch. keys: [B, Hkv, n, D], tokens or entries. lse: [B, Hq, rows], the
    branch's own.
    """
    if transformed():
        raise error(
            "A921", "torch.func has no transforms of what weighs the members of two levels",
            engine_of(key).program.span, help="call backward() instead, or loop over what vmap would map",
        )  # fmt: skip
    found: Tensor = torch.ops.attndsl.shares(
        key, q, keys, lse, [*inputs], [*args], scale, member, k_len, part
    )  # fmt: skip
    return found


def ragged_shares(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, capacity: int, part: int, seq_lens: Tensor,
) -> Tensor:  # fmt: skip
    """As `member_shares`, of the last rows of sequences of these lengths, int32 [B], in caches with room for `capacity`
    tokens; 0 for members past a sequence's end."""
    make = torch.ops.attndsl.shares_ragged if traced((q, keys, *inputs)) else _shares_ragged
    found: Tensor = make(key, q, keys, lse, [*inputs], [*args], scale, member, capacity, part, seq_lens)
    return found


def observed_shares(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int, rows: int, largest: bool,
) -> Tensor:  # fmt: skip
    """As `member_shares` of a packed call, or the largest probability of each member; without a gradient.

    rows: those of a class; more than 1: [B, Hq, tokens, members], a class for each so many rows of each document, one
    document after the other."""
    q, keys, lse, *inputs = (x.detach() for x in (q, keys, lse, *inputs))
    make = torch.ops.attndsl.shares_observed if traced((q, keys, *inputs)) else _shares_observed
    found: Tensor = make(key, q, keys, lse, inputs, [*args], scale, member, k_len, part, rows, largest)
    return found


@dataclass(slots=True)
class _Kind:
    """One kind of call: same shapes, dtypes and device."""

    program: Program
    shape: CallShape
    device: torch.device
    given: Sequence[Tensor]
    ragged: bool
    part: int
    mass: BranchMass = field(init=False)
    deriver: Deriver = field(init=False)
    tables: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Raises `PatternError` (A577) for what would look at too many pairs."""
        shape, whole = self.shape, self.program.only
        branch = replace(whole, parts=(whole.parts[self.part],))
        self.mass = mass_of(self.program, branch, (shape.heads, shape.kv_heads), self.ragged)
        pairs = shape.batch * shape.heads * shape.rows * self.mass.keys(shape.k_len)
        if pairs > MAX_PAIRS:
            raise error(
                "A577", f"what members weigh is looked up in {pairs:,} probabilities of `{branch.name}`", branch.span,
                help=f"at most {MAX_PAIRS:,}: attend to fewer entries, as `over pool(mean, 64)`",
            )  # fmt: skip
        make = RaggedDeriver if self.ragged else Deriver
        self.deriver = make(self.mass.program, shape, self.device, given=self.given)
        self.tables = {table.name: table_tensor(table, self.device) for table in self.program.tables}


@dataclass(frozen=True, slots=True)
class _Call:
    """A call, from whose rows strips are made; q, keys, lse and inputs may be leaves of a graph.

    lengths: int64 [B, 1, 1, 1], where sequences have their own; present: the same, where not all tokens of a call or a
    cache are.
    documents: of a packed call. tokens: those of the entries of a view that data tells.
    """

    kind: _Kind
    keys: Tensor
    values: Values
    scale: float | Tensor
    member: int
    lengths: Tensor | None = None
    present: Tensor | None = None
    documents: Members | None = None
    tokens: EntryTokens | None = None

    @classmethod
    def of(
        cls, kind: _Kind, keys: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, member: int,
        lengths: Tensor | None = None,
    ) -> _Call:  # fmt: skip
        values = call_values(kind.mass.program, kind.shape, kind.deriver, inputs, args, kind.tables, lengths)
        own = kind.mass.branch.scale
        factor: float | Tensor = kind.shape.dim**-0.5 if scale is None else scale
        if scale is None and own is not None:
            factor = values.number(own)
        present = present_lengths(kind.program, kind.shape, inputs, lengths)
        (part,) = kind.mass.branch.parts
        documents = members_of(kind.program, part.view, kind.shape, inputs, present)
        tokens: EntryTokens | None = None
        if kind.mass.told and part.view is not None:
            tokens = EntryTokens.of(part.view, kind.program, kind.shape, kind.device, inputs, present)
        return cls(kind, keys, values, factor, member, lengths, present, documents, tokens)

    def strips(self) -> Iterator[slice]:
        shape = self.kind.shape
        keys = self.kind.mass.keys(shape.k_len)
        width = shape.batch * shape.heads * (keys if self.tokens is None else max(keys, shape.k_len))
        step = max(1, STRIP[self.kind.device.type] // max(1, width))
        return (slice(low, min(low + step, shape.rows)) for low in range(0, shape.rows, step))

    def shares(self, q: Tensor, lse: Tensor, rows: slice, largest: bool = False) -> Tensor:
        """Of q [B, Hq, rows of the strip, D] with their lse. largest: of documents' members, not the sums."""
        kind, mass = self.kind, self.kind.mass
        shape, real = kind.shape, self.keys.dtype
        position = torch.arange(rows.start, rows.stop, device=q.device)
        if self.lengths is None:
            position = position + shape.first_position(kind.program)
        else:
            position = position + (self.lengths.view(-1, 1) - shape.rows)
        grouped = q.to(real).unflatten(1, (shape.kv_heads, -1)).flatten(2, 3)
        dots = (grouped @ self.keys.transpose(-1, -2)).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
        index = torch.arange(self.keys.shape[2], device=q.device).view(1, 1, 1, -1)
        logits = dots * self.scale
        at = self.values.at(q=as_rows(position), k=index, s=logits)
        if mass.logit is not None:
            logits = at.tensor(mass.logit).to(real).expand_as(dots)
        seen = at.tensor(mass.seen) & as_rows(position >= 0) & (logits > -torch.inf)
        if self.lengths is not None and self.tokens is None:
            # What lies past a sequence's end in its cache may be anything.
            seen = seen & (index * mass.stride < self.lengths)
        # What is not seen is taken out before it could make a gradient that is no number.
        below = torch.where(lse == -torch.inf, 0, lse).unsqueeze(-1).to(real)
        masses = torch.where(seen, torch.where(seen, logits, 0) - below, -torch.inf).exp()
        if self.tokens is not None:
            return of_members(masses, self.tokens, self.member)
        if self.documents is not None:
            return self.documents.of_rows(masses, position, self.member, largest)
        if mass.size == mass.stride and self.member % mass.size == 0:
            members = -(-shape.k_len // self.member)
            entries = self.member // mass.size
            whole = pad(masses, (0, members * entries - masses.shape[3]))
            found: Tensor = whole.unflatten(3, (members, entries)).sum(4)
            return found
        return given_to_members(masses, mass.size, mass.stride, self.member, shape.k_len, False, self.present)


def _kind(
    key: str, q: Tensor, keys: Tensor, inputs: Sequence[Tensor], k_len: int, part: int, ragged: bool = False
) -> _Kind:
    given = tuple((x.shape, x.dtype) for x in inputs)
    kind = (key, q.shape, q.dtype, q.device, keys.shape, given, k_len, ragged, part)
    if kind not in _KEPT:
        if len(_KEPT) >= MAX_PREPARED:
            _KEPT.clear()
        batch, heads, rows, dim = q.shape
        shape = CallShape(batch, heads, keys.shape[1], rows, k_len, dim, dim)
        like = [torch.empty_like(x, device="meta") for x in inputs]
        _KEPT[kind] = _Kind(engine_of(key).program, shape, q.device, like, ragged, part)
    return _KEPT[kind]


def _real(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _shares(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int,
) -> Tensor:  # fmt: skip
    kind = _kind(key, q, keys, inputs, k_len, part)
    if _by_kernel(kind, q, member):
        # Of what its view is of, only how much there is.
        of_view = kind.mass.view is not None
        k = keys.new_empty(*keys.shape[:2], k_len, keys.shape[3]) if of_view else keys
        return engine_of(key).observe(q, k, k, lse, inputs, args, scale, "auto", Cells(1, member, largest=False))
    found = _fake(key, q, keys, lse, inputs, args, scale, member, k_len, part)
    call = _Call.of(kind, keys.to(_real(q)), inputs, args, scale, member)
    for rows in call.strips():
        found[:, :, rows] = call.shares(q[:, :, rows], lse[:, :, rows], rows)
    return found


def _shares_observed(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int, rows: int, largest: bool,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        kind = _kind(key, q, keys, inputs, k_len, part)
        call = _Call.of(kind, keys.to(_real(q)), inputs, args, scale, member)
        strips = ((at, call.shares(q[:, :, at], lse[:, :, at], at, largest)) for at in call.strips())
        if rows == 1:
            found = _fake(key, q, keys, lse, inputs, args, scale, member, k_len, part)
            for at, masses in strips:
                found[:, :, at] = masses
            return found
        assert call.documents is not None, "of other calls kernels observe classes"
        classes = call.documents.classes(rows, kind.shape.first_position(kind.program), q.shape[2])
        sums = BlockSums(k_len, rows, largest)
        for at, masses in strips:
            sums.add(masses, classes[:, at].expand(q.shape[0], -1))
        return sums.found if q.shape[2] else _observed_fake(
            key, q, keys, lse, inputs, args, scale, member, k_len, part, rows, largest
        ).zero_()  # fmt: skip


def _by_kernel(kind: _Kind, q: Tensor, member: int) -> bool:
    """Whether the kernel that observes a branch makes its shares: in cells that are members, each in one tile."""
    mass, on_gpu = kind.mass, kind.device.type in _DEVICES and q.dtype != torch.float64
    cell, rest = divmod(member, mass.size)
    whole = mass.of_blocks and not rest and cell.bit_count() == 1 and len(kind.program.only.parts) == 1
    return on_gpu and whole and cell <= (_HALF_CELL if q.element_size() == 2 else _CELL)


def _shares_ragged(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, capacity: int, part: int, seq_lens: Tensor,
) -> Tensor:  # fmt: skip
    found = _fake(key, q, keys, lse, inputs, args, scale, member, capacity, part)
    lengths = seq_lens.clamp(0, capacity).to(torch.int64).view(-1, 1, 1, 1)
    with torch.no_grad():
        kind = _kind(key, q, keys, inputs, capacity, part, ragged=True)
        call = _Call.of(kind, keys.to(_real(q)), inputs, args, scale, member, lengths)
        for rows in call.strips():
            found[:, :, rows] = call.shares(q[:, :, rows], lse[:, :, rows], rows)
    return found


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd at work inside an operator, as it is by itself unless a dispatch mode looks on: that leaves it out."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality).add(torch._C.DispatchKey.ADInplaceOrView)
    left_out = torch._C._dispatch_tls_local_exclude_set() - keys
    included = torch._C._dispatch_tls_local_include_set()
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, left_out):
        yield


def _shares_backward(
    gradient: Tensor, key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Strip by strip in one order, each strip's graph of its own."""
    dq, d_lse = empty_gradient(q).zero_(), torch.zeros_like(lse)
    with _recording():
        wide = keys.detach().to(_real(q)).requires_grad_()
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
        call = _Call.of(_kind(key, q, keys, inputs, k_len, part), wide, leaves, args, scale, member)
        summed = [wide, *(x for x in leaves if x.requires_grad)]
        totals = [torch.zeros_like(x) for x in summed]
        for rows in call.strips():
            own = [x[:, :, rows].detach().requires_grad_() for x in (q, lse)]
            made = call.shares(own[0], own[1], rows)
            wanted = [*own, *summed]
            # A scale that inputs give is the same node in every strip.
            found = torch.autograd.grad(
                made, wanted, gradient[:, :, rows].to(made.dtype), retain_graph=True, allow_unused=True
            )
            for x, own_rows in zip((dq, d_lse), found, strict=False):
                if own_rows is not None:
                    x[:, :, rows] = own_rows
            for total, more in zip(totals, found[2:], strict=True):
                if more is not None:
                    total += more
    of_inputs = iter(totals[1:])
    learned = [next(of_inputs) if x.is_floating_point() else x.new_zeros(()) for x in inputs]
    return dq, totals[0].detach().to(keys.dtype), d_lse, [x.detach() for x in learned]


def _fake(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], -(-k_len // member), dtype=_real(q))


def _ragged_fake(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, capacity: int, part: int, seq_lens: Tensor,
) -> Tensor:  # fmt: skip
    return _fake(key, q, keys, lse, inputs, args, scale, member, capacity, part)


def _observed_fake(
    key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int, rows: int, largest: bool,
) -> Tensor:  # fmt: skip
    found = _fake(key, q, keys, lse, inputs, args, scale, member, k_len, part)
    return found if rows == 1 else found.new_empty(*q.shape[:2], k_len, found.shape[3])


def _backward_fake(
    gradient: Tensor, key: str, q: Tensor, keys: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, member: int, k_len: int, part: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    learned = [torch.empty_like(x) if x.is_floating_point() else x.new_empty(()) for x in inputs]
    return empty_gradient(q), torch.empty_like(keys), torch.empty_like(lse), learned


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    key, q, keys, lse, given, *ctx.how = inputs
    ctx.key = key
    ctx.save_for_backward(q, keys, lse, *given)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    q, keys, lse, *given = ctx.saved_tensors
    args, *how = ctx.how
    dq, d_keys, d_lse, learned = torch.ops.attndsl.shares_backward(
        gradient, ctx.key, q, keys, lse, given, args, *how
    )  # fmt: skip
    of_inputs = [g if x.is_floating_point() else None for g, x in zip(learned, given, strict=True)]
    # One for each that the operator takes; to torch a list without entries is one of tensors.
    return None, dq, d_keys, d_lse, of_inputs, None if args else [], None, None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("shares", _shares, _device)
    _LIBRARY.impl("shares_ragged", _shares_ragged, _device)
    _LIBRARY.impl("shares_observed", _shares_observed, _device)
    _LIBRARY.impl("shares_backward", _shares_backward, _device)
_LIBRARY.impl("shares", _fake, "Meta")
_LIBRARY.impl("shares_ragged", _ragged_fake, "Meta")
_LIBRARY.impl("shares_observed", _observed_fake, "Meta")
_LIBRARY.impl("shares_backward", _backward_fake, "Meta")
torch.library.register_autograd("attndsl::shares", _differentiate, setup_context=_setup, lib=_LIBRARY)
