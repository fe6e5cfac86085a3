"""A fixed list of programs, each with one call: what the kernels of every backend are tested on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attndsl.program import CallShape
from tests.rules import t5_bucket
from tests.strategies import Case


def case(
    text: str, rows: int = 70, k_len: int = 70, heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (16, 16),
    *, batch: int = 2, inputs: Mapping[str, Any] | None = None, args: Mapping[str, int] | None = None, **params: Any,
) -> Case:  # fmt: skip
    arrays = {name: np.asarray(values) for name, values in (inputs or {}).items()}
    return Case(text, params, arrays, args or {}, CallShape(batch, *heads, rows, k_len, *dims))


RNG = np.random.default_rng(0)


def ints(low: int, high: int, *size: int) -> np.ndarray[Any, Any]:
    return RNG.integers(low, high, size).astype(np.int32)


def floats(*size: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(size).astype(np.float32)


CASES: dict[str, Case] = {
    "one_token": case("causal", 1, 1),
    "window": case("causal & window(40)", 100, 100, batch=1),
    "streaming": case("causal & (sink(4) | window(20))", 70, 70, (4, 2)),
    "chunk": case("causal & window(30)", 13, 70, (4, 2), (40, 16)),
    "last_row": case("causal & (sink(3) | window(9))", 1, 90, (6, 2)),
    "more_rows": case("causal", 40, 33),
    "none": case("none", 20, 20),
    "empty_rows": case("causal - window(40)", 70, 70),
    "dilated": case("causal & dilated(5)", 70, 70, dims=(16, 80)),
    "blocks": case("causal on blocks(5)", 70, 70, dims=(80, 40)),
    "shifted_blocks": case("same_block(24, 7)", 70, 70, dims=(96, 24)),
    "neighborhood": case("neighborhood(9)", 70, 70),
    "power_of_two": case("causal & power_of_two", 70, 70),
    "wide": case("causal & window(20)", 40, 40, (1, 1), (192, 256), batch=1),
    "small": case("causal", 40, 40, dims=(8, 8)),
    "block_diffusion": case(
        """{ bq == bk and zq == zk or bq > bk and not zq and zk or bq >= bk and zq and zk
             where n = Nk // 2, zq = q >= n, zk = k >= n,
                   bq = (if zq then q - n else q) // 7, bk = (if zk then k - n else k) // 7 }"""
    ),
    "coarsen": case("causal & coarsen(dilated(40), 8, any)"),
    "coarsen_share": case("causal & coarsen(causal & window(30) | dilated(9), (16, 12), fraction(0.4))"),
    "coarsen_data": case(
        """attention grown { input flag : bool[b, k]
        attend causal & (coarsen({ flag[k] and (flag[q] or h == 0) }, (9, 7), any) | window(3)) }""",
        heads=(4, 2), rows=50, inputs={"flag": RNG.random((2, 70)) < 0.1},
    ),
    "random": case(
        "causal & (window(3) | random(2, of = blocks(8), per = rows(6), seed = h % 2) | random(1, tokens, query, 5))",
        heads=(4, 2), rows=50,
    ),
    "segment": case(
        """attention joined { input doc : int[b, k]
        attend causal & (window(9) | sink(2) on segment(doc)) }""",
        rows=50, inputs={"doc": np.repeat(ints(0, 2, 2, 14), 5, axis=1)},
    ),
    "documents": case(
        "attention documents { input doc : int[b, k] sorted\n attend causal & document(doc) }",
        inputs={"doc": np.sort(ints(0, 5, 2, 70), axis=1)},
    ),
    "documents_both_ways": case(
        """attention d { input doc : int[b, h, k] sorted
        attend document(doc) & window(50) | { doc[k] == 0 and q - k < 60 } }""",
        rows=50, heads=(4, 2), inputs={"doc": np.sort(ints(0, 5, 2, 4, 70), axis=2)},
    ),
    "cross_documents": case(
        """attention cross { align start  input qdoc : int[b, q] sorted  input kdoc : int[b, k] sorted
        attend { qdoc[q] == kdoc[k] } }""",
        rows=90, inputs={"qdoc": np.sort(ints(0, 5, 2, 90), axis=1), "kdoc": np.sort(ints(0, 5, 2, 70), axis=1)},
    ),
    "prefix": case(
        "attention prefix_lm { input P : int[b]\n attend causal | prefix(P[b]) }",
        inputs={"P": np.array([0, 45], np.int32)},
    ),
    "duo": case(
        "attention duo { input full : bool[g]\n attend causal & (if full[g] then all else sink(3) | window(5)) }",
        heads=(4, 2), inputs={"full": [True, False]},
    ),
    "until": case(
        "attention nats { input until : int[b, h, k]\n attend causal & { q <= until[k] } }",
        heads=(2, 2), inputs={"until": ints(0, 70, 2, 2, 70)},
    ),
    "distance_of_lengths": case("{ abs(Nk - 90) + max(k, Nk - 60) > q and not is_power_of_two(Nk - 6) }"),
    "runtime": case(
        "attention local(span : runtime int) { attend causal & window(span) }", args={"span": 25}
    ),
    "table": case(
        "attention spans(span : int[h]) { attend causal & window(span[h]) }", heads=(4, 2), span=[1, 20, 3, 90]
    ),
    "permuted": case(
        "attention mixed { input pi : int[k]\n attend causal & window(20) on pi }",
        inputs={"pi": RNG.permutation(70).astype(np.int32)},
    ),
    "tree": case(
        "attention tree { input ancestor : bool[b, q, 8]\n attend { k < Nk - 8 or ancestor[q, k - Nk + 8] } }",
        rows=8, inputs={"ancestor": RNG.random((2, 8, 8)) < 0.5},
    ),
    "align_start": case(
        "attention cross { input len : int[b]\n align start\n attend { k < len[b] } }",
        rows=50, k_len=33, inputs={"len": np.array([33, 0], np.int32)},
    ),
    "softcap": case("attention capped { score softcap(s, 2.0)\n attend causal }"),
    "alibi": case("attention alibi { score s - exp2(-8 * (h + 1) / H) * (q - k)\n attend causal }", heads=(4, 2)),
    "bias": case(
        """attention biased { input bias : float[h, 9] learnable
        score s + bias[h, clamp(q - k, -4, 4) + 4]
        attend all }""",
        inputs={"bias": floats(2, 9)},
    ),
    "t5": case(
        """attention t5 { input bucket : int[257]
        input bias : float[h, 32] learnable
        scale 1
        score s + bias[h, bucket[clamp(k - q, -128, 128) + 128]]
        attend all }""",
        inputs={"bucket": np.array([t5_bucket(x) for x in range(-128, 129)], np.int32), "bias": floats(2, 32)},
    ),
    "rows_and_keys": case(
        """attention lifted { input lift : float[b, h, q]
        input prior : float[b, k]
        score s + lift[q] * prior[k]
        attend causal }""",
        rows=20, inputs={"lift": floats(2, 2, 20), "prior": floats(2, 70)},
    ),
    "guarded": case("attention guarded { score if q > k then s - log(q - k) else s\n attend causal }"),
    "sink": case(
        """attention gpt_oss { input sinks : float[h] learnable
        softmax with sink sinks[h]
        attend causal - window(30) }""",
        inputs={"sinks": np.array([0.5, -60.0], np.float32)},
    ),
    "sink_of_row": case(
        """attention gated { input lift : float[b, h, q]
        softmax with sink lift
        attend causal & window(30) }""",
        rows=20, inputs={"lift": floats(2, 2, 20)},
    ),
    "weights": case(
        """attention sigmoids { input bias : float[h]
        weights sigmoid(s + bias[h])
        attend causal & window(33) }""",
        inputs={"bias": floats(2)},
    ),
    "counted": case("attention sums { weights 1\n attend causal }"),
    "negative_scale": case("attention negated { scale -1\n attend causal }"),
    "scale": case("attention scaled { scale 1 / (D + h)\n attend causal & window(33) }"),
}  # fmt: skip
