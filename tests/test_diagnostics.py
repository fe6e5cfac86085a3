"""Every diagnostic code has a golden pair and an entry in the documentation, and says what it should."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from attndsl.diagnostics import Diagnostic, PatternError
from attndsl.grammar import load
from attndsl.source_files import read_source

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "diagnostics"
CODES = sorted(path.stem for path in FOLDER.glob("*.attn"))
_CODE = re.compile(r'"(A\d{3})"')


def found_in(path: Path) -> tuple[Diagnostic, ...]:
    """What loading a file reports. Its first line may ask for parameters, or for repeated text."""
    try:
        source = read_source(path)
        options = re.match(r"# golden: (.*)\n", source.text)
        given = json.loads(options[1]) if options else {}
        word, count = given.get("repeat", ("", 0))
        return load(source.text + word * count, name=str(path), params=given.get("params")).warnings
    except PatternError as error:
        return error.diagnostics


@pytest.mark.parametrize("code", CODES)
def test_golden(code: str, update_golden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    diagnostics = found_in(Path(f"{code}.attn"))
    text = "\n\n".join(d.render() for d in diagnostics) + "\n"
    golden = FOLDER / f"{code}.err"
    if update_golden:
        golden.write_text(text, "utf-8")
    assert code in {d.code for d in diagnostics}
    assert text == golden.read_text("utf-8")


@pytest.mark.parametrize("code", CODES)
def test_every_message_helps(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    for diagnostic in found_in(Path(f"{code}.attn")):
        assert diagnostic.help, diagnostic.message
        assert diagnostic.span is not None or diagnostic.code in ("A001", "A003", "A016")


def test_codes_agree() -> None:
    """The code, the golden pairs and docs/diagnostics.md list the same codes."""
    written = ((ROOT / "grammar").glob("*.py"), [ROOT / "attndsl" / "source_files.py"])
    raised = {code for paths in written for path in paths for code in _CODE.findall(path.read_text("utf-8"))}
    text = (ROOT / "docs" / "diagnostics.md").read_text("utf-8")
    documented = re.findall(r"^### ([AW]\d{3}) ", text, re.MULTILINE)
    assert documented == sorted(documented)
    assert set(CODES) == raised
    # The others are of calls and of what patterns mean: their tests are in test_api and test_findings.
    elsewhere = {
        code
        for folder in ("attndsl", "runtime")
        for path in (ROOT / folder).glob("*.py")
        for code in re.findall(r'"([AW]\d{3})"', path.read_text("utf-8"))
    }
    assert set(documented) == raised | elsewhere


def test_documented_examples_are_the_golden_ones() -> None:
    """Each entry of a text's own codes quotes the message of its golden file."""
    text = (ROOT / "docs" / "diagnostics.md").read_text("utf-8")
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        code = section[:4]
        if code not in CODES:
            continue
        quoted = re.findall(r"^```text\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        assert quoted, code
        assert quoted[0].strip() in (FOLDER / f"{code}.err").read_text("utf-8"), code


def test_all_mistakes_at_once() -> None:
    text = """attention a {
    input x : flot[b]
    score s +
    attend { k <= q and } & window(q)
    skip below 2
    scale nope
}"""
    with pytest.raises(PatternError) as caught:
        load(text)
    assert [d.code for d in caught.value.diagnostics] == ["A030", "A002", "A002", "A012", "A010"]


def test_names_of_a_broken_clause_are_not_unknown() -> None:
    with pytest.raises(PatternError) as caught:
        load("attention a {\n input doc : int[b, k\n attend causal & document(doc)\n}")
    assert [d.code for d in caught.value.diagnostics] == ["A002"]


@pytest.mark.parametrize(
    ("text", "help"),
    [
        ("attend causal", "clauses stand in an attention: write `attention name { attend ... }`, or the pattern alone"),
        ("causal && window(5)", "write `&` between sets, `and` between booleans"),
        ("{ q == k || k == 0 }", "write `|` between sets, `or` between booleans"),
        ("{ q = k }", "equality is `==`"),
        ("{ j <= k }", "write `k`"),
        ("{ k <= q_idx }", "write `q`"),
        ("attention a {\n score = s\n attend causal\n}", "leave out the `=` after `score`"),
        ("attention a {\n r = 5\n attend window(r)\n}", "numbers are parameters: write `attention ...(r = 5) {`"),
        ("attention a {\n axes y[4] x[4] from 0\n attend causal\n}", "write `,` between axes"),
        ("attention a {\n input sink : float[h]\n attend sink(4)\n}", "call it otherwise: it hides the pattern `sink`"),
        ("attention a {\n input mine : float[h]\n attend mine(4)\n}", "leave out the brackets"),
    ],
)  # fmt: skip
def test_habits_of_other_languages_are_answered(text: str, help: str) -> None:
    with pytest.raises(PatternError) as caught:
        load(text)
    assert help in {d.help for d in caught.value.diagnostics}
