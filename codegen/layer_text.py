"""Where a tile's tokens lie in the tensors as tensor copies see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attndsl.boxes import Boxes
from attndsl.layers import Layers, layers
from attndsl.plan import BackwardPlan, Loads, Plan

if TYPE_CHECKING:
    from attndsl.codegen.kernel import KernelWriter


def layers_of(plan: Plan, side: str) -> Layers | None:
    """The dimensions that copies see in the tokens of a side, q or k, of a piece; None where they do not."""
    if plan.spec.loads is not Loads.DESCRIPTOR or plan.layout.plain:
        return None
    return layers(plan.layout, side, plan.tiling.block_q if side == "q" else plan.tiling.block_k)


def tile_at(kernel: KernelWriter, side: str) -> str:
    """The place of a tile among the tokens, as text; empty where they are read through pointers."""
    plan = kernel.plan
    if plan.spec.loads is Loads.DESCRIPTOR and kernel.in_order(side):
        return f"{side}_tile * BLOCK_{side.upper()}"
    seen = layers_of(plan, side)
    if seen is None:
        return ""
    if not isinstance(plan.layout, Boxes):
        return f"residue, {side}_tile * BLOCK_{side.upper()}"
    at = [f"{side}_tile_{axis}" + (f" * {size}" if size > 1 else "") for axis, size in enumerate(seen.tile)]
    if side == "q" and not kernel.aligned:
        at[0] += f" - start // {seen.unit}"
    return ", ".join(at)


def copies_rows(kernel: KernelWriter) -> bool:
    """Whether what a backward pass keeps of rows is copied as the queries of a tile are."""
    plan = kernel.plan
    seen, apart = layers_of(plan, "q"), isinstance(plan, BackwardPlan) and plan.rows_apart
    return bool(tile_at(kernel, "q")) and (seen is None or seen.rows_in_order or apart)


def kept_at(plan: BackwardPlan) -> str:
    """Where it keeps them, of a head: at their own place, or residue by residue."""
    seen = layers_of(plan, "q")
    if seen is None or not plan.rows_apart:
        return "q_rows"
    return f"residue * (rows // {seen.unit}) + q_tile * BLOCK_Q + q_offset"


__all__ = ["copies_rows", "kept_at", "layers_of", "tile_at"]
