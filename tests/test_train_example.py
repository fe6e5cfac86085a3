"""The training example: it trains, its curves agree, it notices when they should not, and leaves what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor

import attndsl
from examples import char_lm, train_char_lm
from examples.train_char_lm import PATTERN, Result, settings_for, train, ways_to_attend

CPU = torch.device("cpu")
TEXT = char_lm.reference_manual()[:20_000]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More would wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def short_run(steps: int = 8, dtype: str = "float32", pattern: str = PATTERN, context: int = 70) -> Result:
    return train(settings_for(TEXT, pattern, CPU, steps, context, batch=2, dtype=dtype), TEXT)


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-13), ("float32", 1e-5), ("bfloat16", 1e-2)])
def test_the_curves_agree(dtype: str, most: float) -> None:
    result = short_run(dtype=dtype)
    assert result.first_disagreement is None
    assert max(result.differences) < most and max(result.allowed) < 50 * most
    for run in (result.compiled, result.dense, result.reordered):
        assert len(run.losses) == 8 and run.losses[-1] < run.losses[0] - 0.3
        assert run.losses[0] - 1.5 < run.held_out < run.losses[0]


def one_token_more(settings: Any) -> Any:
    wider = attndsl.compile("causal & (window(65) | sink(4))")
    return ways_to_attend(settings) | {"compiled": lambda _layer, q, k, v: wider(q, k, v)}


def steeper_keys(settings: Any) -> Any:
    """The values of `compiled`, and gradients of k that are 0.1 % too large."""
    ways = ways_to_attend(settings)

    def steeper(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ways["compiled"](layer, q, k + 1e-3 * (k - k.detach()), v)

    return ways | {"compiled": steeper}


def no_number(settings: Any) -> Any:
    return ways_to_attend(settings) | {"compiled": lambda _layer, q, _k, _v: q * float("nan")}


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [(one_token_more, "float32"), (one_token_more, "float64"), (steeper_keys, "float64"), (no_number, "float32")],
)
def test_a_wrong_attention_parts_the_curves(wrong: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_char_lm, "ways_to_attend", wrong)
    assert short_run(dtype=dtype).first_disagreement is not None


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture shows both curves, the checkpoint holds the trained model, and a disagreement is an exit status."""
    monkeypatch.setattr(train_char_lm, "reference_manual", lambda: TEXT)
    train_char_lm.main(out=tmp_path / "new", steps=3, context=70, device="cpu")
    printed = capsys.readouterr().out
    assert "The curves agree at every step" in printed and "held out" in printed
    picture = Image.open(tmp_path / "new" / "train_char_lm.png").convert("RGB")
    pixels = np.asarray(picture, int)
    for colour in ((0x1D, 0x4E, 0xD8), (0xFD, 0xBA, 0x74)):
        assert (abs(pixels - colour).max(-1) < 40).sum() > 300, "a curve across the picture, smoothed"
    model = char_lm.load(tmp_path / "new" / "char_lm.pt")
    assert model.config.pattern == PATTERN and model.config.vocabulary == "".join(sorted(set(TEXT)))

    monkeypatch.setattr(train_char_lm, "ways_to_attend", no_number)
    with pytest.raises(typer.Exit) as stopped:
        train_char_lm.main(out=tmp_path, steps=3, context=70, device="cpu")
    assert stopped.value.exit_code == 1
    assert "The curves part at step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("band(4, 4)", "what it is to predict: q = 0, k = 1"),
        ("attention a { input doc : int[b, k] sorted\n attend causal & document(doc) }", "takes doc"),
        ("attention a { score softcap(s, 5.0)\n attend causal }", "leave only `attend`"),
        ("causal & windw(9)", "windw"),
    ],
)
def test_refused_patterns(pattern: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped:
        train_char_lm.main(pattern=pattern, out=tmp_path, steps=1, context=8, device="cpu")
    assert stopped.value.exit_code == 2
    assert reason in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_checkpoint(tmp_path: Path) -> None:
    model = short_run(2).compiled.model
    char_lm.save(model, tmp_path / "model.pt")
    loaded = char_lm.load(tmp_path / "model.pt")
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_model_over_a_cache() -> None:
    """As a generator calls it: attention appends to a cache, `positions` say where the new tokens stand."""
    attn = attndsl.compile("causal & (window(9) | sink(2))")
    torch.manual_seed(0)
    model = char_lm.CharLM(char_lm.Config(char_lm.vocabulary_of(TEXT), "causal", 40))
    ids = model.encode(TEXT[:40])
    assert model.decode(ids) == TEXT[:40]
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in cache:
            k, v = (torch.cat((old, new), 2) for old, new in zip(cache[layer], (k, v), strict=True))
        cache[layer] = k, v
        out: Tensor = attn(q, k, v)
        return out

    with torch.no_grad():
        whole = model(ids[None], lambda _layer, q, k, v: attn(q, k, v))
        for first, last in ((0, 30), (30, 39), (39, 40)):
            part = model(ids[None, first:last], cached, torch.arange(first, last))
            torch.testing.assert_close(part, whole[:, first:last], rtol=1e-4, atol=1e-5)
