"""Training as torch's own tools do it, across processes, compiled, checkpointed and functional: `attndsl.nn.Attention`.

test_autograd.py holds the operator's own gradients; here they pass through layers, losses and optimizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import attndsl
import attndsl.nn

WORLD = 2
LEARNED = """attention learned {
    input bias  : float[h, 9] learnable
    input sinks : float[h] learnable
    score s + bias[h, clamp(q - k, 0, 8)]
    softmax with sink sinks[h]
    attend causal & window(30)
}"""


class Model(nn.Module):
    """Two attention layers, one with parameters of its pattern."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = attndsl.nn.Attention(LEARNED, 32, 4, num_kv_heads=2)
        # Without biases: a softmax does not see that of the keys, whose gradient is 0.
        self.second = attndsl.nn.Attention("causal & (window(7) | sink(2))", 32, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        out: Tensor = x + self.second(torch.tanh(x))
        return out


def batch(n: int = 40, size: int = 4) -> Tensor:
    return torch.randn(size, n, 32, generator=torch.Generator().manual_seed(n))


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(x is not None for x in found.values()), "every parameter takes part"
    return {name: x for name, x in found.items() if x is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each gradient within a share of its largest entry; none is zero, so that all were compared."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert right.any(), name
        torch.testing.assert_close(found[name], right, rtol=0, atol=tolerance * float(right.abs().max()), msg=name)


# ---------------------------------------------------------------------------------- two processes


def train_as_one_of_two(rank: int, meeting: str) -> None:
    """Gradients of two processes, each with half of the batch, are those of one process with all of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    try:
        x = batch()
        half = x.chunk(WORLD)[rank]
        model = Model()
        expected = gradients(model, loss_of(model, x))

        parallel = DistributedDataParallel(copy.deepcopy(model))
        assert_close(gradients(parallel.module, loss_of(parallel, half)), expected)

        mesh = init_device_mesh("cpu", (WORLD,))
        for policy, tolerance in (
            (MixedPrecisionPolicy(), 1e-5),
            (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), 5e-2),
        ):
            sharded = copy.deepcopy(model)
            for part in (sharded.first, sharded.second, sharded):
                fully_shard(part, mesh=mesh, mp_policy=policy)
            found = gradients(sharded, loss_of(sharded, half))
            assert all(g.to_local().numel() < g.numel() for g in found.values())  # type: ignore[attr-defined]
            assert_close({name: g.full_tensor() for name, g in found.items()}, expected, tolerance)  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """DistributedDataParallel, and FSDP2 in float32 and with bfloat16 parameters."""
    spawn(train_as_one_of_two, (str(tmp_path / "meeting"),), WORLD)  # type: ignore[no-untyped-call]


# --------------------------------------------------------------------------------- compiled steps


def plain(model: Model, x: Tensor) -> Tensor:
    return loss_of(model, x)


def checkpointed(model: Model, x: Tensor) -> Tensor:
    return loss_of(lambda y: checkpoint(model, y, use_reentrant=False), x)


def autocast(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, x)


def both(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return checkpointed(model, x)


@pytest.mark.parametrize("way", [plain, both])
def test_compiled_steps(way: Callable[[Model, Tensor], Tensor]) -> None:
    """Three steps at three lengths, one graph, and the parameters of three steps that are not compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(way, fullgraph=True, dynamic=True, backend=counter)
    twins = Model(), Model()
    before = copy.deepcopy(twins[0].state_dict())
    for model, loss in zip(twins, (compiled, way), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for n in (40, 57, 33):
            gradients(model, loss(model, batch(n)))
            optimizer.step()
    found, expected = ({name: x.detach() - before[name] for name, x in twin.named_parameters()} for twin in twins)
    assert_close(found, expected, tolerance=2e-2 if way is both else 1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("way", "kept"), [(checkpointed, plain), (both, autocast)], ids=["float32", "autocast"])
def test_checkpoints_change_no_bit(way: Callable[..., Tensor], kept: Callable[..., Tensor]) -> None:
    model = Model()
    found, expected = (gradients(model, loss(model, batch())) for loss in (way, kept))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


# ------------------------------------------------------------------------------------- torch.func


def functional(model: Model) -> tuple[Callable[[dict[str, Tensor], Tensor], Tensor], dict[str, Tensor]]:
    """The loss as a function of the parameters and a sequence [N, 32], and the parameters."""
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(lambda y: torch.func.functional_call(model, parameters, (y,)), x[None])

    return loss, parameters


def test_functional_gradients_of_each_sample() -> None:
    """vmap over grad, through layers."""
    model = Model()
    loss, parameters = functional(model)
    x = batch(12, 3)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        assert_close({name: g[i] for name, g in found.items()}, gradients(model, loss_of(model, x[i : i + 1])))


def test_vjp() -> None:
    model, x = Model(), batch(12, 2)
    out, pull = torch.func.vjp(model, x)[:2]
    assert torch.equal(out, model(x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf), leaf, torch.ones_like(x))
    torch.testing.assert_close(pull(torch.ones_like(x))[0], expected)


def test_jacobian() -> None:
    """vmap over vjp: every output element's gradient."""
    attn = attndsl.compile("causal & window(3)")
    q, k, v = torch.randn(3, 1, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    found = torch.func.jacrev(lambda v: attn(q, k, v))(v)
    weights = torch.softmax((q @ k.mT / 8**0.5).masked_fill(~torch.from_numpy(attn.mask(5, 5)), -torch.inf), -1)[0, 0]
    expected = torch.einsum("qk,cd->qckd", weights, torch.eye(8))
    torch.testing.assert_close(found[0, 0, :, :, 0, 0], expected)


def test_forward_mode() -> None:
    """There is none, and a diagnostic says so."""
    attn = attndsl.compile("causal")
    q = torch.randn(1, 1, 5, 8)
    with pytest.raises(attndsl.PatternError, match="forward mode"):
        torch.func.jvp(lambda x: attn(x, x, x), (q,), (q,))
