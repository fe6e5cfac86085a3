"""Which way integers go along the positions that they read, as far as their form tells."""

from __future__ import annotations

from collections.abc import Callable

from attndsl.scalar import Binary, Call, Const, Read, Scalar, Unary, Var, reads


def direction(e: Scalar, *positions: str, is_sorted: Callable[[str], bool] = lambda _: False) -> int | None:
    """1 where an integer does not decrease with the positions that it reads, -1 where it does not increase, 0 where it
    reads none; None where that is not known. is_sorted: of an input, whether what it holds does not decrease along
    its last index."""

    def of(e: Scalar) -> int | None:
        if not reads(e, *positions):
            return 0
        match e:
            case Var():
                return 1
            case Read(input=name, index=(*lead, last)) if is_sorted(name) and not any(
                reads(x, *positions) for x in lead
            ):
                return of(last)
            case Unary(op="-", operand=a):
                return _turned(of(a))
            case Binary(op="+", left=a, right=b):
                return _joint(of(a), of(b))
            case Binary(op="-", left=a, right=b):
                return _joint(of(a), _turned(of(b)))
            case Binary(op="*", left=a, right=Const(value=int(c))) | Binary(op="*", left=Const(value=int(c)), right=a):
                return of(a) if c > 0 else _turned(of(a)) if c < 0 else 0
            case Binary(op="//", left=a, right=Const(value=int(c))) if c > 0:
                return of(a)
            case Call(function="min" | "max" | "clamp", args=args):
                found: int | None = 0
                for x in args:
                    found = _joint(found, of(x))
                return found
            case _:
                return None

    return of(e)


def _joint(a: int | None, b: int | None) -> int | None:
    """The direction of what does not decrease with two things."""
    if a is None or b is None or a * b < 0:
        return None
    return a or b


def _turned(a: int | None) -> int | None:
    return None if a is None else -a
