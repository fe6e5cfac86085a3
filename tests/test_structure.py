"""The shape of the code: who imports whom, where each library may appear, and what appears nowhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPOKES = ("grammar", "codegen", "runtime")
# The modules that join the spokes, the first of which is the API, and the ones above it.
WIRING = ("attndsl.api", "attndsl.shown", "attndsl.wiring")
ABOVE = {*WIRING, "attndsl.cli"}
# library -> the modules, or packages with a final dot, that may import it
HOMES: dict[str, tuple[str, ...]] = {
    "lark": ("attndsl.grammar.",),
    "islpy": (
        "attndsl.apart",
        "attndsl.effort",
        "attndsl.isl_sets",
        "attndsl.run_ends",
        "attndsl.set_values",
        "attndsl.placing",
        "attndsl.relation",
        "attndsl.quasi_affine",
        "attndsl.tiles",
        "attndsl.tile_loops",
        "attndsl.tile_sets",
        "attndsl.pieces",
        "attndsl.reindex",
        "attndsl.grid_pieces",
        "attndsl.box_runs",
        "attndsl.comparison",
        "attndsl.findings",
        "attndsl.part_findings",
        "attndsl.eviction",
        "attndsl.capacity",
        "attndsl.stability",
    ),
    "sympy": ("attndsl.score",),
    "networkx": ("attndsl.blockgraph",),
    "torch": ("attndsl.runtime.", "attndsl.codegen.torch_prelude"),
    "triton": ("attndsl.runtime.", "attndsl.codegen.prelude"),
}
ENVIRONMENT = {"ATTNDSL_DEBUG", "ATTNDSL_DUMP", "ATTNDSL_VERIFY", "ATTNDSL_CACHE_DIR"}
MAX_LINES = 500
# What a merge may leave its marks in.
_TEXTS = {".py", ".md", ".lark", ".attn"}


@dataclass(frozen=True)
class Module:
    """A module of the package; `name` as it is imported."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def spoke(self) -> str | None:
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in SPOKES else None


@dataclass(frozen=True)
class Import:
    """An imported name, with its module; `typing` if it is there for type checkers only."""

    target: str
    line: int
    typing: bool


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for folder in ("attndsl", *SPOKES):
        prefix = "attndsl" if folder == "attndsl" else f"attndsl.{folder}"
        for path in sorted((ROOT / folder).glob("*.py")):
            name = prefix if path.stem == "__init__" else f"{prefix}.{path.stem}"
            found.append(Module(name, path, ast.parse(path.read_text())))
    return tuple(found)


def imports(tree: ast.AST, typing: bool = False) -> Iterator[Import]:
    """Every import of a module, wherever in it."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno, typing) for alias in node.names)
            case ast.ImportFrom():
                source = "." * node.level + (node.module or "")
                yield from (Import(f"{source}.{alias.name}", node.lineno, typing) for alias in node.names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                yield from imports(node, typing=True)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str() as target), *_],
            ):
                yield Import(target, node.lineno, typing)
            case _:
                yield from imports(node, typing)


def breaches(module: Module) -> list[str]:
    """Imports of a module that the star forbids."""
    found = []
    for item in imports(module.tree):
        at = f"{module.name}:{item.line} imports {item.target}"
        root, second, *_ = [*item.target.split("."), ""]
        homes = HOMES.get(root, ())
        at_home = any(home.endswith(".") and f"{module.name}.".startswith(home) for home in homes)
        # Signatures of the API name tensors; importing it does not import torch.
        in_a_signature = item.typing and module.name == WIRING[0]
        if homes and not at_home and module.name not in homes and not in_a_signature:
            found.append(f"{at}, which belongs to {' and '.join(homes)}")
        if root in SPOKES or root == "":
            found.append(f"{at} past the name attndsl")
        if root == "attndsl" and second in SPOKES and second != module.spoke and module.name not in WIRING:
            found.append(f"{at}, which only {' and '.join(WIRING)} may")
        if f"{root}.{second}" in ABOVE and module.spoke is not None:
            found.append(f"{at} against the direction of the star")
    return found


def test_dependencies_form_a_star() -> None:
    assert [breach for module in modules() for breach in breaches(module)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attndsl.plan", "import torch.nn"),
        ("attndsl.plan", "import torch as t"),
        ("attndsl.plan", "def f():\n    from sympy.core import Expr"),
        ("attndsl.plan", "from importlib import import_module\nimport_module('islpy')"),
        ("attndsl.plan", "from attndsl.codegen import emit"),
        ("attndsl.plan", "from attndsl import codegen"),
        ("attndsl.plan", "from runtime import cache"),
        ("attndsl.plan", "from . import program"),
        ("attndsl.plan", "if TYPE_CHECKING:\n    import torch"),
        ("attndsl.api", "import torch"),
        ("attndsl.cli", "from attndsl.runtime import cache"),
        ("attndsl.codegen.emit", "from attndsl.runtime.cache import KernelCache"),
        ("attndsl.codegen.emit", "if TYPE_CHECKING:\n    import triton"),
        ("attndsl.grammar.lower", "from attndsl import api"),
        ("attndsl.grammar.lower", "from attndsl.api import compile"),
        ("attndsl.relations", "import islpy"),
    ],
)
def test_the_star_test_sees_a_breach(name: str, text: str) -> None:
    assert len(breaches(Module(name, Path(), ast.parse(text)))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attndsl.relation", "import islpy as isl"),
        ("attndsl.grammar.parse", "import lark\nfrom attndsl.grammar import lower\nfrom attndsl import program"),
        ("attndsl.runtime", "import torch"),
        ("attndsl.api", "from attndsl.runtime import cache\nfrom attndsl.grammar import parse"),
        ("attndsl.api", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("attndsl.cli", "from attndsl import api"),
    ],
)
def test_the_star_test_lets_its_homes_pass(name: str, text: str) -> None:
    assert breaches(Module(name, Path(), ast.parse(text))) == []


def test_modules_are_found() -> None:
    names = {module.name for module in modules()}
    assert {"attndsl", "attndsl.program", "attndsl.grammar", "attndsl.codegen", "attndsl.runtime.cache"} <= names


def test_the_package_is_flat() -> None:
    # A package inside a package would be missing from the wheel.
    for folder in ("attndsl", *SPOKES):
        inner = [path for path in (ROOT / folder).iterdir() if path.is_dir() and not path.is_symlink()]
        assert [path.name for path in inner if path.name != "__pycache__"] == []
    for spoke in SPOKES:
        assert (ROOT / "attndsl" / spoke).readlink() == Path("..") / spoke


@pytest.mark.parametrize("spoke", SPOKES)
def test_a_spoke_cannot_be_imported_by_its_folder_name(spoke: str) -> None:
    program = f"import {spoke}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: import" in done.stderr
    assert f"attndsl.{spoke}" in done.stderr


def test_no_file_is_two_things() -> None:
    paths = [module.path for module in modules()] + [
        path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    lines = {path.relative_to(ROOT): path.read_text().count("\n") for path in paths}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_no_mark_of_a_merge_is_left() -> None:
    marks = re.compile(rb"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)
    folders = ("attndsl", *SPOKES, "docs", "tests", "examples", "benchmarks")
    texts = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in _TEXTS]
    assert ROOT / "docs" / "architecture.md" in texts
    found = [path for path in (*texts, *ROOT.glob("*.md")) if marks.search(path.read_bytes())]
    assert found == []


def test_no_star_imports() -> None:
    found = [
        f"{module.name}:{node.lineno}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert found == []


def test_text_becomes_code_in_one_place_only() -> None:
    allowed = {("attndsl.runtime.load", "exec"), ("attndsl.runtime.load", "compile")}
    found = {
        (module.name, node.func.id)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        # The package's own `compile` makes attention of a program: a function of the API, not the builtin.
        if node.func.id in {"eval", "exec"} or (node.func.id == "compile" and module.name != "attndsl.api")
    }
    assert found <= allowed
    # Not under another name either.
    assert {
        f"{module.name}:{node.lineno}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        if any(alias.name.split(".")[0] in {"builtins", "pickle", "marshal", "shelve"} for alias in node.names)
        or (isinstance(node, ast.ImportFrom) and node.module in {"builtins", "pickle", "marshal", "shelve"})
    } == set()


def environment_reads(tree: ast.AST) -> set[str]:
    """Names of the environment variables that a module reads; "?" for one that is not a literal."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[name, *_]):
                found.add(name)
            case ast.Call(func=ast.Attribute(attr="getenv") | ast.Name(id="getenv"), args=[name, *_]):
                found.add(name)
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name):
                found.add(name)
            case ast.Compare(left=name, comparators=[ast.Attribute(attr="environ")]):
                found.add(name)
            case ast.ImportFrom(module="os", names=names) if {a.name for a in names} & {"environ", "getenv"}:
                found.add(ast.Constant("from os import environ"))
    return {str(name.value) if isinstance(name, ast.Constant) else "?" for name in found}


def test_four_environment_variables_at_most() -> None:
    # Of Triton's own one is asked without importing it.
    allowed = ENVIRONMENT | {"TRITON_INTERPRET"}
    assert {name for module in modules() for name in environment_reads(module.tree)} <= allowed


def test_environment_reads_are_seen() -> None:
    text = "os.environ['A']; os.environ.get('B'); os.getenv('C', '1'); 'D' in os.environ; os.environ.get(name)"
    assert environment_reads(ast.parse(text)) == {"A", "B", "C", "D", "?"}


@pytest.mark.parametrize(
    ("program", "without", "most"),
    [
        ("", "torch triton numpy lark islpy filelock attndsl.grammar attndsl.relation attndsl.plan", 32),
        # What reads a text and asks integer sets about it: no plans, no printers, no oracle.
        ("attndsl.compile('causal & window(9)')", "torch triton numpy lark filelock attndsl.plan attndsl.oracle", 90),
        # Scores that are the dot products themselves need no derivatives.
        ("attndsl.compile('causal & window(9)').source('dq')", "torch triton sympy networkx lark filelock", 175),
    ],
)
def test_an_import_is_light(program: str, without: str, most: int, tmp_path: Path) -> None:
    """It is what a short command waits for most: heavy modules are imported where they are first used.

    most: modules of ours, of which each takes a millisecond or two.
    """
    said = "print(*sorted(m for m in sys.modules if m.startswith('attndsl.')), *(set(wanted) & set(sys.modules)))"
    text = f"import sys, attndsl; wanted = {without.split()}; {program or 'pass'}; {said}"
    environment = {**os.environ, "ATTNDSL_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = done.stdout.split()
    assert "attndsl.program" in found
    assert not set(found) & set(without.split())
    assert len(found) <= most, "more modules than before: import what is rarely used where it is used"
