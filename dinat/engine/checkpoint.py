"""Checkpoints: written so that no moment of death loses what was saved, and read with the mistakes named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from dinat.errors import UserError

# The whole state by parameter name, on the CPU of rank 0, however training was parallelized: a checkpoint of one
# process can be continued by eight, and the other way round.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, on the CPU; collective under FSDP, empty off rank 0 there."""
    return get_model_state_dict(model, options=WHOLE)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, on the CPU; collective under FSDP."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def restore_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The reverse of `model_state`, given the whole state on every rank."""
    set_model_state_dict(model, state, options=WHOLE)


def restore_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """The reverse of `optimizer_state`, given the whole state on every rank."""
    set_optimizer_state_dict(model, optimizer, state, options=WHOLE)


def read_checkpoint(path: Path, key: str = "resume") -> dict[str, Any]:
    """A training checkpoint, on the CPU; messages begin with `key`, the setting that named it.

    Raises:
        UserError: for a file that is damaged or that is not a training checkpoint of this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{key}={path}: not a readable checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "optimizer", "step", "config"} <= checkpoint.keys():
        raise UserError(
            f"{key}={path}: not a training checkpoint of dinat. Start from its weights with model.checkpoint={path}."
        )
    return checkpoint


def find_resume(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to continue from: that of `run_dir` for "auto" (None if there is none yet), or the one named.

    Raises:
        UserError: for a path without a checkpoint, and for a `run_dir` with one that `resume` does not mention:
            a new run there would overwrite it.
    """
    last = run_dir / "last.pt"
    if resume is None:
        if last.exists():
            raise UserError(f"dir={run_dir}: holds a run already. Continue it with resume=auto, or choose another dir.")
        return None
    if resume == "auto":
        return last if last.exists() else None
    path = Path(resume)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"resume={resume}: no checkpoint there. Give a run folder, a .pt file, or auto.")
    return path
