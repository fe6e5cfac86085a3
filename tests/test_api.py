"""The public interface: compile and its warnings, masks, blocks, comparison, and the diagnostics of wrong use."""

from __future__ import annotations

import pkgutil
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import attndsl
import attndsl.serving
from attndsl.blockgraph import TileCode
from attndsl.grammar import load
from attndsl.program import CallShape
from attndsl.runtime.select import Selector
from tests.gpu import interprets

ROOT = Path(__file__).parent.parent
DOCUMENTS = "attention documents { input doc : int[b, k] sorted  attend causal & document(doc) }"


def tensors(n: int = 32, heads: int = 2, dim: int = 16, rows: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (n if rows is None else rows, n, n)
    return [torch.randn(1, heads, length, dim, generator=generator) for length in lengths]


def test_mask_is_the_pattern() -> None:
    mask = attndsl.compile("causal & (window(3) | sink(1))").mask(7, 7, heads=2)
    q, k = np.arange(7)[:, None], np.arange(7)
    assert mask.shape == (2, 7, 7)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask[1], (k <= q) & ((q - k < 3) | (k < 1)))


def test_mask_reads_inputs_of_a_batch_entry() -> None:
    attn = attndsl.compile(DOCUMENTS)
    doc = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    for batch in range(2):
        ids = doc[batch].numpy()
        expected = np.tril(ids[:, None] == ids[None, :])
        np.testing.assert_array_equal(attn.mask(4, 4, batch=batch, doc=doc)[0], expected)
    # Rows are the last ones of the sequence; arrays do as well as tensors.
    np.testing.assert_array_equal(attn.mask(2, 4, doc=doc.numpy())[0], attn.mask(4, 4, doc=doc)[0][2:])


def test_blocks_agree_with_the_mask() -> None:
    attn = attndsl.compile("causal & window(20)")
    tiles = attn.blocks(64, 64, 16, 16).dense()
    pairs = attn.mask(64, 64)[0].reshape(4, 16, 4, 16).swapaxes(1, 2)
    expected = np.where(pairs.all((2, 3)), TileCode.FULL, np.where(pairs.any((2, 3)), TileCode.PARTIAL, TileCode.NONE))
    np.testing.assert_array_equal(tiles, expected)


def test_compare_takes_texts_paths_and_attentions(tmp_path: Path) -> None:
    path = tmp_path / "near.attn"
    path.write_text("causal & window(4)")
    near = attndsl.compile("causal & window(4)")
    assert attndsl.compare(str(path), near).verdict.value == "equal"
    assert attndsl.compare(path, "causal").verdict.value == "contained"
    assert attndsl.compare("causal", near).verdict.value == "contains"


def test_no_module_is_called_as_a_function_of_the_interface() -> None:
    """Importing it would set the package's attribute of that name."""
    modules = {module.name for module in pkgutil.iter_modules(attndsl.__path__)}
    assert "comparison" in modules
    assert not modules & set(attndsl.__all__)


def test_warnings_come_once_when_compiling() -> None:
    with pytest.warns(attndsl.PatternWarning, match="changes nothing") as caught:
        attn = attndsl.compile("causal & window(4) & window(8)")
    assert len(caught) == 1
    assert [warning.code for warning in attn.warnings] == ["W301"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn.mask(4, 4)
        attndsl.compile("causal & (window(512) | sink(4))")
        warnings.simplefilter("ignore", attndsl.PatternWarning)
        attndsl.compile("causal & window(4) & window(8)")


def test_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    ):
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["out"], torch.Tensor)
    assert names["out"].shape == (1, 8, 1024, 64)


def test_a_path_is_named_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "wrong.attn"
    path.write_text("causal & windw(4)")
    with pytest.raises(attndsl.PatternError, match=r"wrong\.attn:1:10"):
        attndsl.compile(str(path))


# ----------------------------------------------------------------------------- codes of wrong use


def call(pattern: str, *given: torch.Tensor, **options: object) -> Callable[[], object]:
    return lambda: attndsl.compile(pattern)(*given, **options)  # type: ignore[arg-type]


Q, K, V = tensors()
IDS = torch.zeros(1, 32, dtype=torch.int32)
LENGTHS = torch.tensor([32], dtype=torch.int32)
MOBA = "top(2, blocks(4), by = dot(Q, mean(K)))"
POOLED = "attention a { attend causal over pool(mean, 4) }"
EIGHT_BITS = (K.to(torch.float8_e4m3fn), V.to(torch.float8_e4m3fn))
TILED = load(
    "attention a { axes t, x[8]  attend causal & top(1, tiles(8, 8), by = dot(Q, mean(K)), share = heads) }"
).program
SELECTS = "attention a {{ plan sel = top(2, {}, among = causal, by = dot(Q, {}), always = {}) attend causal }}"


def paged_cache(batch: int, pages: int, max_len: int) -> attndsl.serving.PagedCache:
    """Pages of 16 tokens for `K` and `V`."""
    return attndsl.serving.PagedCache(attndsl.compile("causal"), batch, 2, 16, pages=pages, page=16, max_len=max_len)


WRONG: dict[str, Callable[[], object]] = {
    "A501": call("causal", Q[0], K, V),
    "A502": call("causal", Q, K.half(), V),
    "A503": call("causal", Q, K.to("meta"), V),
    "A504": call("causal", Q, K[:, :, :3], V),
    "A505": call("causal", Q[:, :1], K, V),
    "A506": call("causal", Q[..., :12], K[..., :12], V),
    "A507": call("band(1, 1)", Q, K[:, :, :5], V[:, :, :5]),
    "A508": lambda: attndsl.compile("causal").source(dtype="float64"),
    "A509": call("causal", Q, K, V, backend="tpu"),
    "A511": call(DOCUMENTS, Q, K, V, doc=IDS.float()),
    "A512": call(DOCUMENTS, Q, K, V, doc=IDS.to("meta")),
    "A513": call(DOCUMENTS, Q, K, V, doc=IDS[:, :3]),
    "A514": lambda: attndsl.compile("attention a(w : int[h]) { attend causal & window(w[h]) }", w=[1, 2, 3])(Q, K, V),
    "A515": call("{ q * q * q <= 5 + k }", *(torch.empty(1, 1, 2048, 8) for _ in range(3)), backend="triton"),
    "A516": call("attention a(w : runtime int) { attend causal & window(w) }", Q, K, V, w=1.5),
    "A517": call(DOCUMENTS, Q, K, V, doc=[0, 1]),
    "A518": call("causal", Q, K, V, scale=torch.tensor(0.5)),
    "A519": call("coarsen(causal, 64, fraction(0.1))", *(torch.empty(1, 1, 1 << 17, 8) for _ in range(3))),
    "A521": call("attention a { weights s  attend causal }", Q, K, V, return_lse=True),
    "A522": call(DOCUMENTS, Q, K, V, docs=IDS),
    "A523": lambda: attndsl.compile(DOCUMENTS).mask(4, 4),
    "A524": lambda: attndsl.compile("causal").mask(4, 4, heads=3, kv_heads=2),
    "A526": call(
        "attention a { input bias : float[h]  score s + bias[h]  attend causal }",
        Q,
        K,
        V,
        bias=torch.zeros(2, requires_grad=True),
    ),
    "A527": lambda: attndsl.nn.Attention("causal", 30, 4),
    "A528": call("causal", Q, K, V, dropout=1.5),
    "A529": call("causal", Q, K, V, dropout=0.5, seed=0.5),
    "A530": lambda: attndsl.compile("causal").source(target="sm_1"),
    "A531": lambda: attndsl.compile("causal").source("sideways"),
    "A532": lambda: attndsl.compile("causal").assembly("forward", "amdgcn", target="sm_90"),
    "A550": lambda: attndsl.compile("causal").decode(Q, K, V, torch.tensor([32])),
    "A551": lambda: attndsl.compile("causal").decode(Q, K, V, LENGTHS, torch.zeros(1, 4, dtype=torch.int64)),
    "A552": lambda: attndsl.compile("causal").decode(Q, K, V, LENGTHS, layout="dhn"),
    "A553": lambda: attndsl.compile("causal").decode(Q, K, V, LENGTHS, k_scale=torch.ones(2)),
    "A554": lambda: attndsl.compile("attention a { align start  attend all }").decode(Q, K, V, LENGTHS),
    "A555": lambda: attndsl.compile("causal").decode(Q.clone().requires_grad_(), K, V, LENGTHS),
    "A557": lambda: paged_cache(2, 3, 48).append(K.repeat(2, 1, 1, 1), V.repeat(2, 1, 1, 1)),
    "A562": lambda: paged_cache(1, 1, 64),
    "A558": lambda: attndsl.compile("attention a { align start  attend all }").evictable(8),
    "A560": lambda: paged_cache(1, 4, 64).top(Q, 1),
    "A566": lambda: attndsl.serving.PagedCache(
        attndsl.compile(f"causal & {MOBA}"), 1, 1, 16, pages=4, max_len=64, dtype=torch.float8_e4m3fn
    ),
    "A567": lambda: attndsl.compile(POOLED).decode(Q, K, V, LENGTHS, views={"pool(mean, 4)": (K, V)}),
    "A568": lambda: attndsl.serving.PagedCache(
        attndsl.compile("attention a { input until : int[b, h, k]  attend causal & { q <= until[k] } }"),
        1,
        1,
        16,
        pages=4,
        max_len=64,
        at_tokens=["until"],
    ).append(K[:1, :1, :1], V[:1, :1, :1]),
    "A569": lambda: attndsl.serving.PagedCache(cast("Any", "causal"), 1, 1, 16, pages=4, max_len=64),
    "A570": lambda: attndsl.compile(SELECTS.format("tokens", "K", "causal")).plan(torch.zeros(1, 2, 32, 8), K[..., :8]),
    "A571": lambda: attndsl.compile(SELECTS.format("blocks(4)", "mean(K)", "all")).plan(Q, K),
    "A572": call(f"causal & {MOBA}", Q, K, V, plans={"far": torch.zeros(1, 2, 8, 1, dtype=torch.int32)}),
    "A573": call(f"causal & {MOBA}", Q, K, V, plans={"top": torch.zeros(2, 8, dtype=torch.int32)}),
    "A575": lambda: attndsl.compile(
        "attention a { x = attend causal { weights s } "
        "y = attend causal & top(1, blocks(4), by = probs(x)) output x + y }"
    )(Q, K, V),
    "A576": lambda: attndsl.compile(
        "attention a { x = attend causal  output x plan p = top(1, tokens, per = head, among = causal, by = probs(x)) }"
    ).plan(*(torch.empty(1, 1, 1 << 17, 8, device="meta") for _ in range(2))),
    "A577": lambda: Selector(
        TILED, TILED.selections[0], CallShape(1, 1, 1, 1 << 17, 1 << 17, 8, 8), torch.device("meta")
    ),
    "A565": call("causal", Q, K, V, views={"pool(mean, 4)": (K, V)}),
    "A580": call("causal", Q, K, V, scales=(None, None, None)),
    "A581": call("causal", Q.to(torch.float8_e4m3fn), *EIGHT_BITS, dropout=0.5),
    "A912": call(
        "attention a { input doc : int[b, k] input m : int[b, k] packed doc attend { m[k] != 1 } over pool(mean, 4) }",
        Q,
        K,
        V,
        doc=IDS,
        m=IDS,
    ),
    "A911": lambda: attndsl.compare("attention a { attend causal over pool(mean, 4) }", "causal"),
    "A535": lambda: attndsl.compile("attention a { attend causal, causal over pool(mean, 4) }").mask(4, 4),
    "A536": lambda: attndsl.compile("attention a { attend { k >= q - 5 } over pool(mean, 2000000000) }").mask(99, 99),
    "A541": lambda: attndsl.compare("causal", "attention a { align start  attend causal }"),
}
# Raised for what a test cannot bring about here, or brings about elsewhere.
ELSEWHERE = {"A001", "A003", "A510", "A520", "A525", "A533", "A534", "A540", "A556", "A574", "A921", "A922"}


@pytest.mark.parametrize("code", [pytest.param(x, marks=interprets if x == "A515" else ()) for x in sorted(WRONG)])
def test_wrong_use_has_a_code_and_is_documented(code: str) -> None:
    with pytest.raises(attndsl.PatternError) as caught:
        WRONG[code]()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    text = (ROOT / "docs" / "diagnostics.md").read_text("utf-8")
    section = text.split(f"### {code} ")[1].split("\n### ")[0]
    quoted = re.findall(r"^```text\n(.*?)\n", section, re.DOTALL | re.MULTILINE)
    assert quoted == [diagnostic.render().splitlines()[0]]


def test_every_code_of_wrong_use_is_listed() -> None:
    files = [*(ROOT / "runtime").glob("*.py"), *(ROOT / "attndsl").glob("*.py")]
    raised = {code for path in files for code in re.findall(r'"(A\d{3})"', path.read_text("utf-8"))}
    assert raised == set(WRONG) | ELSEWHERE
    documented = set(re.findall(r"^### (A\d{3}) ", (ROOT / "docs" / "diagnostics.md").read_text("utf-8"), re.MULTILINE))
    assert raised <= documented
