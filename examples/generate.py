"""Generate text with a small language model, over caches that a pattern bounds, and check every token of it.

    python examples/generate.py
    python examples/generate.py --model runs/char_lm.pt --prompt "The yield expression" --tokens 400

The model is the one of train_char_lm.py: its checkpoint where `--model` names one, else it is trained here for a
while (the first run; the weights are kept in `--out`) on the language reference that every Python carries. On a CPU
the whole takes about two minutes.

The same weights generate six times: with full causal attention, with the pattern that they were trained with, and with
blocks of keys that each row chooses for itself (`--routed`), each over a contiguous cache and over one in pages, from
which goes what the pattern can no longer read. Prompts go in by chunks, then tokens one by one, all through
`attn.decode`.

At every step the logits are computed once more from the whole prefix, without a cache, by torch's dense attention and
the pattern as a mask (the oracle's), or where the data chooses by the oracle itself. Both must have the same greatest
logit and draw the same token, and no logit may differ by more than `ROUNDINGS` times what rounds the largest one in
float32. If ever one does, the exit status is 1.

At last a layer's cache is fed past 2^20 tokens: what it holds stays what it was after the first few thousand, and its
rows stay those of attention to everything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Run by its path, a script sees its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attndsl
import attndsl.serving
from examples import char_lm
from examples.char_lm import CharLM
from examples.train_char_lm import PATTERN, Run, check_pattern, random_batch, settings_for, start, take_step

# Right computations were seen to differ by up to 9 of these, a window one token too wide by 3,000 and more.
ROUNDINGS = 64.0
# Tokens of a prompt that are taken in at once.
CHUNK = 32
MILLION = 1 << 20
# MoBA's (arXiv 2502.13189): the own block of a row, and the three before it whose mean key it likes best.
ROUTED = "causal & top(4, blocks(16), by = dot(Q, mean(K)), share = group, always = same_block(16))"
PROMPT = "The following sections describe the syntax and semantics of "


class Cache(Protocol):
    """A layer's keys and values, and how queries attend to them."""

    @property
    def bytes(self) -> int: ...
    def append(self, k: Tensor, v: Tensor) -> None: ...
    def decode(self, q: Tensor) -> Tensor: ...


class ContiguousCache:
    """One sequence, its tokens one after another, with room for `capacity` of them: k and v [1, Hkv, capacity, D].

    `views`: what the pattern's selections go by, of each block of keys: changed by the tokens that belong to it.
    """

    def __init__(self, attn: attndsl.Attention, model: CharLM, capacity: int) -> None:
        self.attn, self.length = attn, 0
        weight, config = model.embedding.weight, model.config
        self.k, self.v = (weight.new_zeros(1, config.kv_heads, capacity, config.head_dim) for _ in range(2))
        self.seq_lens = torch.zeros(1, dtype=torch.int32, device=weight.device)
        self.views = attn.views(self.k, self.v, self.seq_lens)

    @property
    def bytes(self) -> int:
        entries = (x for each in self.views.values() for x in each)
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.seq_lens, *entries))

    def append(self, k: Tensor, v: Tensor) -> None:
        new = slice(self.length, self.length + k.shape[2])
        self.k[:, :, new], self.v[:, :, new] = k, v
        self.length = new.stop
        self.seq_lens += k.shape[2]
        attndsl.serving.update_views(self.attn, self.views, self.k, self.v, self.seq_lens, new=k.shape[2])

    def decode(self, q: Tensor) -> Tensor:
        out: Tensor = self.attn.decode(q, self.k, self.v, self.seq_lens, views=self.views)
        return out


def paged_cache(attn: attndsl.Attention, model: CharLM, capacity: int, page: int) -> attndsl.serving.PagedCache:
    """One sequence in pages: as many as it ever holds at once, which a pattern that forgets keeps few."""
    weight, config = model.embedding.weight, model.config
    return attndsl.serving.PagedCache(
        attn, 1, config.kv_heads, config.head_dim, pages=most_pages(attn, capacity, page), max_len=capacity, page=page,
        dtype=weight.dtype, device=weight.device,
    )  # fmt: skip


def most_pages(attn: attndsl.Attention, capacity: int, page: int, chunk: int = CHUNK) -> int:
    """Pages of a sequence that are held at once at most, while it grows by chunks up to `capacity` tokens."""

    def held(tokens: int) -> int:
        return -(-min(tokens + chunk, capacity) // page) - len(attn.evictable(tokens, page))

    return max(held(tokens) for tokens in range(0, capacity, page))


# ------------------------------------------------------------------------------------- generating


@dataclass(slots=True)
class Story:
    """What was generated in one way, and how it compares. `differences`: of the logits, largest of each step, in
    roundings of the largest logit. `disagreement`: the first step, from 1, whose token or logits are not those of the
    whole prefix."""

    name: str
    ids: Tensor
    cache_bytes: int = 0
    prompt_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    disagreement: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """`ids` int64 [n], the prompt; `tokens` to add to it. `temperature` 0 is greedy; above, a token is drawn by adding
    Gumbel noise to the logits, from `seed`."""

    ids: Tensor
    tokens: int
    temperature: float = 0.0
    seed: int = 0


def feed(model: CharLM, caches: list[Cache], ids: Tensor, first: int) -> Tensor:
    """Logits [vocabulary] after ids [n], which stand at `first` and on."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches[layer].append(k, v)
        return caches[layer].decode(q)

    logits: Tensor = model(ids[None], attend, torch.arange(first, first + len(ids), device=ids.device))[0, -1]
    return logits


def recompute(model: CharLM, attn: attndsl.Attention, ids: Tensor) -> Tensor:
    """The same logits from the whole prefix ids [n], no cache: by dense attention and a mask, or by the oracle."""
    config, n = model.config, len(ids)
    if attn.program.selections:
        exact: Tensor = model(ids[None], lambda _layer, q, k, v: attn.reference(q, k, v).to(q.dtype))[0, -1]
        return exact
    mask = torch.from_numpy(attn.mask(n, n, config.heads, config.kv_heads))[None].to(ids.device)

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(config.heads // config.kv_heads, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    logits: Tensor = model(ids[None], attend)[0, -1]
    return logits


@torch.no_grad()
def generate(
    name: str, model: CharLM, attn: attndsl.Attention, caches: list[Cache], request: Request,
    write: Callable[[str], None] = lambda _text: None,
) -> Story:  # fmt: skip
    """Generate over caches, one a layer, and check each token. `write` is given the text as it comes."""
    story = Story(name, request.ids, sum(cache.bytes for cache in caches))
    noise = torch.Generator().manual_seed(request.seed)
    began = time.perf_counter()
    for first in range(0, len(request.ids), CHUNK):
        logits = feed(model, caches, request.ids[first : first + CHUNK], first)
    synchronise(logits)
    story.prompt_seconds = time.perf_counter() - began
    for step in range(1, request.tokens + 1):
        uniform = torch.rand(logits.shape, generator=noise).to(logits.device)
        gumbel = -torch.log(-torch.log(uniform)) * request.temperature
        exact = recompute(model, attn, story.ids)
        token = (logits + gumbel).argmax()
        rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
        story.differences.append(float((logits - exact).abs().max()) / rounding)
        same = bool(token == (exact + gumbel).argmax()) and bool(logits.argmax() == exact.argmax())
        # Written so that what is no number disagrees.
        if not (same and story.differences[-1] <= ROUNDINGS) and story.disagreement is None:
            story.disagreement = step
        write(model.decode(token[None]))
        began = time.perf_counter()
        logits = feed(model, caches, token[None], len(story.ids))
        synchronise(logits)
        story.seconds.append(time.perf_counter() - began)
        story.ids = torch.cat((story.ids, token[None]))
    return story


def synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def ways(
    model: CharLM, capacity: int, page: int, routed: str = ROUTED
) -> list[tuple[str, attndsl.Attention, list[Cache]]]:
    """The six ways to generate: a name, a pattern, and a cache for each layer."""
    found: list[tuple[str, attndsl.Attention, list[Cache]]] = []
    layers = range(model.config.layers)
    for kind, pattern in (("dense", "causal"), ("pattern", model.config.pattern), ("routed", routed)):
        attn = attndsl.compile(pattern)
        found += [
            (f"{kind}, contiguous", attn, [ContiguousCache(attn, model, capacity) for _ in layers]),
            (f"{kind}, in pages", attn, [paged_cache(attn, model, capacity, page) for _ in layers]),
        ]
    return found


# --------------------------------------------------------------------------------- for a long time


@dataclass(frozen=True, slots=True)
class Endurance:
    """One layer's cache, fed `tokens` random keys. `held`: pages after each chunk. `bytes_of_all`: what all keys and
    values would take. `error`: the largest difference of a row to float64 attention to the keys it may read."""

    tokens: int
    bytes: int
    bytes_of_all: int
    held: tuple[int, ...]
    error: float


def endure(
    attn: attndsl.Attention, model: CharLM, tokens: int = MILLION, page: int = 16, chunk: int = 4096
) -> Endurance:
    """Feed a cache past `tokens` tokens, in a pool that is as large as the first four chunks need.

    Raises `PatternError` (A562) where the pattern keeps more pages of longer texts.
    """
    config, device = model.config, model.embedding.weight.device
    per_token = 2 * config.kv_heads * config.head_dim

    def chunk_number(n: int) -> tuple[Tensor, Tensor]:
        """The n-th chunk's keys and values, made anew whenever they are asked for."""
        generator = torch.Generator(device).manual_seed(int(n))
        both = torch.randn(2, 1, config.kv_heads, chunk, config.head_dim, generator=generator, device=device)
        return both[0], both[1]

    def exact(q: Tensor, length: int) -> Tensor:
        reads = attn.mask(1, length)[0, 0].nonzero()[0]
        chunks = [(chunk_number(n), reads[reads // chunk == n] % chunk) for n in np.unique(reads // chunk)]
        k, v = (torch.cat([both[i][:, :, at] for both, at in chunks], 2).double() for i in range(2))
        return scaled_dot_product_attention(q.double(), k, v, enable_gqa=True)

    cache = attndsl.serving.PagedCache(
        attn, 1, config.kv_heads, config.head_dim, pages=most_pages(attn, 4 * chunk, page, chunk),
        max_len=tokens + chunk, page=page, device=device,
    )  # fmt: skip
    held, error = list[int](), 0.0
    for n in range(tokens // chunk + 1):
        cache.append(*chunk_number(n))
        held.append(cache.pages_held)
        if n % 32 == 0:
            q = torch.randn(1, config.heads, 1, config.head_dim, device=device)
            far = (cache.decode(q).double() - exact(q, cache.lengths[0])).abs().max()
            error = max(error, float(far))
    all_bytes = cache.lengths[0] * per_token * cache.k.element_size()
    return Endurance(cache.lengths[0], cache.bytes, all_bytes, tuple(held), error)


# ------------------------------------------------------------------------------------ command line


def model_for(path: Path | None, out: Path, steps: int, device: torch.device, console: Console) -> CharLM:
    """The checkpoint, else one that was trained here before, else one that is."""
    kept = out / "generate_char_lm.pt"
    if path is not None or kept.exists():
        return char_lm.load(path or kept, device)
    text = char_lm.reference_manual()
    settings = settings_for(text, PATTERN, device, steps, context=256, batch=4 if device.type == "cpu" else 64)
    torch.manual_seed(settings.seed)
    attn = attndsl.compile(PATTERN)
    run: Run = start("compiled", lambda _layer, q, k, v: attn(q, k, v), CharLM(settings.config).to(device), settings)
    ids, generator = run.model.encode(text).to(device), torch.Generator().manual_seed(settings.seed)
    for step in track(range(steps), f"training on {len(text):,} characters", console=console):
        take_step(run, random_batch(ids, settings, generator), step, settings)
    console.print(Text(f"loss {run.losses[0]:.3f} to {run.losses[-1]:.3f} nats a character; kept in {kept}"))
    out.mkdir(parents=True, exist_ok=True)
    char_lm.save(run.model, kept)
    return run.model.eval()


def summary(stories: list[Story]) -> Table:
    table = Table("", "prompt tokens/s", "tokens/s", "cache bytes", "largest difference", "tokens", box=None)
    for story in stories:
        prompt = len(story.ids) - len(story.seconds)
        # The median: the first step compiles kernels.
        speed = 1 / sorted(story.seconds)[len(story.seconds) // 2]
        equal = "all equal" if story.disagreement is None else f"part at step {story.disagreement}"
        table.add_row(
            story.name, f"{prompt / story.prompt_seconds:,.0f}", f"{speed:,.0f}", f"{story.cache_bytes:,}",
            f"{max(story.differences):.1f} of {ROUNDINGS:.0f}", equal,
        )  # fmt: skip
    return table


def report_endurance(attn: attndsl.Attention, model: CharLM, tokens: int, console: Console) -> bool:
    """Whether the cache stayed flat and its rows right; nothing is asked of a pattern that forgets nothing."""
    if not attn.evictable(MILLION, 4096):
        console.print(Text(f"{model.config.pattern} may read any token again: its cache grows with the text."))
        return True
    found = endure(attn, model, tokens)
    console.print(Text(
        f"{found.tokens:,} tokens in one layer's cache: {found.bytes:,} bytes throughout, where all keys and values "
        f"would take {found.bytes_of_all:,}; at most {max(found.held)} pages held, {found.held[-1]} at the end; rows "
        f"within {found.error:.0e} of float64 attention"
    ), soft_wrap=True)  # fmt: skip
    return found.held[-1] == found.held[2] and found.error < 1e-5


def main(
    model: Annotated[Path | None, typer.Option(help="A checkpoint of train_char_lm.py.")] = None,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = PROMPT,
    tokens: Annotated[int, typer.Option(min=1, help="Characters to generate, each way.")] = 150,
    page: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    routed: Annotated[str, typer.Option(help="A pattern that chooses what rows read.")] = ROUTED,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest character.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of training, where there is no checkpoint.")] = 300,
    long: Annotated[int, typer.Option(min=1, help="Tokens past which a cache is fed at last.")] = MILLION,
    out: Annotated[Path, typer.Option(help="Folder for the weights that are trained here.")] = Path(),
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Generate text over contiguous and paged caches, checked token by token."""
    console = Console()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        lm = model_for(model, out, steps, where, console)
        check_pattern(attndsl.compile(lm.config.pattern))
        check_pattern(attndsl.compile(routed))
        request = Request(lm.encode(prompt).to(where), tokens, temperature, seed)
    except (attndsl.PatternError, ValueError, OSError) as mistake:
        console.print(Text(f"{type(mistake).__name__}: {mistake}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(Text(f"pattern: {lm.config.pattern}"))
    stories = []
    for name, attn, caches in ways(lm, len(request.ids) + tokens, page, routed):
        console.rule(Text(name))
        console.print(Text(prompt, style="dim"), end="")
        stories.append(
            generate(name, lm, attn, caches, request, lambda text: console.out(text, end="", highlight=False))
        )
        console.print()
    console.rule()
    console.print(summary(stories))
    flat = report_endurance(attndsl.compile(lm.config.pattern), lm, long, console)
    right = all(story.disagreement is None for story in stories)
    verdict = "Every token is that of the whole prefix." if right else "The cache and the whole prefix part."
    console.print(Text(verdict, style="green" if right else "bold red"))
    if not (right and flat):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
