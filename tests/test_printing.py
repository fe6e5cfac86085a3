"""Kernels printed once: what decides the text decides the entry, and a printed kernel is not planned again."""

from __future__ import annotations

import ast
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

import attndsl
from attndsl.codegen.gluon_forward import forward_source as gluon_source
from attndsl.codegen.prelude_helpers import _functions
from attndsl.codegen.triton_forward import forward_source as triton_source
from attndsl.piece_plans import forward_plans
from attndsl.plan import Backend, BackwardPlan, ForwardPlan, Printed, Spec, Tiling
from attndsl.runtime.build import parameters
from attndsl.runtime.cache import KernelCache
from attndsl.runtime.printing import PrintedBackward, printed_backward, printed_forward, printed_gradients
from attndsl.runtime.texts import compiler_digest
from attndsl.targets import make_spec
from attndsl.wiring import engine

SPEC = make_spec("sm_90", "triton", 4, 2, 128)
PROGRAM = attndsl.compile("causal & (sink(4) | window(100))").program
PRINTERS = {Backend.TRITON: triton_source, Backend.GLUON: gluon_source}


def refuse(plan: ForwardPlan) -> str:
    raise AssertionError("planned again")


NOTHING = {Backend.TRITON: refuse, Backend.GLUON: refuse}


def printed(folder: Path, spec: Spec = SPEC, tiling: Tiling | None = None, again: bool = False) -> Printed:
    """As a process of its own would: with a cache that holds nothing in memory."""
    cache = KernelCache(folder / "kernels")
    (found,) = printed_forward(PROGRAM, spec, (Backend.TRITON,), tiling, NOTHING if again else PRINTERS, cache)
    return found


def test_a_printed_kernel_is_not_planned_again(tmp_path: Path) -> None:
    first = printed(tmp_path)
    assert first == printed(tmp_path, again=True)
    assert first.text == triton_source_of(first)


def triton_source_of(kernel: Printed) -> str:
    (found,) = printed_forward(PROGRAM, SPEC, (Backend.TRITON,), kernel.tiling, PRINTERS, None)
    return found.text


@pytest.mark.parametrize("other", ["spec", "tiling", "sources", "pattern"])
def test_what_decides_a_text_decides_its_entry(tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed(tmp_path)
    with pytest.raises(AssertionError, match="planned again"):
        match other:
            case "spec":
                printed(tmp_path, replace(SPEC, dim=64, v_dim=64), again=True)
            case "tiling":
                printed(tmp_path, tiling=Tiling(32, 32), again=True)
            case "sources":
                monkeypatch.setattr("attndsl.runtime.printing.compiler_digest", lambda: "another compiler")
                printed(tmp_path, again=True)
            case _:
                program = attndsl.compile("causal & (sink(4) | window(101))").program
                cache = KernelCache(tmp_path / "kernels")
                printed_forward(program, SPEC, (Backend.TRITON,), None, NOTHING, cache)


def test_the_choice_of_a_lowering_is_kept(tmp_path: Path) -> None:
    both, spec = (Backend.GLUON, Backend.TRITON), replace(SPEC, heads=2)
    caches = (KernelCache(tmp_path / "kernels") for _ in range(2))
    first, again = (
        printed_forward(PROGRAM, spec, both, None, printers, cache)
        for printers, cache in zip((PRINTERS, NOTHING), caches, strict=True)
    )
    assert first == again
    assert first[0].spec.backend is Backend.GLUON
    assert "gluon" in first[0].text


@pytest.mark.parametrize("text", ["causal & window(100)", "causal & (window(128) | dilated(128))"])
def test_layouts_are_kept(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A printed pattern is not searched again, be it whole or in pieces."""
    program = attndsl.compile(text).program
    both = (Backend.GLUON, Backend.TRITON)
    first = printed_forward(program, SPEC, both, None, PRINTERS, KernelCache(tmp_path / "kernels"))
    plans = forward_plans(program, first[0].spec)
    assert [(x.layout, x.follows, x.tiling, x.spec) for x in first] == [
        (x.layout, x.follows, x.tiling, x.spec) for x in plans
    ]

    def refuse_to_search(*_: object) -> None:
        raise AssertionError("searched again")

    for module in ("pieces", "piece_plans", "targets"):
        monkeypatch.setattr(f"attndsl.{module}.choose_pieces", refuse_to_search)
    assert printed_forward(program, SPEC, both, None, NOTHING, KernelCache(tmp_path / "kernels")) == first


LEARNED = """attention learned { input bias : float[h, 65] learnable
    input table : float[h, 8, 8] learnable
    score s + bias[h, clamp(q - k, 0, 64)] + table[h, q % 8, k % 8]
    attend causal & window(100) }"""
DRAWN = "causal & random(2, of = blocks(32), per = rows(16), seed = h)"


@pytest.mark.parametrize("text", ["causal & (window(128) | dilated(128))", LEARNED, DRAWN])
def test_backward_kernels_are_kept(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = attndsl.compile(text).program
    spec = replace(SPEC, dim=64, v_dim=64)
    printers = engine(program).generators
    first = printed_backward(program, spec, False, None, printers, KernelCache(tmp_path / "kernels"))
    assert first == printed_backward(program, spec, False, None, printers, None)

    def refuse_to_plan(*_: object, **__: object) -> None:
        raise AssertionError("planned again")

    for name in ("backward_plans", "learning_plan"):
        monkeypatch.setattr(f"attndsl.runtime.printing.{name}", refuse_to_plan)
    assert printed_backward(program, spec, False, None, printers, KernelCache(tmp_path / "kernels")) == first
    # A gradient of lse takes another kernel.
    with pytest.raises(AssertionError, match="planned again"):
        printed_backward(program, spec, True, None, printers, KernelCache(tmp_path / "kernels"))


def test_gradients_in_one_pass_are_planned_first_and_printed_where_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = attndsl.compile("causal & window(100)").program
    spec = replace(SPEC, backend=Backend.GLUON)
    printers, printed = engine(program).generators, 0

    def count(plan: BackwardPlan) -> tuple[str, str]:
        nonlocal printed
        printed += 1
        return printers.gluon_backward(plan)

    def gradients(wanted: bool) -> PrintedBackward | None:
        cache, counting = KernelCache(tmp_path / "kernels"), replace(printers, gluon_backward=count)
        return printed_gradients(program, spec, False, lambda plan: wanted, counting, cache)

    assert gradients(wanted=False) is None and printed == 0
    monkeypatch.setattr("attndsl.runtime.printing.backward_plans", refuse)
    first = gradients(wanted=True)
    assert first is not None and printed == 1
    ((plan, of_rows, of_keys),) = first.pieces
    assert (of_rows, of_keys) == printers.gluon_backward(plan)
    assert gradients(wanted=True) == first and printed == 1


def test_tokens_out_of_order_have_no_hopper_lowering() -> None:
    program = attndsl.compile("causal & strided(7)").program
    with pytest.raises(attndsl.PatternError, match="A510"):
        printed_forward(program, SPEC, (Backend.GLUON,), None, PRINTERS, None)


def test_parameters_are_those_of_the_printed_function(tmp_path: Path) -> None:
    names = parameters(printed(tmp_path).text, "attention_forward")
    assert {"q_ptr", "k_desc", "lse_ptr", "scale", "rows", "k_len"} <= set(names)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("module", ["prelude.py", "torch_prelude.py"])
def test_prelude_functions_are_those_that_python_reads(module: str) -> None:
    text = files("attndsl.codegen").joinpath(module).read_text()
    lines = text.splitlines()
    found = _functions(module)
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert list(found) == [node.name for node in functions]
    for node in functions:
        first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
        assert found[node.name].text == "\n".join(lines[first - 1 : node.end_lineno])
        names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
        assert (found[node.name].names & set(found)) - {node.name} == (names & set(found)) - {node.name}


def test_digest_covers_the_compiler() -> None:
    assert len(compiler_digest()) == 64
