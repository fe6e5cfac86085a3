"""What was found of a text, read from the cache: the same, and never believed where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import attndsl
from attndsl import PatternError, records
from attndsl.api import load_attention
from attndsl.diagnostics import Source
from attndsl.runtime import texts
from attndsl.runtime.cache import KernelCache
from tests.caching import python

PATTERNS = sorted(Path("examples/patterns").glob("*.attn"))
WARNS = "causal & (window(8) | sink(0))"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    """An empty cache, that is there."""
    found = KernelCache(tmp_path)
    monkeypatch.setattr(texts, "shared_cache", lambda: found)
    return found


def kept(text: str, select: str | None = None, name: str = "<pattern>", **params: Any) -> attndsl.Attention:
    """An attention, after keeping what was found of its text."""
    attn = Source(name, text), load_attention(text, name=select, **params)
    texts.keep(attn[0], select, params, (attn[1].program, attn[1].warnings))
    return attn[1]


def spans(value: Any) -> str:
    """All that a program holds, where it stands in the text included."""
    return records.write(value, whole=True)


def test_every_example_is_read_as_it_was_written(cache: KernelCache, tmp_path: Path) -> None:
    seen = 0
    for path in PATTERNS:
        try:
            attn = load_attention(path)
        except PatternError:
            continue  # It needs parameters.
        source = Source(str(path), path.read_text())
        texts.keep(source, None, {}, (attn.program, attn.warnings))
        found = texts.find(source, None, {})
        assert found is not None, path
        program, warnings = found
        assert program == attn.program
        assert spans(found) == spans((attn.program, attn.warnings))
        assert [x.render() for x in warnings] == [x.render() for x in attn.warnings]
        seen += 1
    assert seen > 60
    # Records are of classes that a process has which reads no text.
    done = python(
        """
        import sys, attndsl
        from pathlib import Path
        from attndsl.diagnostics import Source
        from attndsl.runtime import texts

        paths = sorted(Path("examples/patterns").glob("*.attn"))
        print(sum(texts.find(Source(str(path), path.read_text()), None, {}) is not None for path in paths))
        print(*{"attndsl.grammar", "attndsl.relation", "islpy", "lark", "numpy", "torch"} & set(sys.modules))
        """,
        ATTNDSL_CACHE_DIR=str(tmp_path),
    )
    assert done.stdout == f"{seen}\n\n"


def test_warnings_are_given_again(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept(WARNS)
    assert first.warnings
    monkeypatch.setattr("attndsl.grammar.load", lambda *given, **options: pytest.fail("the text was read again"))
    with pytest.warns(attndsl.PatternWarning) as given:
        again = attndsl.compile(WARNS)
    assert [str(x.message) for x in given] == [x.render() for x in first.warnings]
    assert str(again.explain(64)) == str(first.explain(64))
    assert again.source() == first.source()
    # A mistake at call time points into the text.
    broken = "attention a { input bias : float[h]\n score s + bias[h]\n attend causal }"
    with pytest.raises(pytest.fail.Exception):
        attndsl.compile(broken)


def test_what_decides_a_program_decides_its_entry(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "pattern one(n = 2) = window(n)\npattern two(n = 2) = causal & window(n)"
    assert kept(text, "one", n=3).program != kept(text, "two", n=3).program
    source = Source("<pattern>", text)
    assert texts.find(source, "one", {"n": 3}) is not None
    others: list[tuple[Source, str | None, dict[str, Any]]] = [
        (source, None, {"n": 3}), (source, "one", {"n": 4}), (source, "one", {"n": 3.0}), (source, "one", {}),
        (Source("<pattern>", text + " "), "one", {"n": 3}), (Source("elsewhere", text), "one", {"n": 3}),
    ]  # fmt: skip
    for other in others:
        assert texts.find(*other) is None
    monkeypatch.setattr(texts, "compiler_digest", lambda: "another compiler")
    assert texts.find(source, "one", {"n": 3}) is None


def test_parameters_that_are_no_plain_values_are_not_kept(cache: KernelCache) -> None:
    source = Source("<pattern>", "causal")
    texts.keep(source, None, {"table": object()}, (load_attention("causal").program, ()))
    assert cache.info().entries == 0
    assert texts.find(source, None, {"table": object()}) is None


NONSENSE = [
    b"", b"{}", b"[[], 3]", b"[[],[7]]", b'[[["program.Program"]],[0]]', b'[[["os.system","ls"]],[0]]', b"\xff",
    b'[[["",1,2]],[0]]', b'[[["",1]],[0]]', b'[[["program.Const","x",null]],[0]]',
    b"[" * 100_000, b'[[["",1],["scalar.Unary","-",[0]],["scalar.Binary","+",[1],[1]]],[2]]', b"3",
    b'[[["",null,null]],[0]]',
]  # fmt: skip


@pytest.mark.parametrize("record", NONSENSE)
def test_an_entry_that_is_no_record_is_not_believed(cache: KernelCache, record: bytes) -> None:
    source = Source("<pattern>", "causal")
    key = texts._key(source, None, {})
    assert key is not None
    cache.fetch(key, lambda: {"program.json": record})
    assert texts.find(source, None, {}) is None
    assert attndsl.compile("causal").program.name == "pattern"


def test_without_a_cache_nothing_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "shared_cache", lambda: KernelCache(tmp_path / "none"))
    monkeypatch.setattr(texts, "compiler_digest", lambda: pytest.fail("sources were read"))
    assert attndsl.compile("causal").program.name == "pattern"
    assert not (tmp_path / "none").exists()


def test_a_cache_that_cannot_be_looked_at_has_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which costs one warning where a kernel is to be kept, and never a call."""
    monkeypatch.setattr(texts, "shared_cache", lambda: KernelCache(tmp_path / ("x" * 300)))
    assert attndsl.compile("causal").program.name == "pattern"


START = """
import sys
import torch
import attndsl
from attndsl.runtime import call, engine, triton_launch
call.device_target = engine.device_target = lambda device: "cuda:90"
triton_launch.launcher = lambda kernel, grid, device, template: lambda call: None
attn = attndsl.compile("causal & window(100)")
print("read" if "attndsl.grammar" in sys.modules else "found")
q, k, v = (torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16) for _ in range(3))
attn(q, k, v, backend="triton")
"""


def test_a_second_process_reads_no_text(tmp_path: Path) -> None:
    settings = {"ATTNDSL_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": ""}
    assert [python(START, **settings).stdout.split() for _ in range(2)] == [["read"], ["found"]]
