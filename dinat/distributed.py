"""One process or many: who we are, and the few things that processes do together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dinat.errors import UserError, nearest

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
SHARDED_NUMEL = 100_000  # parameters below which a module of its own all-gather would cost more than it saves


@dataclass(frozen=True)
class World:
    """This process among all: its device, its rank and their number. A single process is rank 0 of 1."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None  # a gloo group: agreeing on a flag must not wait for the accelerator

    @property
    def primary(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over processes, on all of them."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank, on all processes."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, group=self.control)
        return bool(votes)

    def agree(self, value: Any) -> Any:
        """Rank 0's `value`, on all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]


ALONE = World(torch.device("cpu"))


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Joins the processes that torchrun, Slurm or submitit started, for the duration of the block.

    A process group that exists already is used, and left as it is.

    Args:
        device: "auto", or a torch device name; among several processes each takes the device of its local rank.

    Raises:
        UserError: for a device that does not exist here.
    """
    device = _check_device(device)
    if dist.is_initialized():
        if device != "cpu":
            device = f"{torch.device(device).type}:{os.environ['LOCAL_RANK']}"
        yield _world(device)
        return
    if "SLURM_JOB_ID" in os.environ and "MASTER_ADDR" not in os.environ and is_distributed_env():
        from submitit.helpers import TorchDistributedEnvironment  # a Slurm task was not started by torchrun

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    info = init_distributed_device_so(device)
    try:
        yield _world(info["device"])
    finally:
        if info["distributed"]:
            dist.destroy_process_group()


def _world(device: str) -> World:
    if not dist.is_initialized():
        return World(torch.device(device))
    return World(torch.device(device), dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))


def _check_device(name: str) -> str:
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return here.type if here else "cpu"
    kind, _, index = name.partition(":")
    if kind not in DEVICES:
        raise UserError(f"runtime.device={name}: no such device. Known: {', '.join(DEVICES)}.{nearest(kind, DEVICES)}")
    count = torch.accelerator.device_count() if here and here.type == kind else 0
    if kind != "cpu" and (not count or (index and not (index.isdigit() and int(index) < count))):
        found = f"cpu and {count} x {kind}" if count else f"cpu{f' and {here.type}' if here else ''}"
        raise UserError(f"runtime.device={name}: not on this machine, which has {found}. Use runtime.device=auto.")
    return name


def parallelize(model: nn.Module, world: World, mode: str, dtype: torch.dtype) -> nn.Module:
    """The module to train with: `model` itself, in DistributedDataParallel, or sharded in place (FSDP2).

    Args:
        mode: "ddp" or "fsdp"; without meaning for a single process.
        dtype: of the parameters as they are gathered for computation under FSDP; gradients are reduced in float32.
    """
    if world.size == 1:
        return model
    if mode == "ddp":
        ids = None if world.device.type == "cpu" else [world.device.index]
        return DistributedDataParallel(model, device_ids=ids)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Blocks are what models repeat, so they sit in containers; children first, as fully_shard demands.
    containers = nn.Sequential | nn.ModuleList
    for parent in reversed([module for module in model.modules() if isinstance(module, containers)]):
        for block in parent.children():
            large = sum(parameter.numel() for parameter in block.parameters()) >= SHARDED_NUMEL
            if large and not isinstance(block, containers):
                fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within, backward passes exchange gradients only if `enabled`: the last of an update's does it for all."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield
