"""The precision that backends compute in."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, softmax, sums and lse: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast is on with, or None where it is off.  The meta device has none."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_tensor(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in the autocast dtype, unless autocast leaves its kind alone, as float64."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def without_autocast(function: Callable) -> Callable:
    """Run `function` with autocast off for the device of its first argument: it chooses its own precision."""

    @functools.wraps(function)
    def wrapper(first: torch.Tensor, *args, **kwargs):
        device_type = first.device.type
        if autocast_dtype(device_type) is None:
            return function(first, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper
