"""Learnable inputs that q and k read together, on the Triton backend: bias tables against the oracle's gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from attndsl.blockruns import Reader
from attndsl.grammar import load
from attndsl.learned import Learned, Over, on_diagonal
from attndsl.plan import Tiling
from attndsl.program import CallShape, Const, Read, reads
from attndsl.relation import build_relation
from attndsl.runs import Side, TileKind
from attndsl.runtime import triton_learned
from attndsl.score import learnable_reads
from attndsl.tiles import tile_runs
from tests.accuracy import examples
from tests.cases import CASES, case, floats, ints
from tests.gradients import expected_gradients, judge, upstream
from tests.strategies import Case, composed_programs, tensors
from tests.test_backward_triton import SMALL, runner

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

BIASES: dict[str, Case] = {
    "shifted": case(
        """attention biased { input bias : float[h, 9] learnable
        score softcap(s + bias[h, clamp(k - q, -4, 4) + 4], 2.0)
        attend causal & window(30) }""",
        40, 40, inputs={"bias": floats(2, 9)}, batch=1,
    ),
    "chunk": case(
        """attention biased { input bucket : int[41]
        input bias : float[h, 5] learnable
        score s + bias[h, bucket[clamp(k - q, -20, 20) + 20]]
        attend all }""",
        20, 40, heads=(2, 2), inputs={"bucket": ints(0, 5, 41), "bias": floats(2, 5)}, batch=1,
    ),
    "cross": case(
        """attention cross { input bias : float[9] learnable
        align start
        score s * bias[clamp(q - k, -4, 4) + 4]
        attend { k <= q + 10 } }""",
        40, 33, heads=(1, 1), inputs={"bias": floats(9)},
    ),
    "weights": case(
        """attention sigmoids { input bias : float[b, 9] learnable
        weights sigmoid(s + bias[b, abs(q - k) // 8])
        attend causal | sink(2) }""",
        20, 40, heads=(1, 1), inputs={"bias": floats(2, 9)},
    ),
    "over_tokens": case(
        """attention far { input near : float[g, k] learnable
        score s + near[g, q - k]
        attend causal - window(5) }""",
        33, 40, inputs={"near": floats(1, 40)}, batch=1,
    ),
    "full": case(
        "attention full { input bias : float[h, q, k] learnable\n score s + bias[h, q, k]\n attend causal }",
        20, 40, inputs={"bias": floats(2, 20, 40)},
    ),
    "full_of_batch": case(
        "attention full { input bias : float[b, q, k] learnable\n score s + bias[b, q, k]\n attend window(9) }",
        40, 40, inputs={"bias": floats(2, 40, 40)},
    ),
    "shared_by_all": case(
        "attention full { input bias : float[q, k] learnable\n weights bias[q, k]\n attend all }",
        20, 33, inputs={"bias": floats(20, 33)},
    ),
    "image": case(
        """attention swin { input bias : float[h, 9, 9] learnable
        score s + bias[h, q // 5 - k // 5 + 4, q % 5 - k % 5 + 4]
        attend all }""",
        25, 25, inputs={"bias": floats(2, 9, 9)},
    ),
    "kinds": case(
        """attention kinds { input kind : int[b, k]
        input bias : float[g, 5, 5] learnable
        score softcap(s * bias[g, kind[q], kind[k]], 2.0)
        attend causal & (window(9) | sink(3)) }""",
        40, 40, heads=(2, 1), inputs={"kind": ints(-1, 6, 1, 40), "bias": floats(1, 5, 5)}, batch=1,
    ),
    "blocks": case(
        """attention blocks { input bias : float[h, q/16, k/16] learnable
        input width : int[h]
        score s + bias[h, q // 16, k // 16]
        attend causal & window(width[h]) }""",
        40, 40, inputs={"bias": floats(2, 3, 3), "width": np.array([3, 60], np.int32)},
    ),
    "two_ways": case(
        """attention both { input bias : float[h, q, k] learnable
        score s + bias[h, q, k] * bias[h, q, 3]
        attend causal }""",
        33, 33, inputs={"bias": floats(2, 33, 33)}, batch=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_program(name: str) -> None:
    judge(runner(), BIASES[name], torch.float32)


@pytest.mark.parametrize("name", ["shifted", "image"])
def test_default_tiles(name: str) -> None:
    judge(runner(None), BIASES[name], torch.float16)


@pytest.mark.parametrize("name", ["image", "blocks"])
def test_strips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for few tiles at a time changes nothing; the last strip is not whole."""
    monkeypatch.setattr(triton_learned, "STRIP", 3 * 12 * 16 * 16)
    monkeypatch.setattr(triton_learned, "PROGRAMS", 1)
    judge(runner(Tiling(16, 16)), BIASES[name], torch.float32)


@pytest.mark.parametrize("rows, k_len", [(0, 9), (5, 0), (1, 1), (1, 40)])
def test_degenerate(rows: int, k_len: int) -> None:
    text = """attention degenerate { input near : float[h, 9] learnable
        input whole : float[h, q, k] learnable
        score s + near[h, clamp(q - k, -4, 4) + 4] + whole[h, q, k]
        attend causal }"""
    judge(
        runner(),
        case(text, rows, k_len, inputs={"near": floats(2, 9), "whole": floats(2, rows, k_len)}, batch=1),
        torch.float32,
    )


def test_nothing_is_visited() -> None:
    text = "attention nothing { input whole : float[q, k] learnable\n score s + whole[q, k]\n attend none }"
    judge(runner(), case(text, 9, 9, inputs={"whole": floats(9, 9)}), torch.float32)


def test_broadcast() -> None:
    """The gradient of a dimension of size 1 is the sum over what it stands for."""
    full = BIASES["full"]
    program = full.load()
    q, k, v, inputs = tensors(full)
    narrow = inputs["bias"][:, :1]
    dout, dlse = upstream(q, v)
    _, (found,) = runner()(program, dout, dlse, q, k, v, {"bias": narrow}, {}, None)
    wide = {"bias": narrow.expand(2, 20, 40)}
    _, (expected,) = expected_gradients(program, q, k, v, wide, {}, dout, dlse)
    assert found is not None and expected is not None
    torch.testing.assert_close(found.double(), expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["shifted", "full"])
def test_two_runs_agree_to_the_bit(name: str) -> None:
    chosen = BIASES[name]
    program = chosen.load()
    q, k, v, inputs = tensors(chosen)
    dout, dlse = upstream(q, v)
    (first,), (again,) = (runner(None)(program, dout, dlse, q, k, v, inputs, {}, None)[1] for _ in range(2))
    assert first is not None and again is not None and torch.equal(first, again)


# ------------------------------------------------------------------------- random programs

INDICES = (
    "near[h, clamp({a} - {b}, -{n}, {n}) + {n}]",
    "near[h, abs({a} - {b}) // {n}]",
    "near[g, ({a} - {b}) % {n}]",
    "table[h, {a} // {n}, {b} % {n}]",
    "table[b, {a} % {n}, ({a} - {b}) % {n}]",
    "table[0, b, {a} // {n} - {b} // {n}]",
    "whole[h, q, k]",
)


@given(
    case=composed_programs(max_depth=2, lengths=(1, 16, 33), dims=(8,)), index=st.sampled_from(INDICES),
    n=st.integers(1, 9), turned=st.booleans(), capped=st.booleans(),
)  # fmt: skip
@examples(4)
def test_random_biases(case: Case, index: str, n: int, turned: bool, capped: bool) -> None:
    """A bias in the pattern of a random program."""
    read = index.format(a="k" if turned else "q", b="q" if turned else "k", n=n)
    program = case.load()
    if program.branch.score is not None or program.branch.weights is not None or "attend" not in case.text:
        reject()
    score = f"softcap(s + {read}, 3.0)" if capped else f"s + {read}"
    shape = case.shape
    sizes = {"near": (7,), "table": (4, 5), "whole": (shape.rows, shape.k_len)}
    declared = {"near": "float[h, 7]", "table": "float[h, 4, 5]", "whole": "float[h, q, k]"}
    name = read.partition("[")[0]
    text = case.text.replace("attend", f"input {name} : {declared[name]} learnable\n score {score}\n attend", 1)
    inputs = {**case.inputs, name: floats(shape.heads, *sizes[name])}
    judge(runner(SMALL), replace(case, text=text, inputs=inputs), torch.float32)


# ---------------------------------------------------------------------------- classification


CALL = CallShape(1, 1, 1, 40, 40, 16, 16)


def reads_of(index: str) -> Read:
    text = (
        f"attention a {{ input t : float[1000] learnable\n input m : int[1000]\n score s + t[{index}]\n attend all }}"
    )
    program = load(text).program
    assert program.branch.score is not None
    (read,) = learnable_reads(program.branch.score, program)
    return read


@pytest.mark.parametrize(
    "index", ["q - k", "4 + q - k", "2 * (k - q) + 7", "m[q - k]", "clamp(q - 3 - k, 0, 9)", "(q - k) // 3",
              "(k - q + 70) % 5", "if q > k then q - k else 0", "m[m[k - q] + q - k]"],
)  # fmt: skip
def test_indices_of_diagonals(index: str) -> None:
    """They are the same when written at q - k and 0."""
    read = reads_of(index)
    found = on_diagonal(read)
    assert found is not None and not reads(found, "k")
    q, k = np.meshgrid(np.arange(20), np.arange(20))
    reader = Reader(load("attention a { input m : int[1000]\n attend all }").program, CALL, {"m": ints(0, 9, 1000)}, {})
    values = [reader.value(x.index[0], {"q": at, "k": k}) for x, at in ((read, q), (found, q - k))]
    assert np.array_equal(values[0], values[1])


@pytest.mark.parametrize(
    "index", ["q + k", "q // 2 - k // 2", "m[q] - m[k]", "q - 2 * k", "q * k", "Nk - k + q % 2", "min(q, k)"]
)
def test_indices_of_pairs(index: str) -> None:
    assert on_diagonal(reads_of(index)) is None


@pytest.mark.parametrize("name", ["window", "streaming", "dilated", "shifted_blocks", "neighborhood", "all"])
def test_runs_of_diagonals(name: str) -> None:
    """They are the visited tiles, each once, seen from the diagonals."""
    visited: list[tuple[int, int, TileKind]]
    program = CASES[name].load() if name in CASES else load("all").program
    block = 16
    for rows, k_len in ((70, 70), (33, 70), (1, 40), (16, 64)):
        reader = Reader(program, CallShape(1, 1, 1, rows, k_len, 16, 16), {}, {})
        q_tiles, k_tiles = -(-rows // block), -(-k_len // block)
        found: dict[Side, set[tuple[int, int]]] = {}
        for side in (Side.QUERY, Side.DIAGONAL):
            runs = tile_runs(build_relation(program, (1, 1)), block, block, side)
            visited = []
            variables = reader.variables(np.asarray(0), np.asarray(0))
            own_tiles = range(q_tiles) if side is Side.QUERY else range(1 - k_tiles, q_tiles)
            for own in own_tiles:
                here = variables | {side.value: np.asarray(own)}
                for run in runs.full + runs.partial:
                    first, count = int(reader.value(run.first, here)), int(reader.value(run.count, here))
                    visited += [(own, first + i * run.step, run.kind) for i in range(count)]
            if side is Side.DIAGONAL:
                visited = [(q_tile, q_tile - diagonal, kind) for diagonal, q_tile, kind in visited]
            assert len(visited) == len(set(visited))
            found[side] = {(q_tile, k_tile) for q_tile, k_tile, _ in visited}
        assert found[Side.QUERY] <= found[Side.DIAGONAL]
        if name not in ("dilated", "shifted_blocks"):  # Their loops may be wider than what is visited.
            assert found[Side.QUERY] == found[Side.DIAGONAL]


def test_over() -> None:
    assert Learned(reads_of("q - k"), Const(1.0), False).over is Over.DIAGONALS
    assert Learned(reads_of("q + k"), Const(1.0), False).over is Over.PAIRS
    assert Learned(reads_of("q + 3"), Const(1.0), False).over is Over.KEYS


# ------------------------------------------------------------------------------------ compiled


def test_default_tilings_do_not_spill() -> None:
    """Compiled in a process of its own: here Triton interprets."""
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(root)])
    command = [sys.executable, "-m", "tests.test_learned"]
    done = subprocess.run(command, text=True, capture_output=True, cwd=root, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    stacks = json.loads(done.stdout)
    assert len(stacks) == 2
    assert not any(stacks.values()), stacks


def compiled_stacks() -> dict[str, int]:
    """Bytes of stack, which is what spills take, of the kernels at default tilings."""
    from attndsl.codegen.triton_learned import diagonals_source, pairs_sources
    from attndsl.plan import DType, Spec, backward_plan, forward_plan, learning_plan
    from attndsl.runtime.assembly import meta_tensors
    from attndsl.runtime.build import compile_kernel, parameters
    from attndsl.runtime.triton_backward import backward_parameters
    from attndsl.runtime.triton_launch import kernel_source
    from attndsl.tile_sizes import backward_tilings, default_tiling, learning_tiling
    from tests.offline import _resources

    text = """attention both { input near : float[h, 257] learnable
        input whole : float[h, q, k] learnable
        score s + near[h, clamp(q - k, -128, 128) + 128] + whole[h, q, k]
        attend causal & window(512) }"""
    program, found = load(text).program, {}
    integers = ("first_cell", "cells", "all_cells", "visits", "portions", "batch", "stride_portion")
    # The device with the fewest registers to spare.
    spec = Spec(8, 2, 64, 64, DType.BFLOAT16, "cuda:80")
    plan = backward_plan(program, spec, *backward_tilings(spec))
    tensors = meta_tensors(forward_plan(program, spec, default_tiling(spec)))
    for name, side in ((triton_learned.DIAGONALS, Side.DIAGONAL), (triton_learned.PAIRS, Side.QUERY)):
        own = learning_plan(plan, learning_tiling(spec), side)
        printed = diagonals_source(own) if side is Side.DIAGONAL else pairs_sources(own)[1]
        given = {**backward_parameters(own, *tensors), **dict.fromkeys(integers, 1)}
        source = kernel_source(own, printed, parameters(printed, name), given, aligned=True, function=name)
        used = _resources(compile_kernel(source, spec.target).binary)
        found[name] = int(used["STACK"]) + int(used["LOCAL"])
    return found


if __name__ == "__main__":
    json.dump(compiled_stacks(), sys.stdout)
