"""Training one module in several processes: each has its share of every batch, all end with the same weights.

Either every process holds all weights and gradients are averaged (DDP), or each holds a share of every
weight, and a block is whole in a process only while it runs (FSDP2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from toolchain.errors import ToolchainError
from toolchain.processes import processes


class _Loss(nn.Module):
    """A loss as what one module gives: DDP and FSDP2 hook into the forward pass of a module."""

    def __init__(self, loss: Callable[..., torch.Tensor], learned: nn.Module) -> None:
        super().__init__()
        self._loss, self._learned = loss, learned

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self._loss(*inputs)


def trained_together(
    loss: Callable[..., torch.Tensor], blocks: Sequence[nn.Module], others: Sequence[nn.Module]
) -> Callable[..., torch.Tensor]:
    """What to call in place of a loss, so that the gradients behind its result are everybody's.

    Args:
        loss: Of a share of the batch.
        blocks: What it runs. Where weights are sharded, theirs become shares, and whole while they run.
        others: What else it runs; whole all the time.

    Raises:
        ToolchainError: accelerate's configuration asks for what there is not.
    """
    here = processes()
    if here.number == 1:
        return loss
    parts = nn.ModuleList([*blocks, *others])
    if not here.sharded:
        # Every process has read the same weights. The loss need not depend on all that learn.
        learned = nn.ParameterList(item for item in parts.parameters() if item.requires_grad)
        return nn.parallel.DistributedDataParallel(
            _Loss(loss, learned), find_unused_parameters=True, init_sync=False
        )
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ToolchainError(
            f"accelerate's configuration asks for FSDP {plugin.fsdp_version}; "
            "set fsdp_version: 2 in its fsdp_config"
        )
    mesh = init_device_mesh(here.device.type, (here.number,))
    # On a processor there is no other memory to offload to, and torch fails when asked to.
    offload = OffloadPolicy() if here.device.type == "cpu" else plugin.cpu_offload
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=offload,
        )
    root = _Loss(loss, parts)
    fully_shard(root, mesh=mesh, offload_policy=offload)
    return root


@contextmanager
def gradients_held(loss: object) -> Iterator[None]:
    """Forward and backward passes in here leave gradients to be averaged by a later one."""
    if isinstance(loss, nn.parallel.DistributedDataParallel):
        with loss.no_sync():
            yield
    elif isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(False)
        yield
        loss.set_requires_gradient_sync(True)
    else:
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shares; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_(target: torch.Tensor, value: torch.Tensor | None) -> None:
    """Give a tensor, or everyone's share of it, the value the first process has; every process has to."""
    if processes().number == 1:
        assert value is not None
        target.copy_(value)
        return
    device = processes().device
    given = (
        torch.empty(target.shape, dtype=target.dtype, device=device) if value is None else value.to(device)
    )
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(given, target.device_mesh, target.placements))
    else:
        torch.distributed.broadcast(given, 0)
        target.copy_(given)
