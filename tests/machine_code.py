"""NVIDIA's machine code, as `nvdisasm` prints it: its basic blocks, and what a turn of its loops does."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_ENDS_BLOCK = {"BRA", "EXIT", "RET"}
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Loop:
    """An innermost loop around products: its blocks in order of the text, that which turns begin with, and those that
    end one."""

    head: int
    body: tuple[int, ...]
    last: frozenset[int]


class MachineCode:
    """The basic blocks of a function, each its instructions, and which of them follow which."""

    def __init__(self, text: str) -> None:
        self.blocks: list[list[str]] = [[]]
        labels: dict[str, int] = {}
        for line in map(str.strip, text.splitlines()):
            if label := re.match(r"(\.L_\w+):", line):
                if self.blocks[-1]:
                    self.blocks.append([])
                labels[label[1]] = len(self.blocks) - 1
            elif found := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                self.blocks[-1].append(found[1])
                if _operation(found[1]) in _ENDS_BLOCK:
                    self.blocks.append([])
        self.after = [tuple(self._after(n, block, labels)) for n, block in enumerate(self.blocks)]

    def _after(self, n: int, block: list[str], labels: dict[str, int]) -> Iterator[int]:
        last = block[-1] if block else ""
        target = re.search(r"`\((\.L_\w+)\)", last) if _operation(last) == "BRA" else None
        if target:
            yield labels[target[1]]
        # A branch may have its condition before it or behind its name.
        goes_on = _operation(last) not in _ENDS_BLOCK or _PREDICATE.match(last) or re.search(r"BRA\S*\s+!?U?P\d", last)
        if goes_on and n + 1 < len(self.blocks):
            yield n + 1

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The innermost loops around products."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for n, following in enumerate(self.after):
            for m in following:
                before[m].append(n)
        above = self._dominators(before)
        found: dict[int, tuple[set[int], set[int]]] = {}
        for n, dominators in above.items():
            for head in dominators.intersection(self.after[n]):
                body, last = found.setdefault(head, ({head}, set()))
                last.add(n)
                pending = [n]
                while pending:
                    if (m := pending.pop()) not in body:
                        body.add(m)
                        pending += [x for x in before[m] if x in above]
        around = {h: x for h, x in found.items() if any("GMMA" in line for n in x[0] for line in self.blocks[n])}
        inner = {h: x for h, x in around.items() if not any(o != h and b < x[0] for o, (b, _) in around.items())}
        return tuple(Loop(h, tuple(sorted(body)), frozenset(last)) for h, (body, last) in inner.items())

    def _dominators(self, before: list[list[int]]) -> dict[int, set[int]]:
        """The blocks through which all ways to a block lead, for each that is reached."""
        reached, pending = {0}, [0]
        while pending:
            for m in self.after[pending.pop()]:
                if m not in reached:
                    reached.add(m)
                    pending.append(m)
        above = {n: set(reached) for n in reached} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for n in sorted(reached - {0}):
                found = set.intersection(*(above[m] for m in before[n] if m in reached)) | {n}
                changed |= found != above[n]
                above[n] = found
        return above

    def lines(self, loop: Loop) -> list[str]:
        return [line for n in loop.body for line in self.blocks[n]]

    def spilled(self, loop: Loop) -> int:
        """Loads and stores of spilled registers in the turn of a loop that has the fewest: that of a tile that nothing
        masks, where there are such."""
        cost = [sum(bool(_LOCAL.search(line)) for line in block) for block in self.blocks]
        best, pending = {loop.head: cost[loop.head]}, [(cost[loop.head], loop.head)]
        while pending:
            so_far, n = heapq.heappop(pending)
            for m in set(self.after[n]) & set(loop.body) - {loop.head}:
                if so_far + cost[m] < best.get(m, so_far + cost[m] + 1):
                    best[m] = so_far + cost[m]
                    heapq.heappush(pending, (best[m], m))
        return min(best[n] for n in loop.last if n in best)


def _operation(line: str) -> str:
    return _PREDICATE.sub("", line).split(" ", 1)[0].split(".", 1)[0]
