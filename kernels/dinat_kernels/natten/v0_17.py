"""The layers and fused functions of NATTEN 0.17: causal axes, and no bias unless `rel_pos_bias=True`."""

from __future__ import annotations

import logging

from torch import Tensor

from .. import modules
from ..functional import Bools, Ints
from ..geometry import make_neighborhood
from . import checks, flops, switches, types, weights
from .fused import given, neighborhood_attention_generic
from .release import Release, public

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "check_all_args",
    "na1d",
    "na2d",
    "na3d",
]


def _na(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints | None = 1,
    is_causal: Bools | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict | None = None,
) -> Tensor:
    """Neighborhood attention, tensors heads last; `dilation` follows `kernel_size`, where 0.20 has `stride`.

    Raises:
        ValueError: as `natten.functional.na2d` of 0.21, or `xformers_kwargs` that change the result.
    """
    if unserved := set(xformers_kwargs or ()) - {"op"}:
        raise ValueError(f"xformers_kwargs can only choose the 'op', which is ignored here, got {min(unserved)!r}")
    return neighborhood_attention_generic(
        query,
        key,
        value,
        kernel_size,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        rpb=rpb,
    )


na1d = na2d = na3d = _na


def check_all_args(
    na_dim: int, kernel_size: Ints, dilation: Ints | None, is_causal: Bools | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The arguments as tuples of one entry for each axis; a ValueError names one that is none."""
    window = make_neighborhood(na_dim, kernel_size, given(dilation, 1), 1, given(is_causal, False))
    return window.kernel_size, window.dilation, window.is_causal


class _Layer:
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints | None = 1,
        is_causal: Bools | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,  # the others are no less: both are the operator
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            given(dilation, 1),
            is_causal=given(is_causal, False),
            rel_pos_bias=rel_pos_bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )


class NeighborhoodAttention1D(_Layer, modules.NeighborhoodAttention1d):
    """`dinat_kernels.NeighborhoodAttention1d` with the arguments of NATTEN 0.17."""


class NeighborhoodAttention2D(_Layer, modules.NeighborhoodAttention2d):
    """`dinat_kernels.NeighborhoodAttention2d` with the arguments of NATTEN 0.17."""


class NeighborhoodAttention3D(_Layer, modules.NeighborhoodAttention3d):
    """`dinat_kernels.NeighborhoodAttention3d` with the arguments of NATTEN 0.17."""


_LAYERS, _FUNCTIONS = public(globals(), "Neighborhood"), public(globals(), "na")
_CHECKS = public(vars(checks)) | public(globals(), "check")
RELEASE = Release(
    "0.17.5",
    {
        "natten": _LAYERS | public(vars(switches)),
        "natten.context": public(vars(switches)),
        "natten.experimental": _FUNCTIONS,
        "natten.flops": public(vars(flops)),
        "natten.functional": public(vars(weights)) | _FUNCTIONS,
        **{f"natten.{name}{rank}d": _LAYERS for name in ("na", "natten") for rank in (1, 2, 3)},
        "natten.types": public(vars(types)) | public(vars(checks), "create"),
        "natten.utils": _CHECKS,
        "natten.utils.checks": _CHECKS,
        "natten.utils.log": {"get_logger": logging.getLogger},
        "natten.utils.misc": public(vars(checks), "get_device"),
        "natten.utils.tensor": _CHECKS,
    },
)
