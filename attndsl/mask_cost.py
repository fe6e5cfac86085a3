"""What a mask costs: operations for each pair."""

from __future__ import annotations

from attndsl.grid import MAX_AXES
from attndsl.program import Binary, Logic, Read, Scalar, Table, Var, children, walk

# A pair's tokens, and their indices in a layout.
ROW = ("q", "i", *(f"i_{a}" for a in range(MAX_AXES)))
KEY = ("k", "j", *(f"j_{a}" for a in range(MAX_AXES)))
PAIR = (*ROW, *KEY)


def pair_cost(e: Scalar) -> int:
    """Rough number of operations per pair: what does not read the pair is computed once."""
    # 0 is of what does not read the pair, and of nothing else.
    costs: dict[int, int] = {}

    def cost(x: Scalar) -> int:
        found = costs.get(id(x))
        if found is None:
            below = [cost(y) for y in children(x)]
            pair = any(below) or (isinstance(x, Var) and x.name in PAIR)
            found = costs[id(x)] = _own_cost(x) + sum(below) if pair else 0
        return found

    return cost(e)


def both_cost(e: Scalar) -> int:
    """The same, of what reads both tokens. Conditions are joined two by two."""
    # Which of the tokens each node reads, one bit each.
    sides: dict[int, int] = {}

    def side(x: Scalar) -> int:
        found = sides.get(id(x))
        if found is None:
            found = (x.name in ROW) + 2 * (x.name in KEY) if isinstance(x, Var) else 0
            for y in children(x):
                found |= side(y)
            sides[id(x)] = found
        return found

    both = (x for x in walk(e) if side(x) == 3)
    return sum(len(x.operands) - 1 if isinstance(x, Logic) else _own_cost(x) for x in both)


def _own_cost(e: Scalar) -> int:
    match e:
        case Read() | Table():
            return 8
        case Binary(op="//" | "%"):
            return 4
        case _:
            return 1
