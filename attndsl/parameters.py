"""What is known of the parameters of a pattern's sets, each of which stands for a scalar."""

from __future__ import annotations

from attndsl.program import Program, Scalar, Table, Type, Var


def bounds(name: str, scalar: Scalar, program: Program, heads: tuple[int, int] | None) -> str:
    """The set of a parameter's values as isl reads it: booleans are 0 or 1, table entries and heads in their range."""
    low, high = _range(scalar, program, heads)
    found = (f"{name} {op} {end}" for op, end in ((">=", low), ("<=", high)) if end is not None)
    return f"[{name}] -> {{ : {' and '.join(found) or 'true'} }}"


def _range(scalar: Scalar, program: Program, heads: tuple[int, int] | None) -> tuple[int | None, int | None]:
    if scalar.type is Type.BOOL:
        return 0, 1
    match scalar:
        case Table(name=name):
            values = [int(v) for v in program.table(name).values]
            return (min(values), max(values)) if values else (None, None)
        case Var(name="h" | "g" | "b"):
            last = {"h": heads and heads[0] - 1, "g": heads and heads[1] - 1}
            return 0, last.get(scalar.name)
        case Var(name="H" | "G" | "D" | "Dv"):
            return 1, None
        case _:
            return None, None
