"""Every command of the command line: what it prints, what it writes, and with which status it ends."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attndsl.api import load_attention
from attndsl.cli import app
from attndsl.terminal import plain

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "patterns"
SMALL = ["--n", "96", "--heads", "2", "--dim", "16"]


def attndsl(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


# What `run` cannot draw: tables without a default, and inputs that must be positive.
NOT_RUN = {"moa": "A015", "radial": "A015", "proxy": "A015", "rmt": "A922", "rmt_sigmoid": "A922"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.attn")), ids=lambda path: path.stem)
def test_every_example_runs_and_is_laid_out(path: Path) -> None:
    done = attndsl("run", path, *SMALL, "--kv-heads", 1)
    if path.stem in NOT_RUN:
        assert done.exit_code == 1
        assert NOT_RUN[path.stem] in done.output
        assert attndsl("fmt", "--check", path).exit_code == 0
        return
    assert done.exit_code == 0, done.output
    assert re.search(r"error +\d\.\de[-+]\d\d against the oracle over [1-9]", done.output)
    # Views and branches are no mask.
    said = "with the same mask" if load_attention(path).program.plain else "of every pair, without a mask"
    assert re.search(rf"dense attention +\d+\.\d+ ms {said}", done.output)
    assert attndsl("fmt", "--check", path).exit_code == 0


def test_run_reports_what_it_made_up() -> None:
    text = """attention a(w : runtime int) {
        input x : int[b, k] sorted
        input f : bool[b]
        attend { x[q] == x[k] and f[b] and q - k < w } & causal
    }"""
    done = attndsl("run", text, *SMALL, "--arg", "w=5")
    assert done.exit_code == 0, done.output
    assert "about four segments" in done.output
    assert "true and false alike" in done.output


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["run", "causal & windw(3)"], "A010"),
        (["run", "nothing.attn"], "A001"),
        (["run", "causal", "--backend", "tpu", *SMALL], "A509"),
        (["run", "causal", "--dtype", "int8", *SMALL], "A502"),
        (["run", "causal", "--arg", "w=1", *SMALL], "A522"),
        (["run", "causal", "--n", "8", "--dim", "12"], "A506"),
        (["run", "causal", "--heads", "3", "--kv-heads", "2"], "A505"),
        (["check", "{ k <= q", "--name", "x"], "A002"),
        (["explain", "~random(3, of = blocks(8), per = rows(8), seed = h)"], "A044"),
        (["explain", "causal", "--target", "sm_1"], "A530"),
        (["source", "causal", "--assembly", "amdgcn"], "A532"),
        (["source", "causal", "--kernel", "sideways"], "A531"),
        (["show", str(EXAMPLES / "prefix.attn")], "A523"),
        (["compare", "causal", "nothing.attn"], "A001"),
        (["fmt", "nothing.attn"], "A001"),
        (["bench", "causal &"], "A002"),
        (["show", "causal", "--png", "nowhere/out.png"], "A525"),
    ],
)
def test_mistakes_are_diagnostics_with_status_1(args: list[str], code: str) -> None:
    done = attndsl(*args)
    assert done.exit_code == 1, done.output
    assert f"error[{code}]" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["sing"],
        ["run"],
        ["run", "causal", "--n", "many"],
        ["run", "causal", "--n", "0"],
        ["run", "causal", "--param", "span"],
        ["run", "causal", "--param", "span=__import__('os')"],
        ["run", "causal", "--param", "not a name=3"],
        ["run", "causal", "--arg", "w=x"],
        ["show", "causal", "--head", "4", "--n", "64"],
        ["show", "causal", "--png", "out.html", "--n", "64"],
        ["cache", "burn"],
        ["compare", "causal"],
    ],
)
def test_usage_mistakes_have_status_2(args: list[str]) -> None:
    assert attndsl(*args).exit_code == 2


def test_parameters_are_numbers_truths_and_lists() -> None:
    text = """attention a(w : int[h], far : bool, t = 1.0) {
        score s * t
        attend causal & (if far then all else window(w[h]))
    }"""
    given = ["--param", "w=3,5", "--param", "far=false", "--param", "t=0.25"]
    found = attndsl("explain", text, *given, "--n", 64, "--heads", 2, "--dim", 16)
    assert found.exit_code == 0, found.output
    assert "row 63: keys 61..63" in found.output
    assert "logit s * 0.25" in found.output


def test_check_prints_warnings_and_succeeds() -> None:
    done = attndsl("check", "causal & window(4) & window(9)")
    assert done.exit_code == 0
    assert "warning[W301]" in done.stderr
    assert done.stdout == "pattern: ok\n"


def test_name_picks_a_program(tmp_path: Path) -> None:
    path = tmp_path / "two.attn"
    path.write_text("pattern near = causal & window(2)\npattern far = causal\n")
    assert "far: ok" in attndsl("check", path).output
    assert "near: ok" in attndsl("check", path, "--name", "near").output
    assert attndsl("check", path, "--name", "nowhere").exit_code == 1


def test_parts_are_drawn_and_their_kernels_named(tmp_path: Path) -> None:
    nsa, sizes = EXAMPLES / "nsa.attn", ["--n", 512, "--heads", 2, "--kv-heads", 1]
    drawn = attndsl("show", nsa, *sizes)
    assert drawn.exit_code == 0
    assert [line for line in drawn.output.splitlines() if line.endswith(" tiles")] == [
        "summary: 4 x 1 tiles", "routed: 4 x 4 tiles", "near: 4 x 4 tiles",
    ]  # fmt: skip
    assert "summary:" not in attndsl("show", nsa, *sizes, "--part", "near").output
    assert attndsl("show", nsa, *sizes, "--part", "far").exit_code == 1
    assert attndsl("show", nsa, *sizes, "--png", tmp_path / "nsa.png").exit_code == 2
    assert attndsl("show", nsa, *sizes, "--png", tmp_path / "nsa.png", "--part", "near").exit_code == 0
    named = attndsl("source", nsa, "--kernels", "--kv-heads", 2).output.split()
    assert named[:3] == ["pool", "top.select", "summary.forward"]
    assert "def combine_gradients(" in attndsl("source", nsa, "--kernel", named[-1]).output
    assert "near: planned" in attndsl("explain", nsa, "--n", 256).output


def test_explain_with_stages() -> None:
    done = attndsl("explain", "causal", "--stages", "--n", 64, "--dim", 16)
    assert done.exit_code == 0
    assert "typed program\n  attention" in done.output
    assert "def attention_forward(" in done.output


def test_show_draws_and_writes(tmp_path: Path) -> None:
    drawn = attndsl("show", "causal & window(200)", "--n", 1024)
    assert "█" in drawn.output
    assert "visited" in drawn.output
    png, html = tmp_path / "a.png", tmp_path / "a.html"
    done = attndsl("show", "causal & window(200)", "--n", 1024, "--png", png, "--html", html)
    assert done.exit_code == 0, done.output
    assert png.read_bytes().startswith(b"\x89PNG")
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"]


def test_source_is_the_text_alone() -> None:
    done = attndsl("source", "causal", "--heads", 2, "--backend", "cpu")
    assert done.exit_code == 0
    compile(done.stdout, "<source>", "exec")


def test_compare_says_how_and_where() -> None:
    done = attndsl("compare", "causal", "causal & window(4)")
    assert done.exit_code == 0
    assert done.stdout.startswith("contains: ")
    assert "q = 4, k = 0" in done.stdout


def test_bench_has_a_row_for_each_length() -> None:
    done = attndsl("bench", "causal", "--n", 32, "--n", 64, "--heads", 1, "--dim", 16)
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["tokens", "32", "64"]


def test_fmt_changes_files_in_place(tmp_path: Path) -> None:
    path, link = tmp_path / "a.attn", tmp_path / "link.attn"
    path.write_text("attention a{attend causal}")
    path.chmod(0o640)
    link.symlink_to(path)
    assert attndsl("fmt", "--check", link).exit_code == 1
    assert path.read_text() == "attention a{attend causal}"
    assert attndsl("fmt", link).exit_code == 0
    assert path.read_text() == "attention a {\n    attend causal\n}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert attndsl("fmt", "--check", path).exit_code == 0


def test_fmt_leaves_a_broken_file_alone_and_goes_on(tmp_path: Path) -> None:
    broken, good = tmp_path / "a.attn", tmp_path / "b.attn"
    broken.write_text("attention {")
    good.write_text("causal&all")
    done = attndsl("fmt", broken, good)
    assert done.exit_code == 1
    assert (broken.read_text(), good.read_text()) == ("attention {", "causal & all\n")


def test_cache_is_shown_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attndsl.runtime.cache import KernelCache, cache_key

    monkeypatch.setenv("ATTNDSL_CACHE_DIR", str(tmp_path / "kernels"))
    KernelCache().fetch(cache_key("a test"), lambda: {"kernel": b"text"})
    assert ": 1 kernels" in attndsl("cache").output
    assert ": 1 kernels, 0.0 MB removed" in attndsl("cache", "clear").output.replace("\n", "")
    assert ": 0 kernels" in attndsl("cache", "info").output


def test_files_and_their_names_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b]0;owned\x07\u202e.attn"
    path.write_text("causal & \x1b[2Jwindw(3) # \x9b31m")
    outputs = [attndsl("check", path).output, attndsl("fmt", path).output]
    path.write_text("causal # \x1b[2J \x9b31m \u202e")
    outputs += [attndsl("explain", path, "--n", 64).output, attndsl("source", path).output]
    outputs += [attndsl("run", path, "--param", "\x1b[2J=1").output]
    for output in outputs:
        assert output
        assert not set(output) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert plain("a\tb\nc ß 漢 █\r\x00") == "a\tb\nc ß 漢 █\\r\\x00"


def test_the_command_is_an_entry_point(tmp_path: Path) -> None:
    entry, module = ["-c", "from attndsl.cli import app_main; app_main()"], ["-m", "attndsl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command, pattern, status in (("check", "causal", 0), ("check", "casual", 1), ("chek", "causal", 2)):
        args = [*(module if status == 1 else entry), command, pattern]
        done = subprocess.run(
            [sys.executable, *args], cwd=tmp_path, env=environment, capture_output=True, check=False
        )  # fmt: skip
        assert done.returncode == status
        assert b"\x1b" not in done.stdout + done.stderr
