"""Launching the generated kernels for learnable inputs that q and k read together (`codegen/triton_learned.py`).

What they write is bounded: diagonals are as many as rows and keys, and tiles of pairs are taken in strips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attndsl.blockruns import most_visits
from attndsl.learned import Over, Owned
from attndsl.plan import BackwardPlan, run_scalars
from attndsl.runtime.call import call_shape
from attndsl.runtime.launcher import Slot
from attndsl.runtime.sums import Totals
from attndsl.runtime.triton_backward import backward_parameters
from attndsl.runtime.triton_launch import prepare

DIAGONALS = "attention_diagonals"
PAIRS = "attention_pairs"
# Bytes of sums, and of the entries they belong to, that a strip of tiles may take.
STRIP = 64 << 20
# Programs that keep a device busy: with fewer tiles, several share the batch entries of a tile.
PROGRAMS = 512


class DiagonalSums:
    """`attention_diagonals` for one kind of call. `plan`: that of diagonals."""

    def __init__(
        self, plan: BackwardPlan, text: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor],
        aligned: bool,
    ) -> None:  # fmt: skip
        self.plan, shape = plan, call_shape(q, k, v)
        block = plan.tiling.block_q
        diagonals = -(-shape.rows // block) - (-shape.k_len // block) - 1
        self.grid = shape.batch * shape.heads * diagonals if shape.rows and shape.k_len else 0
        self.reads = [n for n, x in enumerate(plan.learned) if x.over is Over.DIAGONALS]
        if self.grid:
            sources = backward_parameters(plan, q, k, v, inputs, dout)
            self._launch = prepare(plan, text, DIAGONALS, self.grid, sources, aligned, q.device)

    def __call__(self, call: Sequence[Any], totals: Totals) -> None:
        if not self.grid:
            return
        values, size = list(call), (self.grid, 2 * self.plan.tiling.block_q)
        first = len(call) - 2 * len(self.plan.learned)
        for n in self.reads:
            values[first + 2 * n] = torch.empty(size, dtype=torch.float32, device=totals.device)
            values[first + 2 * n + 1] = torch.empty(size, dtype=torch.int64, device=totals.device)
        self._launch(values)
        for n in self.reads:
            totals.add(self.plan.learned[n].read.input, values[first + 2 * n], values[first + 2 * n + 1])


class PairSums:
    """`attention_pairs` of the n-th read for one kind of call."""

    def __init__(
        self, plan: BackwardPlan, text: str, n: int, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
        inputs: Sequence[Tensor], aligned: bool,
    ) -> None:  # fmt: skip
        self.plan, self.n = plan, n
        shape, tiling, read = call_shape(q, k, v), plan.tiling, plan.learned[n].read
        owned = Owned.of(read, run_scalars(plan.runs))
        owners = (shape.batch if owned.batch else 1) * {"h": shape.heads, "g": shape.kv_heads, "": 1}[owned.head]
        # Otherwise the kernel writes its sums at their entries.
        self.scattered = not owned.takes_each_entry_once(read, plan.program.input(read.input))
        visits = most_visits(plan.program, plan.runs, shape, tiling.block_q, tiling.block_k)
        self.cells = owners * -(-shape.rows // tiling.block_q) * visits
        if not self.cells:
            return
        sharers = shape.batch * shape.heads // owners
        self.portions = max(1, min(sharers, PROGRAMS // self.cells))
        self.area = tiling.block_q * tiling.block_k
        bytes_of_cell = self.area * (4 * self.portions + 8)
        strip = max(1, min(self.cells, STRIP // bytes_of_cell)) if self.scattered else self.cells
        sources = dict(backward_parameters(plan, q, k, v, inputs, dout))
        entries = math.prod(Totals(plan.program, shape, q.device).size(read.input))
        first: Slot = sources[f"sum_{n}_ptr"]
        sources |= {
            "first_cell": Slot(first.index + 2 * (len(plan.learned) - n), "i32"), "cells": strip, "visits": visits,
            "all_cells": self.cells, "portions": self.portions, "batch": shape.batch, "stride_portion": entries,
        }  # fmt: skip
        self.strip, self.entries, self.at = strip, entries, first.index
        self._launch = prepare(plan, text, PAIRS, strip * self.portions, sources, aligned, q.device)

    def __call__(self, call: Sequence[Any], totals: Totals) -> None:
        if not self.cells:
            return
        name, device = self.plan.learned[self.n].read.input, totals.device
        if not self.scattered:
            sums = torch.zeros(self.portions, self.entries, dtype=torch.float32, device=device)
            self._run(call, sums, None, 0)
            whole = sums[0] if self.portions == 1 else sums.double().sum(0)
            totals.add_whole(name, whole.view(totals.size(name)))
            return
        sums = torch.empty(self.portions, self.strip, self.area, dtype=torch.float32, device=device)
        places = torch.empty(self.strip, self.area, dtype=torch.int64, device=device)
        for first in range(0, self.cells, self.strip):
            self._run(call, sums, places, first)
            count = min(self.strip, self.cells - first)
            strip = sums[0, :count] if self.portions == 1 else sums[:, :count].double().sum(0)
            totals.add(name, strip, places[:count])

    def _run(self, call: Sequence[Any], sums: Tensor, places: Tensor | None, first_cell: int) -> None:
        values = [*call, first_cell]
        values[self.at], values[self.at + 1] = sums, places
        self._launch(values)
