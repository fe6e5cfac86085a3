"""`from pool(f, size)`: queries pooled, in the place of each the function of its class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from tests.covered import covers
from tests.routing_rules import DIM, HEADS, SHARE, best, call, check, noise, softmax
from tests.test_view_calls import judge, text_of

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
FINE = "fine = attend causal & top(2, blocks(8), per = rows(8), by = probs(coarse), always = same_block(8))"
BODIES = [
    "coarse = attend all over pool(mean, 4) from pool(mean, 8)\n output coarse",
    "coarse = attend causal over pool(max, 8) from pool(max, 4) { score softcap(s, 2.0) softmax with sink sinks[h] }\n"
    "output coarse",
    "coarse = attend band(19, 3) over pool(mean, 4, visible = any) from pool(sum, 3)\n output gates[0] * coarse",
    "coarse = attend causal over pool(mean, 4) from pool(mean, 8), causal over given(kc, vc, 4) from pool(mean, 8)\n"
    "output coarse",
    f"coarse = attend causal over pool(mean, 8) from pool(mean, 8)\n {FINE}\n output channels * coarse + fine",
    "coarse = attend causal over pool(mean, 16) from pool(min, 16)\n"
    "far = attend causal within blocks(16) with probs(coarse)\n output far",
    "plan sel = top(2, blocks(8), per = rows(8), among = causal, by = dot(mean(Q), mean(K)))\n"
    "coarse = attend sel over pool(mean, 4) from pool(mean, 8)\n output coarse",
    "coarse = attend causal & window(20) from pool(mean, 8) { softmax with sink sinks[h] }\n output channels * coarse",
    "coarse = attend causal & window(9) from pool(max, 4), causal over pool(mean, 4) from pool(max, 4)\n output coarse",
    "align start\n coarse = attend band(9, 9) over pool(mean, 4) from pool(mean, 8)\n output coarse",
]
SHAPES = [(2, 4, 2, 37, 37, 16, 16), (1, 2, 1, 1, 1, 16, 24), (1, 3, 3, 13, 38, 40, 16)]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_cpu(body: str, shape: tuple[int, ...]) -> None:
    judge(attndsl.compile(text_of(body)), shape, torch.float64, "cpu")


@pytest.mark.parametrize("body", BODIES)
def test_in_triton(body: str) -> None:
    judge(attndsl.compile(text_of(body)), (1, 2, 1, 13, 38, 16, 16), torch.float32, "triton")


@pytest.mark.parametrize("rows", [37, 13])
def test_the_rule(rows: int) -> None:
    """Row by row: the mean of the call's rows of its class, and the entries that all of the class see."""
    q, k, v = call(37, rows)
    attn = attndsl.compile("attention a { far = attend causal over pool(mean, 4) from pool(mean, 8)\n output far }")
    found, positions = attn(q, k, v), np.arange(37 - rows, 37)
    for h, i in np.ndindex(HEADS, rows):
        own = positions // 8 == positions[i] // 8
        x, keys, values = q[0, h].numpy()[own].mean(0), k[0, h // SHARE].numpy(), v[0, h // SHARE].numpy()
        finished = positions[i] // 8 * 8 // 4 + (1 if positions[i] // 8 * 8 % 4 == 3 else 0)
        expected = np.zeros(DIM)
        if finished:
            entries = [np.stack([y[4 * m : 4 * m + 4].mean(0) for m in range(finished)]) for y in (keys, values)]
            expected = softmax(entries[0] @ x / DIM**0.5) @ entries[1]
        np.testing.assert_allclose(found[0, h, i].numpy(), expected, atol=1e-12)


def test_of_raw_tokens() -> None:
    """The mean of a class's rows, and the tokens that all of the class see."""
    q, k, v = call(37)
    found = attndsl.compile("attention a { x = attend causal from pool(mean, 8)\n output x }")(q, k, v)
    for h, i in np.ndindex(HEADS, 37):
        own = np.arange(37) // 8 == i // 8
        seen = i // 8 * 8 + 1
        keys, values = (x[0, h // SHARE, :seen].numpy() for x in (k, v))
        expected = softmax(keys @ q[0, h].numpy()[own].mean(0) / DIM**0.5) @ values
        np.testing.assert_allclose(found[0, h, i].numpy(), expected, atol=1e-12)


def test_levels_of_pooled_queries() -> None:
    """Those of factor 1 are attended by classes too."""
    attn = attndsl.compile(
        "attention a { plan lv = levels((1, 2), blocks(8), per = rows(8), quantiles = (0.4, 0.8), among = causal, "
        "by = antidiagonal(Q, K, 4), always = same_block(8))\n"
        "x = attend causal over lv from pool(mean, 4)\n output x }"
    )
    q, k, v = call(37)
    plans = attn.plan(q, k)
    torch.testing.assert_close(attn(q, k, v, plans=plans), attn.reference(q, k, v, plans=plans))


def test_every_part_says_so() -> None:
    text = "attention a { x = attend causal, causal over pool(mean, 4) from pool(mean, 8)\n output x }"
    with pytest.raises(attndsl.PatternError, match="A078"):
        attndsl.compile(text)


def test_rows_of_a_class_are_one() -> None:
    q, k, v = call(40)
    out = attndsl.compile(text_of(BODIES[0]))(q, k, v)
    assert (out.unflatten(2, (-1, 8)) == out.unflatten(2, (-1, 8))[:, :, :, :1]).all()
    assert not (out[:, :, 0] == out[:, :, 8]).any()


@pytest.mark.parametrize(
    ("body", "backend"), [*((x, "cpu") for x in (*BODIES[:2], *BODIES[4:9])), (BODIES[8], "triton")]
)
def test_decode(body: str, backend: str) -> None:
    """Rows of a call that are of one class are pooled, wherever in a sequence they stand."""
    attn, dtype = attndsl.compile(text_of(body)), torch.float64 if backend == "cpu" else torch.float32
    generator = torch.Generator().manual_seed(2)
    sizes = ((3, 4, 5, 16), (3, 2, 40, 16), (3, 2, 40, 16))
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    made = {"sinks": torch.randn(4, generator=generator), "channels": torch.randn(3, 4, 5, 16, generator=generator)}
    given: dict[str, Any] = {decl.name: made[decl.name].to(dtype) for decl in attn.program.inputs if decl.name in made}
    lengths = torch.tensor([38, 21, 3], dtype=torch.int32)
    found = attn.decode(q, k, v, lengths, backend=backend, **given)
    tolerance = 1e-10 if backend == "cpu" else 2e-5
    for b, n in enumerate(lengths.tolist()):
        rows = min(5, n)
        own = {name: (x[b : b + 1, :, -rows:] if name == "channels" else x).double() for name, x in given.items()}
        qkv = (x[b : b + 1, :, at].double() for x, at in ((q, slice(5 - rows, 5)), (k, slice(n)), (v, slice(n))))
        exact = attn.reference(*qkv, **own)
        torch.testing.assert_close(found[b : b + 1, :, 5 - rows :].double(), exact, atol=tolerance, rtol=tolerance)
        assert not found[b, :, : 5 - rows].any()


def test_what_was_understood() -> None:
    attn = attndsl.compile(text_of(BODIES[0]))
    assert "from pool(mean, 8)" in str(attn.explain(64))


# ------------------------------------------------------------------------------------------- VSA


def _video(n: int, gate: Tensor, to_tiles: np.ndarray[Any, Any]) -> Any:
    """The rule on a video [frames, rows, columns], which it tiles itself."""

    def rule(q: Tensor, k: Tensor, v: Tensor, given: Any) -> Tensor:
        place = np.empty(512, np.int64)
        place[to_tiles] = np.arange(512)
        of_video = [x[:, :, place].reshape(*x.shape[:2], 8, 8, 8, -1) for x in (q, k, v, given["gate"])]
        cubes = [(slice(t, t + 4), slice(y, y + 4), slice(x, x + 4)) for t, y, x in np.ndindex(8, 8, 8)]
        cubes = [c for c in cubes if not any(s.start % 4 for s in c)]
        videos = []
        for h in range(HEADS):
            out = torch.zeros(8, 8, 8, DIM, dtype=torch.float64)
            tiles = [[x[0, h if x.shape[1] == HEADS else h // SHARE][c].flatten(0, 2) for c in cubes] for x in of_video]
            queries, keys, values = (torch.stack([x.mean(0) for x in y]) for y in tiles[:3])
            coarse = (queries @ keys.T / DIM**0.5).softmax(-1)
            ranked = coarse.detach()
            for i, c in enumerate(cubes):
                chosen = best({m: float(ranked[i, m]) for m in range(len(cubes))}, n)
                own_keys, own_values = (torch.cat([x[m] for m in chosen]) for x in tiles[1:3])
                fine = (tiles[0][i] @ own_keys.T / DIM**0.5).softmax(-1) @ own_values
                out[c] = (tiles[3][i] * (coarse[i] @ values) + fine).reshape(4, 4, 4, DIM)
            videos.append(out.flatten(0, 2)[torch.from_numpy(to_tiles)])
        return torch.stack(videos)[None]

    return rule


def tile_order() -> np.ndarray[Any, Any]:
    """The row-major place in the video of each token, which run tile by tile."""
    places = np.arange(512).reshape(2, 4, 2, 4, 2, 4)
    return places.transpose(0, 2, 4, 1, 3, 5).reshape(-1)


@covers("vsa")
@pytest.mark.parametrize("n", [1, 3])
def test_vsa(n: int) -> None:
    gate = noise(1, HEADS, 512, DIM)
    check("vsa", call(512), _video(n, gate, tile_order()), {"n": n}, ("gate",), gate=gate)


def test_vsa_forces_nothing() -> None:
    """A tile of queries need not attend to itself."""
    attn = attndsl.compile("examples/patterns/vsa.attn", n=1)
    q, k, _ = call(512)
    (plan,) = attn.plan(q, k, gate=noise(1, HEADS, 512, DIM)).values()
    assert (plan[..., 0] != torch.arange(8)).any()


def test_plans_of_values_of_another_dimension() -> None:
    """A gate of channels has the values' dimension, which choosing does not know."""
    q, k, _ = call(40)
    attn = attndsl.compile(text_of(BODIES[4]))
    gate = noise(1, HEADS, 40, 24)
    plans = attn.plan(q, k, channels=gate)
    wide = noise(1, k.shape[1], 40, 24, seed=5)
    torch.testing.assert_close(attn(q, k, wide, channels=gate), attn(q, k, wide, channels=gate, plans=plans))


@pytest.mark.parametrize("clause", ["", "align start", "lengths n"])
@pytest.mark.parametrize("view", ["over pool(mean, 8)", "from pool(mean, 8)", "over pool(mean, 8) from pool(mean, 4)"])
@pytest.mark.parametrize("coarse", [
    "coarsen(prefix(n[b]), 3, all)", "coarsen(causal, (3, 5), any)", "~coarsen({ q < n[b] - 1 }, 1, all)",
])  # fmt: skip
def test_coarsened_past_the_ends(clause: str, view: str, coarse: str) -> None:
    """Extents and classes reach past the last position; a block that lies there is the last one."""
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n {clause}\n attend {coarse} {view} }}")
    x = torch.randn(3, 1, 21, 8, dtype=torch.float64)
    given: dict[str, Any] = {"n": torch.tensor([3, 20, 21])}
    torch.testing.assert_close(attn(x, x, x, **given), attn.reference(x, x, x, **given))
