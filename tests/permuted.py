"""Programs that lie in a relation of unsorted data: a fixed list, and random ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attndsl.program import CallShape
from tests.cases import case, floats
from tests.strategies import Case

Draw = Callable[[st.SearchStrategy[Any]], Any]

LENGTHS = ((1, 1), (1, 40), (7, 7), (33, 33), (70, 70), (23, 70))
RNG = np.random.default_rng(17)


def ids(*size: int, most: int = 4) -> np.ndarray[Any, Any]:
    return RNG.integers(-1, most, size).astype(np.int32)


def order(*size: int) -> np.ndarray[Any, Any]:
    return RNG.permuted(np.broadcast_to(np.arange(size[-1], dtype=np.int32), size), axis=-1)


DOC, PI = "input doc : int[b, k]", "input pi : int[k]"

PERMUTED: dict[str, Case] = {
    "documents": case(f"attention a {{ {DOC}\n attend causal & document(doc) }}", inputs={"doc": ids(2, 70)}),
    "both ways": case(f"attention a {{ {DOC}\n attend document(doc) }}", inputs={"doc": ids(2, 70)}),
    "chunk": case(
        f"attention a {{ {DOC}\n attend causal & document(doc) }}", 23, 70, (4, 2), (80, 16), inputs={"doc": ids(2, 70)}
    ),
    "more rows": case(f"attention a {{ {DOC}\n attend causal & document(doc) }}", 90, 70, inputs={"doc": ids(2, 70)}),
    "one token": case(f"attention a {{ {DOC}\n attend document(doc) }}", 1, 1, inputs={"doc": ids(2, 1)}),
    "one value": case(f"attention a {{ {DOC}\n attend causal & document(doc) }}", inputs={"doc": ids(2, 1)}),
    "window": case(f"attention a {{ {DOC}\n attend window(9) & document(doc) & causal }}", inputs={"doc": ids(2, 70)}),
    "band and sink": case(
        f"attention a {{ {DOC}\n input x : float[h] learnable\n softmax with sink x[h]\n"
        " attend document(doc) & (sink(9) | band(8, 3)) }", inputs={"doc": ids(2, 70), "x": floats(2)},
    ),
    "empty rows": case(
        f"attention a {{ {DOC}\n attend document(doc) & causal - window(30) }}", batch=1, inputs={"doc": ids(1, 70)}
    ),
    "heads": case(
        "attention a { input doc : int[b, h, k]\n attend causal & document(doc) }", heads=(2, 2), batch=1,
        inputs={"doc": ids(1, 2, 70)},
    ),
    "key heads": case(
        "attention a { input doc : int[g, k]\n attend { doc[g, q] == doc[g, k] and q - k < 40 } }", heads=(4, 2),
        inputs={"doc": ids(2, 70)},
    ),
    "blocks of tokens": case(
        "attention a { input part : int[b, k/8]\n attend causal & { part[q // 8] == part[k // 8] } }",
        inputs={"part": ids(2, 9)},
    ),
    "large ids": case(
        f"attention a {{ {DOC}\n attend causal & document(doc) }}", batch=1,
        inputs={"doc": np.array([[-(1 << 31), (1 << 31) - 1, 7, 0, -1]], np.int32)[:, RNG.integers(0, 5, 70)]},
    ),
    "window on": case(f"attention a {{ {PI}\n attend causal & window(20) on pi }}", inputs={"pi": order(70)}),
    "blocks on": case(
        f"attention a {{ {PI}\n attend causal & same_block(20) on pi }}", 50, 70, inputs={"pi": order(70)}
    ),
    "neighbours on": case(f"attention a {{ {PI}\n attend band(9, 4) on pi }}", 50, 70, inputs={"pi": order(70)}),
    "no permutation": case(
        f"attention a {{ {PI}\n attend (window(3) on pi) & dilated(2) }}", inputs={"pi": ids(70, most=9)}
    ),
    "cross": case(
        """attention a { align start  input qdoc : int[b, q]  input kdoc : int[b, k]
        attend { qdoc[q] == kdoc[k] } }""",
        90, 70, inputs={"qdoc": ids(2, 90), "kdoc": 2 * ids(2, 70)},
    ),
    "cross and near": case(
        """attention a { align start  input qdoc : int[b, q]  input kdoc : int[b, k]
        attend { qdoc[q] == kdoc[k] and -9 < q - k < 30 } }""",
        40, 70, inputs={"qdoc": 3 * ids(2, 40), "kdoc": 2 * ids(2, 70)},
    ),
    "rows of a call": case(
        """attention a { input kind : int[b, q]  input doc : int[b, k]
        attend causal & { kind[q] == doc[k] } }""",
        40, 70, inputs={"kind": ids(2, 40), "doc": ids(2, 70)},
    ),
    "two conditions": case(
        f"attention a {{ {DOC}\n input part : int[b, k] sorted\n attend causal & document(doc) & document(part) }}",
        inputs={"doc": ids(2, 70), "part": np.sort(ids(2, 70), axis=1)},
    ),
    "score": case(
        f"""attention a {{ {DOC}
        input slope : float[h] learnable
        input prior : float[b, k]
        input lift : float[b, h, q]
        score s - slope[h] * (q - k) + prior[k] * lift[q] + 0.1 * doc[q]
        attend causal & document(doc) }}""",
        40, 70, inputs={"doc": ids(2, 70), "slope": floats(2), "prior": floats(2, 70), "lift": floats(2, 2, 40)},
    ),
    "weights": case(
        f"attention a {{ {DOC}\n input x : float[h] learnable\n weights sigmoid(s + x[h])\n attend document(doc) }}",
        inputs={"doc": ids(2, 70), "x": floats(2)},
    ),
    "runtime": case(
        f"attention a(span : runtime int) {{ {DOC}\n attend causal & document(doc) & window(span) }}",
        inputs={"doc": ids(2, 70)}, args={"span": 11},
    ),
    "reach": case(
        f"attention a {{ {DOC}\n input reach : int[b]\n attend document(doc) & {{ 0 <= q - k < reach[b] }} }}",
        inputs={"doc": ids(2, 70), "reach": np.array([5, (1 << 31) - 1], np.int32)},
    ),
}  # fmt: skip


@st.composite
def permuted_programs(draw: Draw, lengths: tuple[tuple[int, int], ...] = LENGTHS) -> Case:
    """A relation of unsorted data, and other sets around it."""
    rows, k_len = draw(st.sampled_from(lengths))
    heads, batch = draw(st.sampled_from((((2, 1), 2), ((2, 2), 1), ((4, 2), 2))))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dims, at, size = draw(
        st.sampled_from(
            (
                ("b, k", "", [batch, k_len]), ("k", "", [k_len]), ("g, k", "g, ", [heads[1], k_len]),
                ("b, h, k", "h, ", [batch, heads[0], k_len]), ("b, k", "", [1, k_len]), ("b, k", "", [batch, 1]),
            )
        )
    )  # fmt: skip
    most = draw(st.sampled_from((1, 3, 9, k_len)))
    values = rng.permuted(np.broadcast_to(np.arange(size[-1]), size), axis=-1) if most == k_len else None
    values = rng.integers(-1, most, size) if values is None else values
    x, y = (f"ids[{at}{p}]" for p in "qk")
    near = draw(st.integers(1, 12))
    relation = draw(
        st.sampled_from(
            (
                f"{{ {x} == {y} }}", f"{{ {x} == {y} }}", f"{{ {y} - 1 == {x} }}", f"{{ 0 <= {x} - {y} < {near} }}",
                f"{{ {x} // {near} == {y} // {near} }}", f"{{ {x} == {y} or {x} == {y} + 2 }} & {{ {x} - {y} < 9 }}",
                f"{{ {y} <= {x} + 1 and {x} <= {y} }}",
            )
        )
    )  # fmt: skip
    around = draw(
        st.lists(
            st.sampled_from(
                (
                    "causal", "causal", f"window({near})", f"band({near}, 4)", f"(sink(3) | window({near}))",
                    "dilated(3)", "~window(4)", "{ q - k < reach[b] }", "(if h < 1 then causal else all)",
                    f"(window({near}) | strided(5))", "{ 2 * (q - k) < 30 }", "{ k < Nk - 2 and q < Nq - 1 }",
                    f"{{ {x} != 1 }}", f"{{ k <= {near} or {y} > 1 }}", "coarsen(causal, 4, any)",
                )
            ),
            max_size=3,
        )
    )  # fmt: skip
    said = draw(st.sampled_from(("", "", "softmax with sink lift[h]", "score s + lift[h] * (q - k) + 0.1 * " + y)))
    declared = [f"input ids : int[{dims}]", "input reach : int[b]", "input lift : float[h] learnable", said]
    inputs = {
        "ids": values.astype(np.int32),
        "reach": rng.integers(0, k_len + 1, batch).astype(np.int32),
        "lift": (0.1 * rng.standard_normal(heads[0])).astype(np.float32),
    }
    text = "attention a {\n " + "\n ".join([*declared, f"attend {' & '.join([relation, *around])}"]) + "\n}"
    dim = draw(st.sampled_from((8, 80)))
    return Case(text, {}, inputs, {}, CallShape(batch, heads[0], heads[1], rows, k_len, dim, 16))
