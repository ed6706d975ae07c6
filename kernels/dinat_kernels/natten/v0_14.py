"""The layers of NATTEN 0.14 and 0.15: the bias is on unless `bias=False`, a volume's first axis has its own window."""

from __future__ import annotations

from .. import modules
from . import flops, weights
from .fused import given
from .release import Release, public

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
            given(dilation, 1),
            rel_pos_bias=bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.window_size = self.kernel_size[-1] * self.dilation[-1]  # of the last axes, in tokens of the map


class NeighborhoodAttention1D(_Layer, modules.NeighborhoodAttention1d):
    """`dinat_kernels.NeighborhoodAttention1d` with the arguments of NATTEN 0.14."""


class NeighborhoodAttention2D(_Layer, modules.NeighborhoodAttention2d):
    """`dinat_kernels.NeighborhoodAttention2d` with the arguments of NATTEN 0.14."""


class NeighborhoodAttention3D(_Layer, modules.NeighborhoodAttention3d):
    """`dinat_kernels.NeighborhoodAttention3d` with the arguments of NATTEN 0.15: the first axis has its own window."""

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
        dilation = given(dilation, 1)
        window = weights.depth_first(
            given(kernel_size_d, kernel_size), kernel_size, given(dilation_d, dilation), dilation
        )
        super().__init__(dim, num_heads, *window, *args, **kwargs)
        self.window_size_d = self.kernel_size[0] * self.dilation[0]


LAYERS = public(globals())
RELEASE = Release(
    "0.14.6",
    {
        "natten": LAYERS,
        "natten.flops": public(vars(flops)),
        "natten.functional": public(vars(weights)),
        "natten.natten1d": LAYERS,
        "natten.natten2d": LAYERS,
    },
)
