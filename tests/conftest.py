"""What all tests share: options, and where Triton kernels run."""

import os
from collections.abc import Iterator
from zlib import crc32

import pytest
import torch
from hypothesis import settings
from torch.overrides import _get_current_function_mode_stack

# Without a GPU the kernels are interpreted. Triton decides that when it is imported, so before any test is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import make_faster

    make_faster()

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
def _own_state_of_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test draws the same numbers, whichever ran before it, and leaves no mode that the next one would meet."""
    torch.manual_seed(crc32(request.node.nodeid.encode()))
    yield
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    assert not modes, "a mode of torch (a default device, say) is left behind"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Leave out, where there is a GPU, tests that interpret kernels on tensors of the CPU: there these are compiled."""
    try:
        return (yield)
    except Exception as error:
        if torch.cuda.is_available() and NEEDS_A_GPU in str(error):
            pytest.skip("interprets kernels")
        raise
