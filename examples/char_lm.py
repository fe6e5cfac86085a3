"""A small causal language model over characters, whose attention is an argument of the call.

The weights know nothing of patterns: `model(ids, attend)` calls `attend(layer, q, k, v)` once a layer. Training
passes a compiled pattern or SDPA with a mask (train_char_lm.py); a generator passes a function that appends k and v to
the layer's cache and attends over all of it, with `positions` for where its tokens stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (as everywhere)

# (layer, q [B, heads, N, D], k and v [B, kv_heads, N, D]) -> [B, heads, N, D]; q and k are already rotated.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Config:
    """What a model is made from. `vocabulary`: every character once, a character's id is its place. `pattern`: the
    program that it was trained with, on `context` tokens at a time."""

    vocabulary: str
    pattern: str
    context: int
    layers: int = 3
    dim: int = 128
    heads: int = 4
    kv_heads: int = 2

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class CharLM(nn.Module):
    """Pre-norm transformer: rotary positions, grouped heads, gated MLPs, the output layer tied to the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(len(config.vocabulary), config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts small, the more so the more layers add to it.
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if last else 0.02)

    def forward(self, ids: Tensor, attend: Attend, positions: Tensor | None = None) -> Tensor:
        """Logits [B, N, vocabulary] of the characters that follow ids, int64 [B, N].

        positions: where the tokens stand, int [N] or [B, N]; default 0 to N - 1.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embedding(ids)
        turns = rotations(positions, self.config.head_dim)
        for layer, block in enumerate(self.blocks):
            x = block(x, turns, partial(attend, layer))
        logits: Tensor = F.linear(self.norm(x), self.embedding.weight)
        return logits

    def encode(self, text: str) -> Tensor:
        """Ids, int64 [len(text)]. Raises ValueError for a character that is not in the vocabulary."""
        return torch.tensor([self.config.vocabulary.index(character) for character in text])

    def decode(self, ids: Tensor) -> str:
        """The text of ids [N]."""
        return "".join(self.config.vocabulary[i] for i in ids.tolist())


class Block(nn.Module):
    """Attention, then a gated MLP, each added to the stream x [B, N, dim]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = (config.heads, config.kv_heads, config.kv_heads)
        self.head_dim = config.head_dim
        hidden = 2 * config.dim
        self.attention_norm = nn.RMSNorm(config.dim)
        self.qkv = nn.Linear(config.dim, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.up = nn.Linear(config.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.dim, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], attend: Callable[..., Tensor]) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.heads, dim=2)
        # Heads stay inside tokens in memory: the compiled kernels read them so, and nothing is copied.
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, turns), rotate(k, turns), v))
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        gate, value = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * value)
        return out


def rotations(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., N, 1, dim / 2] of the angles by which rotary embedding turns positions [..., N]."""
    speeds = 10_000.0 ** -torch.linspace(0, 1, dim // 2, device=positions.device)
    angles = positions[..., None, None] * speeds
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, N, H, D], the pairs (x[i], x[i + D/2]) turned (RoPE, arXiv 2104.09864)."""
    (first, second), (cos, sin) = x.chunk(2, dim=-1), turns
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def reference_manual() -> str:
    """About half a million characters that every Python carries: the help texts of its language reference."""
    return "\n".join(topics.values())


def vocabulary_of(text: str) -> str:
    return "".join(sorted(set(text)))


def save(model: CharLM, path: Path) -> None:
    """Everything that `load` needs: config and weights."""
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, path)


def load(path: Path, device: torch.device | str = "cpu") -> CharLM:
    """A saved model, in eval mode. Only tensors and plain values are unpickled."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = CharLM(Config(**saved["config"])).to(device)
    model.load_state_dict(saved["weights"])
    return model.eval()
