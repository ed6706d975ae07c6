"""Implementations of the operator, and the choice between them.

A backend is a module with `prepare` and `prepare_backward` (see `tiled`; `reference` leaves the latter to autograd).
Backends share `geometry` and what lies beside this file, never each other.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor

from ..geometry import Neighborhood
from . import reference, tiled
from .layout import Call, Forward, Layout, gap_of, layouts_of, unpacked

BACKENDS = ("reference", "torch", "triton")
# What the Triton kernels cover.
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_MAX_DIM = 128


# Known before any call: Dynamo traces calls, and cannot trace this.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def uninterpretable() -> str | None:
    """Why Triton's interpreter does not work with the NumPy that is installed, or None if it does."""
    triton, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton before 3.7 needs NumPy before 2.4"
    return None


def unavailable(backend: str, device: torch.device | None = None) -> str | None:
    """Why `backend` cannot run (on tensors of `device`, if given), or None if it can."""
    if backend != "triton":
        return None
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if _interpreting() and uninterpretable():
        return uninterpretable()
    if device is None:
        return None if torch.cuda.is_available() or _interpreting() else "no CUDA or ROCm device"
    if device.type == "cuda" or (device.type == "cpu" and _interpreting()):
        return None
    return "Triton kernels need CUDA or ROCm tensors (or CPU tensors and TRITON_INTERPRET=1, for tests)"


def unsupported(backend: str, query: Tensor | Layout, value: Tensor | Layout) -> str | None:
    """Why `backend` does not cover this dtype or head size, or None if it does."""
    if backend != "triton":
        return None
    if query.dtype not in _TRITON_DTYPES:
        return f"the Triton kernels have no {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _TRITON_MAX_DIM:
        return f"the Triton kernels have no head_dim or value_dim above {_TRITON_MAX_DIM}"
    return None


def resolve(backend: str | None, query: Tensor | Layout, value: Tensor | Layout) -> str:
    """The backend that serves these tensors.  An explicit request is granted or refused, never replaced.

    The choice is "triton" for CUDA and ROCm tensors that its kernels cover, else "torch".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    if backend is None:
        fused = query.device.type == "cuda" and not (
            unavailable("triton", query.device) or unsupported("triton", query, value)
        )
        return "triton" if fused else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    reason = unavailable(backend, query.device) or unsupported(backend, query, value)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run on {query.device.type} tensors here: {reason}")
    return backend


def backends() -> dict[str, str | None]:
    """What runs on this machine: backend name to None where it is available, else the reason why it is not."""
    return {name: unavailable(name) for name in BACKENDS}


class Passes:
    """The forward pass for a call, and the backward passes that may follow it, each prepared when it is first wanted.

    Attributes:
        forward: see `tiled.prepare`.
        backward: from the strides of the gradient of out, and whether lse has one, to what takes these two (the latter
            None for zeros), query, key, value (see `unpacked`), rpb, out and lse, and returns the gradients of those
            inputs that there are.
    """

    def __init__(self, backend: str, call: Call) -> None:
        self.forward: Forward = implementation(backend).prepare(call)
        self.backward = lru_cache(maxsize=8)(lambda *layout: _prepare_backward(backend, call, *layout))


def prepare(
    backend: str | None, problem: tuple, window: Neighborhood, scale: float, *, with_lse: bool = True
) -> Passes:
    """The passes of the `resolve`d backend for tensors of the layouts in `problem_of`."""
    query, key, value, rpb = layouts_of(problem)
    call = Call(query, key, value, rpb, window, scale, with_lse, gap_of(problem))
    return Passes(resolve(backend, query, value), call)


def _prepare_backward(
    backend: str, call: Call, stride: tuple[int, ...], has_grad_lse: bool
) -> Callable[..., list[Tensor]]:
    """See `Passes.backward`."""
    inputs = query, _, value = call[:3]
    grad_out = query._replace(shape=(*query.shape[:-1], value.shape[-1]), stride=stride)
    shapes = [x.shape for x in inputs]
    parts = [x.contiguous() for x in inputs]
    if call.gap is not None:
        shapes = [(*query.shape[:-2], 3, *query.shape[-2:])]
        parts = [query._replace(shape=shapes[0]).contiguous().unbound()] * 3
    is_empty = 0 in grad_out.shape
    run = None if is_empty else implementation(backend).prepare_backward(call, grad_out, has_grad_lse, parts)

    def backward(grad_out, grad_lse, query, key, value, rpb, out, lse) -> list[Tensor]:
        if is_empty:
            return [x.new_zeros(x.shape) for x in (query, key, value, rpb) if x is not None]
        grads = [grad_out.new_empty(shape) for shape in shapes]
        parts = grads[0].unbind(-3) if key is None else grads
        grad_rpb = run(grad_out, grad_lse, *unpacked(query, key, value), rpb, out, lse, parts)
        return grads if rpb is None else [*grads, grad_rpb]

    return backward


@cache
def implementation(backend: str) -> ModuleType:
    """The module behind a backend."""
    if backend == "triton":
        return importlib.import_module(".fused", __package__)
    return reference if backend == "reference" else tiled
