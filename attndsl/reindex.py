"""Relations in the indices of a layout."""

from __future__ import annotations

from dataclasses import replace

import islpy as isl

from attndsl.layout import Layout
from attndsl.relation import Relation


def in_layout(relation: Relation, pairs: isl.Set, layout: Layout) -> Relation:
    """The pairs in a layout's indices, as a relation that stands for the same scalars."""
    if layout.plain:
        return with_pairs(relation, pairs)
    ctx = pairs.get_ctx()
    residues = isl.Set.read_from_str(ctx, f"[residue] -> {{ : 0 <= residue < {layout.classes} }}")
    context = relation.context.intersect(residues)
    at = isl.MultiPwAff.read_from_str(ctx, f"[residue] -> {{ [q, k] -> [{layout.q.text('q')}, {layout.k.text('k')}] }}")
    found = pairs.preimage_multi_pw_aff(at).intersect_params(residues)
    exists = isl.Set.read_from_str(ctx, "{ [q, k] : k >= 0 }")
    found = found.intersect(exists).coalesce().gist_params(residues)
    return replace(relation, pairs=found, context=context)


def with_pairs(relation: Relation, pairs: isl.Set) -> Relation:
    return replace(relation, pairs=pairs)
