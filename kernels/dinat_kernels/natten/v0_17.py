"""The layers and fused functions of NATTEN 0.15 to 0.17: causal axes, and no bias unless `rel_pos_bias=True`."""

from __future__ import annotations

from torch import Tensor

from .. import modules
from ..functional import Bools, Ints
from .functional import neighborhood_attention_generic

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "na1d",
    "na2d",
    "na3d",
    "use_autotuner",
    "use_fused_na",
    "use_kv_parallelism_in_fused_na",
]


def _na(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Neighborhood attention, tensors heads last; `dilation` follows `kernel_size`, where 0.20 has `stride`."""
    return neighborhood_attention_generic(
        query, key, value, kernel_size, dilation=dilation, is_causal=is_causal, rpb=rpb, scale=scale
    )


na1d = na2d = na3d = _na


def _choose_implementation(*args, **kwargs) -> None:
    """Chooses among equal implementations of NATTEN; without effect here."""


use_autotuner = use_fused_na = use_kv_parallelism_in_fused_na = _choose_implementation


class _Layer:
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints | None = 1,
        is_causal: Bools = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            dilation or 1,
            is_causal=is_causal,
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
