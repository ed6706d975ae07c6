"""The layers of NATTEN 0.14: the bias is on unless `bias=False`."""

from __future__ import annotations

from .. import modules

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _Layer:
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
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
            rel_pos_bias=bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )


class NeighborhoodAttention1D(_Layer, modules.NeighborhoodAttention1d):
    """`dinat_kernels.NeighborhoodAttention1d` with the arguments of NATTEN 0.14."""


class NeighborhoodAttention2D(_Layer, modules.NeighborhoodAttention2d):
    """`dinat_kernels.NeighborhoodAttention2d` with the arguments of NATTEN 0.14."""


class NeighborhoodAttention3D(_Layer, modules.NeighborhoodAttention3d):
    """`dinat_kernels.NeighborhoodAttention3d` with the arguments of NATTEN 0.14: the first axis has its own window."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        *args,
        **kwargs,
    ) -> None:
        kernel_sizes = (kernel_size_d or kernel_size, kernel_size, kernel_size)
        dilation = dilation or 1
        super().__init__(dim, num_heads, kernel_sizes, (dilation_d or dilation, dilation, dilation), *args, **kwargs)
