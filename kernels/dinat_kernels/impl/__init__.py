"""Implementations of the operator, and the choice between them.

A backend is a module with `attention` and `attention_backward` (see `tiled`).  Backends share `geometry`, never each
other.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

from . import tiled

BACKENDS = ("reference", "torch", "triton")


def unavailable(backend: str, device: torch.device | None = None) -> str | None:
    """Why `backend` cannot run (on tensors of `device`, if given), or None if it can."""
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return "this version of dinat_kernels has no Triton kernels yet"


def resolve(backend: str | None, device: torch.device) -> str:
    """The backend that serves tensors on `device`.  An explicit request is granted or refused, never replaced.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    if backend is None:
        return "torch" if unavailable("triton", device) else "triton"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    reason = unavailable(backend, device)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run on {device.type} tensors here: {reason}")
    return backend


def backends() -> dict[str, str | None]:
    """What runs on this machine: backend name to None where it is available, else the reason why it is not."""
    return {name: unavailable(name) for name in BACKENDS}


def implementation(backend: str) -> ModuleType:
    """The module behind an operator backend (the reference is not one: autograd differentiates it)."""
    return {"torch": tiled}[backend]
