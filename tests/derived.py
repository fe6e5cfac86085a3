"""Derived inputs for tests that evaluate what is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attndsl.derive import derive
from attndsl.program import CallShape, Program
from attndsl.runtime.derive import Deriver

Array = NDArray[Any]


def derived(
    program: Program, shape: CallShape, inputs: Mapping[str, Array], args: Mapping[str, int]
) -> tuple[Program, dict[str, Array]]:
    """The derived program, and the inputs of a call with the derived ones among them."""
    changed = derive(program)
    own = {decl.name for decl in program.inputs}
    given = [torch.from_numpy(np.asarray(inputs[decl.name])) for decl in program.inputs]
    found = Deriver(changed, shape, torch.device("cpu"))(given, [args[name] for name in program.args])
    names = [decl.name for decl in changed.inputs if decl.name not in own]
    return changed, {**inputs, **{name: x.numpy() for name, x in zip(names, found, strict=True)}}
