"""What all tests share: options, and where Triton kernels run."""

import os
import random
from collections.abc import Iterator
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.overrides import _get_current_function_mode_stack

# Without a GPU the kernels are interpreted. Triton decides that when it is imported, so before any test is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import make_faster

    make_faster()

# One thread: what is added up has one order on every machine, and workers side by side do not wait for one another.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

NEEDS_A_GPU = "error[A510]: Triton kernels run on a GPU"

# One run is like the next; `thorough` looks further.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=3000, deadline=None)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def _own_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test draws the same numbers, whichever ran before it, and leaves the process as it was for the next one."""
    seed = crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    before = _state()
    yield
    left = {name: value for name, value in _state().items() if value != before[name]}
    assert not left, f"a test leaves behind: {left}"
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    assert not modes, "a mode of torch (a default device, say) is left behind"


def _state() -> dict[str, object]:
    """What a process has one of, and tests set."""
    return {
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("ATTNDSL_", "TRITON_IN"))
        },
        "working directory": os.getcwd(),
        "threads of torch": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "errors of numpy": np.geterr(),
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Leave out, where there is a GPU, tests that interpret kernels on tensors of the CPU: there these are compiled."""
    try:
        return (yield)
    except Exception as error:
        if torch.cuda.is_available() and NEEDS_A_GPU in str(error):
            pytest.skip("interprets kernels")
        raise
