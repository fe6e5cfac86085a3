"""What is kept of each page beside its keys, and which pages a row reads by it: Quest (arXiv 2406.10774).

A page's bounds are the least and the largest key of its tokens, dimension by dimension. No key of the page gives a row
a larger product than `sum over d of max(q_d * least_d, q_d * largest_d)`, so pages are ranked by that.
"""

from __future__ import annotations

from dataclasses import dataclass

from attndsl.plan import DType, Spec


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Kernels over the pages of a cache: bounds, scores by them, and the choice of the best.

    `spec`: of the attention; only heads, D, dtype and target matter. `page`: tokens of a page. `fp8`: keys are float8.
    `shared`: the heads of a key head choose together, by the sum of their scores.
    """

    spec: Spec
    page: int
    fp8: bool = False
    shared: bool = True

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.spec.heads // self.spec.kv_heads

    @property
    def scored(self) -> int:
        """Pages that a program scores: their bounds are held in registers."""
        return 16 if self.spec.dtype is DType.FLOAT32 or self.spec.dim > 128 else 32
