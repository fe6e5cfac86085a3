"""The examples run, and say what they claim; so do the parts of the benchmarks that need no GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from attndsl.serving import PagedCache
from benchmarks import check_cases, decode, dense, gpu_check, memory, quest, rows, serving, warm
from benchmarks.__main__ import main as benchmark
from benchmarks.peers import CannotRun, Job, Peer
from benchmarks.tables import make_job, measure
from examples import pretrained_encoder as encoder

# Two chapters about loops and one about numbers, of different lengths, so that padding matters.
CHAPTERS = ("while", "for", "floating")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch() -> encoder.Batch:
    return encoder.tokenize([topics[name] for name in CHAPTERS] + ["A short one."], max_tokens=128)


@pytest.fixture(scope="module")
def original(batch: encoder.Batch) -> Tensor:
    return encoder.states_original(batch)


def test_the_batch_is_padded(batch: encoder.Batch) -> None:
    assert batch.ids.shape == (4, 128)
    assert batch.lengths.min() < 16 and batch.lengths.max() == 128


def test_all_gives_the_original_embeddings(batch: encoder.Batch, original: Tensor) -> None:
    result = encoder.compare(batch, encoder.Variant("all", lambda q, k: (q >= 0) & (k >= 0)), original)
    assert result.area == 1.0
    assert result.drift < 1e-5
    torch.testing.assert_close(result.embeddings.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("variant", encoder.VARIANTS[1:], ids=lambda v: v.pattern)
def test_a_sparse_pattern_gives_the_masked_model(
    batch: encoder.Batch, original: Tensor, variant: encoder.Variant
) -> None:
    result = encoder.compare(batch, variant, original)
    assert result.embedding_error < 1e-5
    assert result.state_error < 1e-4
    # The pattern took effect: the original's embeddings are far away.
    assert result.area < 0.7 and result.drift > 1e-2


def test_encoder_main_prints_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    encoder.main(CHAPTERS, max_tokens=48)
    printed = capsys.readouterr().out
    assert all(variant.pattern in printed for variant in encoder.VARIANTS)
    lines = printed[printed.index("under `all`") :].splitlines()[2:5]
    similarity = [[float(x) for x in line.split()[1:]] for line in lines]
    assert similarity[0][1] > similarity[0][2], "`while` is nearer to `for` than to `floating`"


# ------------------------------------------------------------------------------------ benchmarks


def small(n: int, heads: int = 2, dtype: torch.dtype = torch.float32) -> rows.Sizes:
    return rows.Sizes(batch=1, heads=heads, n=n, dim=16, dtype=dtype, device=CPU)


@pytest.mark.parametrize(
    ("name", "n", "pairs"),
    [
        ("causal", 1500, 1500 * 1501 // 2),
        ("window512", 2000, 512 * 513 // 2 + (2000 - 512) * 512),
        ("prefix", 5000, 4096 * 4096 + sum(range(4097, 5001))),
        ("dilated", 1600, sum(q // 16 + 1 for q in range(1600))),
        ("neighborhood", 2048, 2048 * 169),
        ("block_diffusion", 256, 2 * 128 * 32 + 32 * 32 * (3 + 2 + 1) * 2),
    ],
)
def test_area_is_the_closed_form(name: str, n: int, pairs: int) -> None:
    row, sizes = rows.ROWS[name], small(n)
    assert rows.count_pairs(row, sizes, row.inputs(sizes)) == 2 * pairs


def test_a_video_has_a_length_of_its_own() -> None:
    row = rows.ROWS["video"]
    assert row.refuses(small(2048)) and not row.refuses(small(115200))
    rule, token = row.rule(small(115200), {}), torch.arange(115200)
    # A corner, and a place in the middle, each with its whole window.
    for place, first in ((0, (0, 0, 0)), (15 * 3840 + 24 * 80 + 40, (12, 18, 34))):
        seen = rule(torch.tensor(0), torch.tensor(0), torch.tensor(place), token).reshape(30, 48, 80)
        window = tuple(slice(a, a + n) for a, n in zip(first, (7, 13, 13), strict=True))
        assert seen[window].all() and int(seen.sum()) == 7 * 13 * 13


def test_routed_rows_have_their_own_block_and_eight_earlier_ones() -> None:
    row, sizes = rows.ROWS["routed"], small(1024, heads=3)
    keep = row.inputs(sizes)["keep"]
    for lists in keep.tolist():
        for block, listed in enumerate(lists):
            chosen = [x for x in listed if x >= 0]
            assert listed == chosen + [-1] * (9 - len(chosen)) and chosen == sorted(set(chosen))
            assert len(chosen) == min(block, 8) + 1 and chosen[-1] == block
    assert not torch.equal(keep[0], keep[1])
    per_head = 64 * 64 * (sum(range(9)) + 7 * 8) + 16 * 64 * 65 // 2
    assert rows.count_pairs(row, sizes, {"keep": keep}) == 3 * per_head


def test_documents_fill_the_sequence() -> None:
    assert sum(rows.DOCUMENTS) == 16384
    doc = rows.document_ids(small(16384))["doc"][0]
    assert torch.bincount(doc).tolist() == list(rows.DOCUMENTS)


def attention_of(rule: rows.MaskRule, spoil: float = 0.0) -> Callable[[Job], Callable[[], Tensor]]:
    """A peer's `build` that attends by a rule, its output off by `spoil` in one place."""

    def build(job: Job) -> Callable[[], Tensor]:
        positions = torch.arange(job.sizes.n)
        zero = torch.zeros((), dtype=torch.long)
        allowed = rule(zero, zero, positions[:, None], positions)

        def call() -> Tensor:
            out, _ = dense.attend(job.q, job.k, job.v, allowed, torch.float32)
            return out.index_fill(2, torch.tensor([0]), spoil) if spoil else out

        return call

    return build


@pytest.mark.parametrize("backward", [False, True])
def test_only_a_right_result_is_timed(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows.ROWS["sink_window512"]
    right = row.rule(small(700), {})
    wrong: rows.MaskRule = lambda b, h, q, k: right(b, h, q, k) | (q == 699) & (k == 100)  # noqa: E731
    for rule, spoil, passes in ((right, 0.0, True), (wrong, 0.0, False), (right, float("nan"), False)):
        peer = Peer("attndsl", attention_of(rule, spoil))
        monkeypatch.setattr("benchmarks.tables.OURS", peer)
        cell = measure(peer, make_job(row, small(700)), backward, lambda call: 1.0)
        assert (cell.ms == 1.0) is passes
        assert cell.note.startswith("FAILED") is not passes


def test_a_broken_peer_costs_only_its_cell() -> None:
    def refuse(job: Job) -> Callable[[], Tensor]:
        raise CannotRun("not installed")

    def break_down(job: Job) -> Callable[[], Tensor]:
        raise RuntimeError("no kernel\nwith a long explanation")

    job = make_job(rows.ROWS["causal"], small(32))
    assert measure(Peer("p", refuse), job, False, lambda call: 1.0).note == "not installed"
    assert measure(Peer("p", break_down), job, False, lambda call: 1.0).note == "RuntimeError: no kernel"


def test_cpu_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    arguments = ["--n", "640", "--heads", "1", "--rows", "window512", "--peers", "SDPA mask", "--out", str(out)]
    assert benchmark(["cpu", *arguments, "--md"]) == 0
    header, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert header == "| pattern | area | floor ms | attndsl | SDPA mask |"
    assert re.fullmatch(r"\| causal & window\(512\) \| 48.06 % \| - \| \S+ \(\S+\) \| \S+ \(\S+\) \S+x \|", row), row
    (saved,) = json.loads(out.read_text())["rows"]
    ours, peer = (saved["cells"][name]["ms"] for name in ("attndsl", "SDPA mask"))
    assert row.endswith(f" {peer / ours:.2f}x |")


def test_decode_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours agrees with dense attention, contiguous and paged; what does not is not timed."""
    monkeypatch.setattr(decode, "milliseconds", lambda call, device: 0.5)
    sizes = decode.DecodeSizes(2, 4, 2, n=1600, dim=16, dtype=torch.float32, device=CPU)
    header, *table = decode.run_decode(sizes, ["attndsl", "attndsl, pages of 16", "SDPA"])
    assert header == ["pattern", "tokens", "floor MB", "attndsl", "attndsl, pages of 16", "SDPA"]
    rows = [["full", "1600", "0.8"], ["sink(64) | window(1024)", "1600", "0.6"], ["dilated(64)", "1600", "0.0"]]
    assert [row[:3] for row in table] == rows
    assert all(cell.startswith("500.0 us (") for row in table for cell in row[3:])
    monkeypatch.setitem(decode.CONTENDERS, "SDPA", lambda row, caches: lambda i: caches.q[i] + 1)
    assert [*decode.run_decode(sizes, ["SDPA"])][1][3].startswith("FAILED: error")


def test_quest_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention within the chosen pages is right, and these are the best ones; where they are not, nothing is timed."""
    monkeypatch.setattr(quest, "milliseconds", lambda call, device: 0.5)
    sizes = decode.DecodeSizes(2, 4, 2, n=1600, dim=16, dtype=torch.float32, device=CPU)
    header, *table = quest.run_quest(sizes)
    assert header == ["operation", "tokens", "time", "all pages / this"]
    assert [row[1:] for row in table] == [["1600", "500.0 us", "1.0x"]] * 5
    others = torch.arange(64, dtype=torch.int32).expand(2, 2, 1, 64)
    monkeypatch.setattr(PagedCache, "top", lambda *_: others)
    assert [*quest.run_quest(sizes)][1] == ["the three", "1600", "FAILED: a better page was left out", ""]


def test_serving_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bar of serving has a row, checked before it is timed; a slow one says so."""
    times = iter([0.002, 0.001, *[0.02] * 30])
    monkeypatch.setattr(decode, "milliseconds", lambda call, device: next(times))
    monkeypatch.setattr(quest, "milliseconds", lambda call, device: next(times))
    sizes = decode.DecodeSizes(2, 4, 2, n=2048, dim=16, dtype=torch.float32, device=CPU)
    header, *table = serving.run_serving(sizes, short=512)
    assert header == ["what", "tokens", "time", "bar", "met"]
    rows = {(row[0], row[1]): row[2:] for row in table}
    assert rows["SDPA, full", "2048"] == ["1.0 us", "", ""]
    assert rows["full", "2048"] == ["2.0 us", "1 us: SDPA + 5 %, or 2.9 TB/s", "NO"]
    near = "sink(64) | window(1024)"
    assert rows[near, "512"] == rows[near, "2048"] == ["20.0 us", "20 us", "yes"]
    for page in (16, 64, 256):
        assert rows[f"{near}, pages of {page}", "2048"] == ["20.0 us", "22.0 us: contiguous + 10 %", "yes"]
    assert rows["Quest: the three", "2048"] == ["20.0 us", "4.0x", "NO"]
    assert rows["NSA, a whole step", "2048"] == ["20.0 us", "", ""]


def test_growth_of_memory_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row an example; a length that cannot be run costs its cell."""
    monkeypatch.setattr(memory, "growth_cell", lambda name, n, heads, dim, dtype: f"{name} {n // 1024}")
    table = list(memory.run_growth([16384, 262144], 2, 16, torch.float32))
    assert table[0] == ["example", "16K", "256K"]
    assert [row[0] for row in table[1:]] == list(memory.ROUTED)
    assert table[1][1:] == ["moba 16", "moba 256"]
    if not torch.cuda.is_available():
        monkeypatch.undo()
        assert memory.growth_cell("moba", 64, 2, 16, torch.float32)
        assert benchmark(["growth"]) == 2


def test_unknown_rows_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["cpu", "--rows", "causal,nope"]) == 2
    assert "no row called nope; there are causal" in capsys.readouterr().err


def test_least_memory_counts_every_tensor_once_and_its_gradient() -> None:
    q, k, v = torch.empty(2, 4, 10, 16), torch.empty(2, 2, 30, 16), torch.empty(2, 2, 30, 24)
    out, lse = torch.empty(2, 4, 10, 24), torch.empty(2, 4, 10)
    expected = sum(2 * x.untyped_storage().nbytes() for x in (q, k, v, out, lse))
    assert memory.least_bytes(q, k, v) == expected


@pytest.mark.parametrize("case", check_cases.CASES, ids=lambda case: case.name)
def test_check_cases_agree_with_the_compiler(case: check_cases.Case) -> None:
    shape = check_cases.Shape(2, 4, 2, rows=40, k_len=131, dim=16, v_dim=8, dtype=torch.float32, strided=True)
    assert gpu_check.check(case, shape, CPU, backward=True, seed=5) == []


def test_processes_share_the_checks() -> None:
    """Together the shares plan each call once."""
    options = gpu_check.parser().parse_args(["--device", "cpu", "--seconds", "0", "--composed", "7", "--shapes", "2"])
    options.composed_seconds = 0.0
    whole = gpu_check.check_share(options, (0, 1))
    shares = [gpu_check.check_share(options, (part, 3)) for part in range(3)]
    assert whole.planned == sum(share.planned for share in shares) > 7
    assert whole.run == 0


def test_a_table_is_compiled_ahead() -> None:
    sizes = rows.Sizes(1, 1, 64, 16, torch.float32, CPU)
    assert warm.first_call("causal", "attndsl", sizes, True, None) == ""
    assert warm.first_call("documents", "attndsl", sizes, False, None) == ""
    assert "KeyError" in warm.first_call("causal", "nobody", sizes, False, None)
