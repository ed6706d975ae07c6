"""The checks of arguments that NATTEN offers: `natten.utils`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..functional import Bools, Ints
from ..geometry import per_axis
from .fused import given
from .switches import get_device_cc

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "create_causal_arg_from_bool",
    "create_dim_from_int",
    "get_device_cc",
    "get_num_na_weights",
    "make_attn_tensor_from_input",
]


def _check(name: str, kind: type = int, default: int | bool | None = None) -> Callable[[int, Ints | Bools], tuple]:
    def check(na_dim: int, argument: Ints | Bools | None) -> tuple:
        """The argument as a tuple of one entry for each of `na_dim` axes; a ValueError names it if it is none."""
        return per_axis(name, given(argument, default), na_dim, kind)

    return check


check_input_size_arg = _check("input_size")
check_kernel_size_arg = _check("kernel_size")
check_stride_arg = _check("stride", default=1)
check_dilation_arg = _check("dilation", default=1)
check_causal_arg = _check("is_causal", bool, default=False)


def create_dim_from_int(na_dim: int, value: int) -> tuple[int, ...]:
    """`value` for each axis."""
    return (value,) * na_dim


def create_causal_arg_from_bool(na_dim: int, value: bool) -> tuple[bool, ...]:
    """`value` for each axis."""
    return (value,) * na_dim


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """Number of keys in a window."""
    return math.prod(kernel_size)


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """An empty tensor for attention weights, (*, attention_dim) for an input (*, dim)."""
    return torch.empty_like(input_tensor[..., :1].expand(*input_tensor.shape[:-1], attention_dim)).requires_grad_(
        input_tensor.requires_grad
    )


def check_additional_keys(input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """Number of additional tokens, (batch, heads, tokens, dim) for an input (batch, heads, *spatial, dim).

    Raises:
        ValueError: the shapes do not fit together.
    """
    if additional_keys is None:
        return 0
    batch, heads, *_, dim = input_tensor.shape
    expected = (batch, heads, additional_keys.shape[-2], dim)
    if tuple(additional_keys.shape) != expected:
        raise ValueError(
            f"additional_keys must be (batch, heads, tokens, dim) = {expected}, got {tuple(additional_keys.shape)}"
        )
    return additional_keys.shape[-2]


def check_additional_values(
    attn_tensor: Tensor, additional_values: Tensor | None, value: Tensor, expected_attn_weights: int
) -> int:
    """Number of additional tokens, (batch, heads, tokens, dim), for which `attn_tensor` must have weights.

    Raises:
        ValueError: the shapes do not fit together.
    """
    tokens = check_additional_keys(value, additional_values)
    if attn_tensor.shape[-1] != expected_attn_weights + tokens:
        raise ValueError(
            f"attn must have {expected_attn_weights + tokens} weights per token, got {attn_tensor.shape[-1]}"
        )
    return tokens
