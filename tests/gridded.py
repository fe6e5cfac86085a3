"""Random programs on grids, and a fixed list of such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attndsl.program import CallShape
from tests.cases import case, floats
from tests.strategies import Case

Draw = Callable[[st.SearchStrategy[Any]], Any]


def _along(draw: Draw) -> str:
    """Text of a set along one axis."""
    window, stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return str(
        draw(
            st.sampled_from(
                (
                    f"neighborhood({window})",
                    f"neighborhood({window}, {dilation}, {min(stride, window)})",
                    f"causal_neighborhood({window}, {dilation})",
                    "causal",
                    f"same_block({window}, {stride})",
                    f"neighborhood({window}) on blocks({stride + 1})",
                    f"band({window}, {stride})",
                    f"dilated({dilation})",
                    "{ k < Nk // 2 or k == q }",
                )
            )
        )
    )


def gridded_sets(draw: Draw, names: list[str]) -> str:
    """Text of a set: products, and what they are joined with."""

    def product() -> str:
        axes = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
        return " & ".join(f"{_along(draw)} on {axis}" for axis in axes)

    last = names[-1]
    others = (
        f"{{ q.{last} == k.{last} }}", "off_grid", "{ k == q }", f"{{ q.{names[0]} == k.{names[0]} and k.{last} < 2 }}",
        f"~(causal on {last})",
    )  # fmt: skip
    text = draw(
        st.sampled_from(
            ("{}", "{}", "{} | {}", "({}) - ({})", "({}) & causal", "if h < 1 then {} else {}", "({}) & doc")
        )
    )
    parts = [product(), draw(st.sampled_from((*others, product())))]
    return str(text.format(*parts)).replace("& doc", "& document(doc)")


@st.composite
def gridded_programs(draw: Draw) -> Case:
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=2))
    names = ["t", "y", "x"][-len(sizes) - 1 :]
    open_size = draw(st.sampled_from((None, None, 3)))
    declared = [names[0] + (f"[{open_size}]" if open_size else "")]
    declared += [f"{name}[{size}]" for name, size in zip(names[1:], sizes, strict=True)]
    first = draw(st.sampled_from((0, 0, 3)))
    order = ""
    if draw(st.integers(0, 3)) == 0:
        tiles = [1] + [draw(st.sampled_from([t for t in (1, 2, 3) if size % t == 0])) for size in sizes]
        order = f" in tiles({', '.join(map(str, tiles))})"
    pattern = gridded_sets(draw, names)
    k_len = draw(st.sampled_from((1, 7, 30, 47)))
    rows = draw(st.sampled_from((k_len, k_len, -(-k_len // 3))))
    heads, batch = draw(st.sampled_from((((2, 1), 1), ((2, 2), 1), ((4, 2), 1))))
    said = draw(st.sampled_from(("", "", "softmax with sink sinks[h]", "score s - 0.1 * abs(q.{0} - k.{0})")))
    inputs: dict[str, Any] = {}
    lines = [f"axes {', '.join(declared)}{f' from {first}' if first else ''}{order}"]
    if "doc" in pattern:
        lines.append("input doc : int[b, k]")
        inputs["doc"] = np.random.default_rng(k_len).integers(0, 3, (batch, k_len)).astype(np.int32)
    if "sinks" in said:
        lines.append("input sinks : float[h] learnable")
        inputs["sinks"] = np.linspace(-1, 1, heads[0]).astype(np.float32)
    lines += [said.format(names[-1]), f"attend {pattern}"]
    text = "attention gridded {\n " + "\n ".join(line for line in lines if line) + "\n}"
    shape = CallShape(batch, heads[0], heads[1], rows, k_len, draw(st.sampled_from((8, 80))), 8)
    return Case(text, {}, inputs, {}, shape)


def _grid(axes: str, pattern: str, *said: str) -> str:
    return "attention grid {\n " + "\n ".join([f"axes {axes}", *said, f"attend {pattern}"]) + "\n}"


GRIDDED: dict[str, Case] = {
    "image": case(_grid("y[6], x[7]", "neighborhood(3) on (y, x)"), 42, 42, batch=1),
    "open": case(_grid("y, x[5]", "neighborhood(3) on (y, x)"), 17, 33, (4, 2), (80, 16), batch=1),
    "dilated": case(_grid("y[7], x[6]", "neighborhood(2, 2) on (y, x)"), 42, 45, batch=1),
    "video": case(
        _grid("t, y[3], x[4] from 5", "causal_neighborhood(2) on t & neighborhood(3) on (y, x) | off_grid"), 20, 45,
        batch=1,
    ),
    "axial": case(_grid("y, x[6]", "{ q.y == k.y or q.x == k.x }"), 31, 31, batch=1),
    "heads": case(_grid("y, x[6]", "if h < H // 2 then { q.y == k.y } else { q.x == k.x }"), 31, 31, batch=1),
    "windows": case(_grid("y[6], x[6]", "same_block(3, 1) on (y, x)"), 30, 36, batch=1),
    "order": case(_grid("t, y[4], x[6] in tiles(1, 2, 3)", "neighborhood(3) on x & causal on t"), 40, 40, batch=1),
    "full": case(_grid("t, y[4], x[4]", "{ k.t <= q.t } & { q.x // 2 == k.x // 2 }"), 60, 60, batch=1),
    "line": case(_grid("x from 3", "neighborhood(5, 2) on x | off_grid"), 40, 40, batch=1),
    "documents": case(
        _grid("y, x[6]", "neighborhood(3) on (y, x) & document(doc)", "input doc : int[b, k]"), 33, 33,
        inputs={"doc": np.random.default_rng(1).integers(0, 3, (2, 33)).astype(np.int32)},
    ),
    "sink": case(
        _grid("y[4], x[6] from 2", "neighborhood(3) on (y, x)", "input sinks : float[h] learnable",
              "softmax with sink sinks[h]"), 30, 30, batch=1, inputs={"sinks": floats(2)},
    ),
    "weights": case(_grid("y, x[6]", "neighborhood(3) on (y, x)", "weights sigmoid(s)"), 25, 25, batch=1),
    "aligned": case(_grid("y, x[6]", "neighborhood(3) on (y, x)", "align start"), 25, 40, batch=1),
    "one_token": case(_grid("y, x[6]", "neighborhood(3) on (y, x)"), 1, 1, batch=1),
    "last_row": case(_grid("y, x[6]", "neighborhood(3) on (y, x)"), 1, 40, (6, 2), batch=1),
}  # fmt: skip
