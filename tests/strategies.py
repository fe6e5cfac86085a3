"""Random composed programs: source text of the language, with everything a call of it needs.

`composed_programs()` draws a `Case`. The text uses as little of the language as the draw needs, so a
failing case shrinks to something like `causal` at N = 1 rather than to an attention full of unused
inputs. Composition is the point: sets of every kind nest under `& | - ~ if on coarsen`, and the
arithmetic visits negative operands, clamped indices and lengths that no block size divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from attndsl.grammar import load
from attndsl.program import CallShape, Program

Array: TypeAlias = npt.NDArray[Any]
Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]

LENGTHS = (1, 7, 16, 33, 64, 65, 100, 130)
HEADS = ((1, 1), (2, 1), (4, 2), (3, 3))
# Small head dimensions are drawn more often: they cost less and hide nothing.
DIMS = (8, 8, 16, 16, 8, 40, 64, 80)
STEPS = (1, 2, 3, 4, 7, 8, 16, 32)


@dataclass(frozen=True)
class Case:
    """A program's text, its compile parameters, and one call: int and bool and float32 inputs by name."""

    text: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Array]
    args: Mapping[str, int]
    shape: CallShape

    def load(self) -> Program:
        return load(self.text, params=self.params).program


@dataclass(frozen=True)
class Input:
    """Declared type, and the values for a call."""

    type: str
    values: Callable[[np.random.Generator, CallShape], Array]


def _ints(low: int, high: Callable[[CallShape], int], *dims: str) -> Callable[[np.random.Generator, CallShape], Array]:
    """Random int32 values in [low, high]; dims name attributes of the shape."""
    return lambda rng, s: rng.integers(low, high(s) + 1, [getattr(s, d) for d in dims]).astype(np.int32)


def _bools(share: float, *dims: str) -> Callable[[np.random.Generator, CallShape], Array]:
    return lambda rng, s: rng.random([getattr(s, d) for d in dims]) < share


def _floats(*dims: str | int) -> Callable[[np.random.Generator, CallShape], Array]:
    def values(rng: np.random.Generator, s: CallShape) -> Array:
        sizes = [d if isinstance(d, int) else getattr(s, d) for d in dims]
        return rng.standard_normal(sizes).astype(np.float32)

    return values


def _documents(rng: np.random.Generator, s: CallShape) -> Array:
    starts = rng.random((s.batch, s.k_len)) < 0.15
    return np.cumsum(starts, axis=1).astype(np.int32)


def _permutation(rng: np.random.Generator, s: CallShape) -> Array:
    return rng.permutation(s.k_len).astype(np.int32)


def _block_map(rng: np.random.Generator, s: CallShape) -> Array:
    blocks = -(-s.k_len // 16)
    return rng.random((s.batch, blocks)) < 0.5


def _in_width(values: Array, width: npt.DTypeLike) -> Array:
    """Integers in this type, where it holds them all."""
    narrow = values.astype(width)
    return narrow if values.dtype == np.int32 and np.array_equal(narrow, values) else values


# Of the integers that a call gives.
WIDTHS = ("int32", "int32", "int64", "int16", "int8", "uint8")

INPUTS: dict[str, Input] = {
    "reach": Input("int[b]", _ints(0, lambda s: s.k_len, "batch")),
    "width": Input("int[h]", _ints(1, lambda s: 40, "heads")),
    "dense": Input("bool[g]", _bools(0.5, "kv_heads")),
    "pad": Input("int[b, 5, g]", lambda rng, s: rng.integers(-3, s.k_len, (s.batch, 5, s.kv_heads)).astype(np.int32)),
    "doc": Input("int[b, k] sorted", _documents),
    "ids": Input("int[b, k]", _ints(-1, lambda s: 3, "batch", "k_len")),
    "flag": Input("bool[b, k]", _bools(0.1, "batch", "k_len")),
    "until": Input("int[b, h, k]", _ints(0, lambda s: s.k_len, "batch", "heads", "k_len")),
    "start": Input("int[b, q]", _ints(0, lambda s: s.k_len, "batch", "rows")),
    "chosen": Input("bool[b, k/16]", _block_map),
    "order": Input("int[k]", _permutation),
    "slope": Input("float[h] learnable", _floats("heads")),
    "bias": Input("float[h, 9] learnable", _floats("heads", 9)),
    "prior": Input("float[b, k] learnable", _floats("batch", "k_len")),
    "lift": Input("float[b, h, q] learnable", _floats("batch", "heads", "rows")),
    "sinks": Input("float[h] learnable", _floats("heads")),
}


@dataclass
class _Writer:
    """Writes expressions, and remembers what they need declared.

    `cross`: under `align start`, where an input over k may not be read at q. `placed`: under `on`,
    where inputs indexed by q or k may not be read. `gathered`: under `coarsen`, which ranges over
    positions that the call may not hold, so its rows may not be read.
    """

    draw: Draw
    heads: int
    kv_heads: int
    cross: bool
    inputs: set[str] = field(default_factory=set)
    params: dict[str, Any] = field(default_factory=dict)
    args: dict[str, int] = field(default_factory=dict)
    placed: bool = False
    gathered: bool = False

    # ---------------------------------------------------------------------------- choices
    def one(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        value: int = self.draw(st.integers(low, high))
        return value

    def pick(self, options: Sequence[Callable[[], str]]) -> str:
        text: str = self.one(options)()
        return text

    def literal(self, low: int, high: int) -> str:
        value = self.integer(low, high)
        return str(value) if value >= 0 else f"(-{-value})"

    def use(self, name: str) -> str:
        self.inputs.add(name)
        return name

    def param(self, value: int) -> str:
        """An int literal, sometimes as a compile-time parameter."""
        if not self.draw(st.booleans()) or len(self.params) >= 3:
            return str(value)
        name = f"n{len(self.params)}"
        self.params[name] = value
        return name

    def table(self, low: int, high: int) -> str:
        """A compile-time table with an entry per head, read at h."""
        name = f"t{len(self.params)}"
        self.params[name] = [self.integer(low, high) for _ in range(self.heads)]
        return f"{name}[h]"

    def runtime(self, low: int, high: int) -> str:
        name = f"r{len(self.args)}"
        self.args[name] = self.integer(low, high)
        return name

    @property
    def tokens(self) -> tuple[str, ...]:
        """Where inputs over k may be read here."""
        return () if self.placed else ("k",) if self.cross else ("k", "q")

    # --------------------------------------------------------------------------- integers
    def size(self) -> str:
        """A positive int, known when the program is compiled."""
        return self.pick((lambda: self.param(self.one(STEPS)), lambda: self.table(1, 33), lambda: self.literal(1, 40)))

    def count(self) -> str:
        """A length: compile-time, runtime or data."""
        return self.pick(
            (
                self.size,
                lambda: self.runtime(0, 50),
                lambda: f"{self.use('width')}[h]",
                lambda: f"{self.use('reach')}[b]",
                lambda: f"(Nk // {self.integer(2, 5)})",
                lambda: f"max({self.literal(0, 9)}, {self.literal(0, 9)} * (h + 1))",
            )
        )

    def leaf(self) -> str:
        options: list[Callable[[], str]] = [
            lambda: "q",
            lambda: "k",
            lambda: "(q - k)",
            lambda: self.literal(-9, 40),
            lambda: "Nk",
            lambda: "Nq",
            lambda: self.one(("h", "g", "b", "H", "G")),
            self.count,
            lambda: f"{self.use('pad')}[b, {self.one(('0', 'h'))}, g]",
        ]
        if self.tokens:
            options.append(lambda: f"{self.use('ids')}[{self.one(self.tokens)}{self.one(('', ' + 1', ' - 3'))}]")
            options.append(lambda: f"{self.use('doc')}[{self.one(self.tokens)}{self.one(('', ' - 2', ' // 3'))}]")
            options.append(lambda: f"{self.use('until')}[k]")
            options.append(lambda: f"{self.use('pad')}[b, {self.one(('q', 'k - q'))}, g]")
        if self.tokens and not self.gathered:
            options.append(lambda: f"{self.use('start')}[q]")
        return self.pick(options)

    def int_expr(self, depth: int) -> str:
        if depth == 0:
            return self.leaf()

        def sub() -> str:
            return self.int_expr(depth - 1)

        return self.pick(
            (
                self.leaf,
                lambda: f"({sub()} {self.one('+-')} {sub()})",
                lambda: f"({sub()} {self.one(('//', '%'))} {self.size()})",
                lambda: f"({self.literal(-3, 5)} * {sub()})",
                lambda: f"{self.one(('min', 'max'))}({sub()}, {sub()})",
                lambda: f"abs({sub()})",
                lambda: f"(-{sub()})",
                lambda: f"clamp({sub()}, {self.literal(-9, 9)}, {self.literal(10, 40)})",
                lambda: f"bit_length({sub()})",
                lambda: f"(if {self.bool_expr(depth - 1)} then {sub()} else {sub()})",
            )
        )

    # --------------------------------------------------------------------------- booleans
    def bool_expr(self, depth: int) -> str:
        inner = max(depth - 1, 0)

        def number() -> str:
            return self.int_expr(inner)

        options: list[Callable[[], str]] = [
            lambda: f"{number()} {self.one(('<', '<=', '>', '>=', '==', '!='))} {number()}",
            lambda: f"{self.literal(-20, 5)} <= {number()} < {self.count()}",
            lambda: f"is_power_of_two({number()})",
            lambda: f"{self.use('dense')}[g]",
        ]
        if self.tokens:
            options.append(lambda: f"{self.use('flag')}[{self.one(self.tokens)}]")
            options.append(lambda: f"{self.use('chosen')}[{self.one(self.tokens)} // 16]")
        if depth > 0:
            options += [
                lambda: f"({self.bool_expr(inner)} {self.one(('and', 'or'))} {self.bool_expr(inner)})",
                lambda: f"(not ({self.bool_expr(inner)}))",
            ]
        return self.pick(options)

    def head_condition(self) -> str:
        """Decided once per head: reads only b, h, g, parameters and inputs not indexed by q or k."""
        return self.pick(
            (
                lambda: f"h < H // {self.integer(1, 3)}",
                lambda: f"h % {self.integer(2, 3)} == 0",
                lambda: f"{self.use('dense')}[g]",
                lambda: f"{self.use('reach')}[b] > {self.literal(0, 60)}",
                lambda: f"{self.table(0, 1)} == 1",
            )
        )

    # ------------------------------------------------------------------------------- sets
    def named_set(self) -> str:
        options: list[Callable[[], str]] = [
            lambda: "causal",
            lambda: "all",
            lambda: f"window({self.count()})",
            lambda: f"sink({self.count()})",
            lambda: f"band({self.count()}, {self.literal(0, 9)})",
            lambda: f"same_block({self.size()})",
            lambda: f"same_block({self.size()}, {self.literal(-20, 20)})",
            lambda: f"dilated({self.size()})",
            lambda: f"strided({self.one(('4', '7'))}, {self.integer(0, 4)})",
            lambda: "power_of_two",
            lambda: f"neighborhood({self.integer(1, 9)})",
            lambda: f"neighborhood({self.integer(1, 9)}, {self.integer(1, 3)}, {self.integer(1, 5)})",
            lambda: f"causal_neighborhood({self.integer(1, 9)}, stride = {self.integer(1, 5)})",
            lambda: f"prefix({self.use('reach')}[b])",
            lambda: "none",
            lambda: self.comprehension(1),
        ]
        if "q" in self.tokens:
            options += [
                lambda: f"document({self.use('doc')})",
                lambda: f"document({self.use('ids')})",
                lambda: f"global_tokens({self.use('flag')})",
            ]
        return self.pick(options)

    def comprehension(self, depth: int) -> str:
        if self.draw(st.booleans()):
            return f"{{ {self.bool_expr(min(depth, 2))} }}"
        size = self.size()
        names = f"where u = (q - {self.literal(-5, 9)}) // {size}, w = {self.int_expr(1)} // {size}"
        body = self.one(("u == w", "u - w < 2 and k <= q", "w <= u", "(u + w) % 3 == 0", "0 <= u - w <= 1 or k == 0"))
        return f"{{ {body} {names} }}"

    def set_expr(self, depth: int) -> str:
        if depth == 0:
            return self.named_set()

        def sub() -> str:
            return self.set_expr(depth - 1)

        options: list[Callable[[], str]] = [
            self.named_set,
            lambda: f"({sub()} & {sub()})",
            lambda: f"({sub()} | {sub()})",
            lambda: self.comprehension(depth),
            lambda: f"({sub()} - {sub()})",
            lambda: f"~{sub()}",
            lambda: f"(if {self.head_condition()} then {sub()} else {sub()})",
            lambda: f"(if {self.bool_expr(1)} then {sub()} else {sub()})",
            lambda: self.on_place(depth, f"blocks({self.param(self.one(STEPS))})"),
            lambda: self.coarsened(depth),
            lambda: self.drawn(depth),
        ]
        if "q" in self.tokens:
            options.append(lambda: self.on_place(depth, self.use("order")))
            options.append(lambda: self.on_place(depth, f"segment({self.use('ids')})"))
        return self.pick(options)

    def on_place(self, depth: int, place: str) -> str:
        outer, self.placed = self.placed, True
        inner = self.set_expr(depth - 1)
        self.placed = outer
        return f"(({inner}) on {place})"

    def coarsened(self, depth: int) -> str:
        outer, self.gathered = self.gathered, True
        inner = self.set_expr(depth - 1)
        self.gathered = outer
        block = self.one((str(self.integer(1, 9)), "16", "32", f"({self.integer(1, 9)}, {self.integer(1, 20)})"))
        return f"coarsen({inner}, {block}, {self.one(('any', 'all', 'fraction(0.3)'))})"

    def drawn(self, depth: int) -> str:
        rows = self.one(("query", "head", f"rows({self.integer(2, 20)})"))
        outer, self.gathered = self.gathered, self.gathered or rows != "query"
        among = self.set_expr(depth - 1)
        self.gathered = outer
        keys = self.one(("tokens", f"blocks({self.integer(2, 20)})"))
        seed = self.one(("3", "h", "g - 1", f"{self.use('reach')}[b]"))
        return f"random({self.integer(1, 5)}, {keys}, {rows}, {seed}, among = {among})"

    # ----------------------------------------------------------------------------- scores
    def float_leaf(self) -> str:
        options: list[Callable[[], str]] = [
            lambda: "s",
            lambda: f"{self.use('slope')}[h]",
            lambda: f"{self.use('bias')}[h, clamp(q - k, -4, 4) + 4]",
            lambda: self.one(("0.5", "-1.25", "2.0")),
            lambda: f"({self.int_expr(1)} % 5)",
            lambda: "(k - q) / Nk",
            lambda: f"{self.use('lift')}[q]",
            lambda: f"{self.use('prior')}[k]",
        ]
        return self.pick(options)

    def score_clause(self) -> str:
        return self.pick(
            (
                lambda: "score softcap(s, 2.0)",
                lambda: f"score s - {self.use('slope')}[h] * (q - k)",
                lambda: "score s - exp2(-8 * (h + 1) / H) * abs(q - k)",
                lambda: f"score s + {self.float_leaf()}",
                lambda: f"score s + {self.use('lift')}[q] * {self.use('prior')}[k]",
                lambda: f"score s * sigmoid({self.float_leaf()}) + {self.float_leaf()}",
                lambda: f"score if {self.bool_expr(1)} then s else tanh({self.float_leaf()})",
                lambda: f"score max(s, {self.float_leaf()}) - log(1 + abs(q - k))",
                lambda: "score if q > k then s - log(q - k) else s",
            )
        )

    def clauses(self) -> list[str]:
        lines = []
        if self.draw(st.booleans()):
            lines.append(self.one(("scale 0.25", "scale 1", "scale 1 / (D + h)")))
        if self.draw(st.booleans()):
            lines.append(self.pick((lambda: f"weights sigmoid(s + {self.float_leaf()})", lambda: "weights 1")))
            return lines
        if self.draw(st.booleans()):
            lines.append(self.score_clause())
        if self.draw(st.booleans()):
            lines.append(
                self.pick(
                    (
                        lambda: "softmax with sink 0",
                        lambda: f"softmax with sink {self.use('sinks')}[h]",
                        lambda: f"softmax with sink {self.use('lift')}",
                        lambda: f"softmax with sink 0.5 - {self.use('sinks')}[h] * {self.one(('1', 'h', 'g'))}",
                    )
                )
            )
        return lines

    # ---------------------------------------------------------------------------- programs
    def text(self, pattern: str, clauses: Sequence[str]) -> str:
        if not (clauses or self.inputs or self.params or self.args or self.cross):
            return pattern
        params = [f"{name} : int[h]" if isinstance(x, list) else f"{name} = 1" for name, x in self.params.items()]
        params += [f"{name} : runtime int" for name in self.args]
        lines = [f"input {name} : {INPUTS[name].type}" for name in INPUTS if name in self.inputs]
        lines += ["align start"] * self.cross
        body = "\n".join(f"    {line}" for line in (*lines, *clauses, f"attend {pattern}"))
        return f"attention case{'(' + ', '.join(params) + ')' if params else ''} {{\n{body}\n}}"


@st.composite
def composed_programs(
    draw: st.DrawFn,
    *,
    max_depth: int = 4,
    lengths: Sequence[int] = LENGTHS,
    dims: Sequence[int] = DIMS,
    scores: bool = True,
) -> Case:
    """A random program and one call of it.

    Args:
        max_depth: how deep sets nest.
        lengths: candidates for Nk.
        dims: candidates for D and Dv, repeated where they should be drawn more often.
        scores: also draw `scale`, `score`, `softmax with sink` and `weights` clauses.
    """
    k_len = draw(st.sampled_from(lengths))
    heads, kv_heads = draw(st.sampled_from(HEADS))
    # Whole calls, chunks, single rows, any number of rows under `align start`, and more rows than keys
    # without it, which is legal within `causal`.
    layout = draw(st.sampled_from(("whole", "whole", "whole", "chunk", "chunk", "last", "cross", "long")))
    cross = layout == "cross"
    rows = {"whole": k_len, "chunk": -(-k_len // 3), "last": 1, "cross": 0, "long": k_len + 5}
    if cross:
        rows["cross"] = draw(st.sampled_from(lengths))
    shape = CallShape(
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        rows=rows[layout],
        k_len=k_len,
        dim=draw(st.sampled_from(dims)),
        v_dim=draw(st.sampled_from(dims)),
    )
    writer = _Writer(draw, heads, kv_heads, cross)
    pattern = writer.set_expr(draw(st.integers(0, max_depth)))
    if layout == "long":
        pattern = f"causal & {pattern}"
    clauses = writer.clauses() if scores and draw(st.booleans()) else []
    text = writer.text(pattern, clauses)
    rng = np.random.default_rng(draw(st.integers(0, 3)))
    width = draw(st.sampled_from(WIDTHS))
    inputs = {name: _in_width(INPUTS[name].values(rng, shape), width) for name in INPUTS if name in writer.inputs}
    return Case(text, writer.params, inputs, writer.args, shape)


def tensors(
    case: Case, seed: int = 0, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """q [B, Hq, rows, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] and the inputs of a case.

    `requires_grad` holds for q, k, v and the float inputs, which stay float32.
    """
    generator = torch.Generator().manual_seed(seed)
    s = case.shape
    q, k, v = (
        torch.randn(size, generator=generator).to(dtype).requires_grad_(requires_grad)
        for size in (
            (s.batch, s.heads, s.rows, s.dim),
            (s.batch, s.kv_heads, s.k_len, s.dim),
            (s.batch, s.kv_heads, s.k_len, s.v_dim),
        )
    )
    inputs = {name: torch.from_numpy(values.copy()) for name, values in case.inputs.items()}
    for tensor in inputs.values():
        tensor.requires_grad_(requires_grad and tensor.is_floating_point())
    return q, k, v, inputs
