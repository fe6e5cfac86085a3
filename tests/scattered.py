"""Random programs that a layout search has something to do with, and a fixed list of such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attndsl.program import CallShape
from tests.cases import case, floats
from tests.strategies import Case

Draw = Callable[[st.SearchStrategy[Any]], Any]

# Rows and keys of a call: fewer keys than a period, chunks, single rows, lengths that nothing divides.
LENGTHS = ((1, 1), (1, 5), (7, 7), (1, 90), (33, 33), (50, 50), (23, 70))
SINK = "input sinks : float[h] learnable\n softmax with sink sinks[h]"
BIASED = "input prior : float[b, k] learnable\n input lift : float[b, h, q] learnable\n"


def scattered_sets(draw: Draw) -> str:
    """Text of a set: something local or nothing, and something scattered."""
    period = draw(st.integers(2, 16))
    scattered = [
        f"dilated({period})",
        f"dilated({period}) & {{ -Nk // 3 <= q - k < max({3 * period}, Nk // 4) }}",
        f"strided({period}, {draw(st.integers(0, period - 1))})",
        f"{{ k % {period} >= {period - draw(st.integers(1, 2))} }}",
        f"dilated({draw(st.integers(2, 4))}) on blocks({draw(st.sampled_from((3, 4, 8)))})",
        f"{{ (q - k) % {period} <= 1 }}",
        f"(dilated({period}) | dilated({2 * period}) & window(60))",
        f"(if h < 1 then dilated({period}) else window(20) | strided({period}, 1))",
    ]
    local = ("", "window(12) | ", "same_block(9) | ", "sink(3) | band(5, 2) | ")
    joined = f"({draw(st.sampled_from(local))}{draw(st.sampled_from(scattered))})"
    around = ("causal & {}", "{}", "causal & {} & document(doc)", "{} - window(3)", "{} & {{ q - k < reach[b] }}")
    text: str = draw(st.sampled_from(around)).format(joined)
    return text


@st.composite
def scattered_programs(draw: Draw, lengths: tuple[tuple[int, int], ...] = LENGTHS) -> Case:
    rows, k_len = draw(st.sampled_from(lengths))
    heads, batch = draw(st.sampled_from((((2, 1), 2), ((2, 2), 1), ((4, 2), 1))))
    dim = draw(st.sampled_from((8, 16, 80)))
    said = draw(
        st.sampled_from(
            (
                "",
                "",
                SINK,
                BIASED + "score s + prior[k] * lift[q] - 0.05 * (q - k)",
                BIASED + "weights sigmoid(s + prior[k] + lift[q])",
            )
        )
    )
    pattern = scattered_sets(draw)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = CallShape(batch, heads[0], heads[1], rows, k_len, dim, draw(st.sampled_from((8, 16))))
    inputs: dict[str, Any] = {}
    declared = [said] if said else []
    if "doc" in pattern:
        declared.append("input doc : int[b, k] sorted")
        inputs["doc"] = np.cumsum(rng.random((batch, k_len)) < 0.05, axis=1).astype(np.int32)
    if "reach" in pattern:
        declared.append("input reach : int[b]")
        inputs["reach"] = rng.integers(0, k_len + 1, batch).astype(np.int32)
    if "sinks" in said:
        inputs["sinks"] = rng.standard_normal(heads[0]).astype(np.float32)
    if "prior" in said:
        inputs["prior"] = rng.standard_normal((batch, k_len)).astype(np.float32)
        inputs["lift"] = rng.standard_normal((batch, heads[0], rows)).astype(np.float32)
    text = "attention scattered {\n " + "\n ".join([*declared, f"attend {pattern}"]) + "\n}"
    return Case(text, {}, inputs, {}, shape)


SCATTERED: dict[str, Case] = {
    "dilated": case("{ 0 <= q - k < max(40, Nk // 8) } & dilated(8)", 60, 60, batch=1, dims=(80, 16)),
    "strided": case("causal & (window(12) | dilated(8))", 23, 60, (4, 2), batch=1),
    "columns": case("causal & (window(12) | strided(8, 3))", 50, 50, batch=1),
    "bands": case("{ k <= q and (k // 16 == q // 16 or k % 16 >= 12) }", 50, 50, (2, 2), batch=1),
    "only_columns": case("strided(5, 2)", 23, 50),
    "blocks": case("causal & dilated(4) on blocks(4)", 50, 50, batch=1),
    "shifted": case("causal & { (q - k) % 6 <= 1 }", 40, 40, batch=1),
    "two_periods": case("causal & (window(4) | dilated(8) & window(64) | dilated(13))", 70, 70, (1, 1), batch=1),
    "shorter_than_a_period": case("window(3) | dilated(16)", 7, 7),
    "more_rows": case("causal & (window(3) | dilated(4))", 40, 33, batch=1),
    "cross": case("attention cross { align start\n attend window(5) | dilated(6) }", 50, 33, batch=1),
    "sink": case(
        f"attention sunk {{ {SINK}\n attend causal & (window(5) | dilated(8)) - dilated(16) }}",
        40, 40, batch=1, inputs={"sinks": floats(2)},
    ),
    "score": case(
        f"attention biased {{ {BIASED} score s + prior[k] * lift[q] - 0.05 * (q - k)\n"
        " attend causal & (window(5) | dilated(8)) }",
        20, 50, inputs={"prior": floats(2, 50), "lift": floats(2, 2, 20)},
    ),
    "weights": case(
        f"attention weighed {{ {BIASED} weights sigmoid(s + prior[k] + lift[q])\n attend window(5) | dilated(8) }}",
        40, 40, batch=1, inputs={"prior": floats(1, 40), "lift": floats(1, 2, 40)},
    ),
    "tables": case(
        """attention tables { input near : float[h, 9] learnable
        input whole : float[q, k] learnable
        input sinks : float[h] learnable
        score s + near[h, clamp(q - k, -4, 4) + 4] * whole[q, k]
        softmax with sink sinks[h]
        attend causal & (window(5) | dilated(8)) }""",
        20, 40, batch=1, inputs={"near": floats(2, 9), "whole": floats(20, 40), "sinks": floats(2)},
    ),
    "coarse": case("causal & (window(3) | dilated(8) & coarsen(causal - window(10), 4, any))", 50, 50, batch=1),
    "documents": case(
        """attention articles { input doc : int[b, k] sorted
        attend causal & document(doc) & (window(9) | dilated(5)) }""",
        inputs={"doc": np.sort(np.random.default_rng(3).integers(0, 5, (2, 70)), axis=1).astype(np.int32)},
    ),
}  # fmt: skip
