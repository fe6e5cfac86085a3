"""Kernel plans of pooled views: entries from tokens, and gradients of tokens from those of entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attndsl.branches import Pool, PoolFunction
from attndsl.plan import DType

# Elements of tokens that a program loads at once, and tokens of an entry among them.
_LOADED, _TOKENS = 8192, 64


def entries(tokens: Any, stride: int) -> Any:
    """How many entries so many tokens have."""
    return (tokens + stride - 1) // stride


def power_of_two(size: int) -> int:
    """The least that is no less than a size: Triton's tensors have such sides."""
    return 1 << (size - 1).bit_length()


def loaded(size: int) -> int:
    """Of an entry of so many tokens, those that a program loads at once."""
    return min(_TOKENS, power_of_two(size))


def told_covers(pool: Pool) -> int:
    """How many entries a token belongs to at most, of a pool whose extents data tells."""
    return -(-pool.size // pool.stride)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Kernels of one pool, for one head dimension: `target` as in a `Spec`. `ragged`: how many tokens are present is
    told for each batch entry. `told`: so are the entries' extents; `size` is then how many entries a token may belong
    to, and `stride` 1."""

    function: PoolFunction
    size: int
    stride: int
    dim: int
    dtype: DType
    target: str
    ragged: bool = False
    told: bool = False

    @property
    def picks(self) -> bool:
        """Whether an entry is a token's number, to which alone its gradient flows."""
        return self.function in (PoolFunction.MAX, PoolFunction.MIN)

    @property
    def width(self) -> int:
        """The head dimension, padded to a power of two."""
        return power_of_two(self.dim)

    @property
    def tokens(self) -> int:
        """Tokens of an entry that are loaded at once."""
        return _TOKENS // 2 if self.told else loaded(self.size)

    @property
    def block(self) -> int:
        """Entries of a program."""
        return max(1, _LOADED // (self.tokens * self.width))

    @property
    def token_block(self) -> int:
        """Tokens of a program of the backward pass."""
        return max(16, _LOADED // (2 * self.width))

    @property
    def covers(self) -> int:
        """How many entries a token belongs to at most."""
        return -(-self.size // self.stride)
