"""The generation example: each token is that of the whole prefix, wrong caches are noticed, memory stays flat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import attndsl
from examples import char_lm, generate
from examples.char_lm import CharLM, Config
from examples.generate import ROUNDINGS, Request, ways
from examples.train_char_lm import Settings, settings_for

TEXT = char_lm.reference_manual()[:2000]
PATTERN = "causal & (window(9) | sink(2))"
# A row reads at most 12 of up to 55 tokens, chosen anew at each.
ROUTED = "causal & top(3, blocks(4), by = dot(Q, mean(K)), share = group, always = same_block(4))"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More would wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> CharLM:
    """Random weights, large enough that attention matters to the logits."""
    torch.manual_seed(0)
    made = CharLM(Config(char_lm.vocabulary_of(TEXT), PATTERN, 64, layers=2, dim=32, heads=4, kv_heads=2))
    for parameter in made.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", range(6))
def test_each_token_is_that_of_the_whole_prefix(model: CharLM, way: int, temperature: float) -> None:
    ids = model.encode(TEXT[:40])
    name, attn, caches = ways(model, 55, 4, ROUTED)[way]
    written: list[str] = []
    story = generate.generate(name, model, attn, caches, Request(ids, 15, temperature), written.append)
    assert story.disagreement is None and max(story.differences) < ROUNDINGS
    assert (
        len(story.ids) == 55 and torch.equal(story.ids[:40], ids) and "".join(written) == model.decode(story.ids[40:])
    )
    if temperature == 0:
        whole = generate.recompute(model, attn, story.ids[:-1])
        assert story.ids[-1] == whole.argmax()
    sizes = [caches[0].bytes for _, _, caches in ways(model, 400, page=4)]
    assert sizes[3] < sizes[0] / 2, "pages that are given back are room for others"


@pytest.mark.parametrize("paged", [False, True])
def test_a_wrong_cache_is_noticed(model: CharLM, paged: bool) -> None:
    """A window one token too wide parts from the whole prefix as soon as the window is full."""
    attn, wider = attndsl.compile(PATTERN), attndsl.compile("causal & (window(10) | sink(2))")

    def cache(_layer: int) -> Any:
        return generate.paged_cache(wider, model, 60, 4) if paged else generate.ContiguousCache(wider, model, 60)

    story = generate.generate("", model, attn, [cache(0), cache(1)], Request(model.encode(TEXT[:9]), 8))
    assert story.disagreement == 4, "of twelve tokens the last row sees one too many: the third, which is no sink"


def test_memory_stays_flat(model: CharLM) -> None:
    found = generate.endure(attndsl.compile(PATTERN), model, tokens=20_000, page=16, chunk=256)
    assert found.tokens == 20_224 and len(set(found.held[1:])) == 1 and found.error < 1e-5
    assert found.bytes < found.bytes_of_all / 50
    with pytest.raises(attndsl.PatternError, match="may be read again"):
        generate.endure(attndsl.compile("causal"), model, tokens=2000, page=16, chunk=256)


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains a model and keeps it, streams six stories, and a disagreement is an exit status."""
    monkeypatch.setattr(char_lm, "reference_manual", lambda: TEXT)
    monkeypatch.setattr("examples.generate.settings_for", small_settings)
    options: dict[str, Any] = {
        "prompt": TEXT[:20],
        "tokens": 12,
        "steps": 1,
        "long": 9000,
        "out": tmp_path,
        "device": "cpu",
    }
    generate.main(**options)
    printed = capsys.readouterr().out
    assert printed.count(TEXT[:20]) == 6 and "all equal" in printed and "Every token is that" in printed
    assert (tmp_path / "generate_char_lm.pt").exists() and "12,288 tokens in one layer's cache" in printed
    monkeypatch.setattr(
        generate, "recompute", lambda _model, _attn, _ids: torch.tensor(float("nan")).expand(len(set(TEXT)))
    )
    with pytest.raises(typer.Exit) as stopped:
        generate.main(**options)
    assert stopped.value.exit_code == 1
    with pytest.raises(typer.Exit) as stopped:
        generate.main(**options | {"prompt": "\0"})
    assert stopped.value.exit_code == 2


def small_settings(text: str, pattern: str, device: torch.device, steps: int, **_sizes: int) -> Settings:
    return settings_for(text, pattern, device, steps, context=32, batch=1)
