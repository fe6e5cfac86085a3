"""What gets installed: each module once, under attndsl, with its data; and the versions that the suite runs on."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SPOKES = ("grammar", "codegen", "runtime")
DATA = ("attndsl/grammar/attn.lark", "attndsl/grammar/attn.tables.json", "attndsl/grammar/std.attn")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built, with no network, from a copy of the tree: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    for name in ("attndsl", *SPOKES):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_each_module_once(wheel: Path) -> None:
    expected = {f"attndsl/{path.name}" for path in (ROOT / "attndsl").glob("*.py")}
    expected |= {f"attndsl/{spoke}/{path.name}" for spoke in SPOKES for path in (ROOT / spoke).glob("*.py")}
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == expected | set(DATA)


def test_wheel_carries_license_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "attndsl = attndsl.cli:app_main" in archive.read(entry_points).decode()
        (license_file,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert b"Apache License" in archive.read(license_file)


def test_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import importlib.resources as r, attndsl, attndsl.grammar, attndsl.codegen, attndsl.runtime.cache as c;"
        "print(c.__file__, all((r.files('attndsl.grammar') / n).read_text() for n in ('attn.lark', 'std.attn')))"
    )
    # -P keeps the current folder off the path, PYTHONPATH comes before an editable install.
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{tmp_path / 'attndsl' / 'runtime' / 'cache.py'} True\n", done.stderr


def test_every_imported_library_is_declared() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    pattern = re.compile(r"^\s*(?:import|from) ([a-zA-Z_]\w*)", re.MULTILINE)
    imported = {
        name
        for folder in ("attndsl", *SPOKES)
        for path in (ROOT / folder).glob("*.py")
        for name in pattern.findall(path.read_text())
    }
    third_party = imported - set(sys.stdlib_module_names) - {"attndsl"}
    installs = importlib.metadata.packages_distributions()
    # A word at the start of a line of prose is no import: only what is installed counts.
    missing = {n for n in third_party if n in installs and not declared & {canonicalize_name(d) for d in installs[n]}}
    assert missing == set()


@pytest.mark.triton_newest
@pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux only")
def test_the_triton_in_use_is_one_that_is_allowed() -> None:
    triton = pytest.importorskip("triton")
    (requirement,) = (r for text in PROJECT["dependencies"] if (r := Requirement(text)).name == "triton")
    assert requirement.specifier.contains(triton.__version__)
    # Of two installed, the metadata and the code are of the same.
    assert importlib.metadata.version("triton") == triton.__version__


def test_the_versions_named_in_the_makefile_are_allowed() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in ("torch", "triton"):
        (version,) = re.findall(rf"^{name.upper()} +:= (\S+)$", makefile, re.MULTILINE)
        (requirement,) = (r for text in PROJECT["dependencies"] if (r := Requirement(text)).name == name)
        assert requirement.specifier.contains(version)
