"""Neighborhood attention as layers, with the parameters of the published checkpoints: `qkv`, `rpb` and `proj`."""

from collections.abc import Sequence
from typing import List, Optional  # noqa: UP035  TorchScript reads the annotations of attributes

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .explicit import average, logits
from .functional import Bools, Ints, attend
from .geometry import Neighborhood, make_neighborhood
from .impl.precision import working_dtype
from .impl.tiled import unrolled


def _is_split(x: Tensor, window: Neighborhood) -> bool:
    """Whether a layer turns the dilation groups of its input into images: if each group is a single window.

    Not on CUDA, whose kernels read tokens where they are.  Elsewhere tokens are gathered, and it is faster to do that
    before the projection makes three of each.
    """
    if x.is_cuda or max(window.dilation) == 1 or x.dim() != window.rank + 2 or torch.jit.is_tracing():
        return False
    sizes = x.shape[1:-1]
    same = [k * d == n for k, d, n in zip(window.kernel_size, window.dilation, sizes, strict=True)]
    if torch.compiler.is_compiling() or any(type(n) is not int for n in sizes):
        # A symbolic size must not become a fixed one.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(equal) for equal in same)
    return all(same)


def _split(x: Tensor, dilation: Sequence[int]) -> Tensor:
    """Dilation groups as images: (batch, *spatial, dim) to (batch * groups, *positions, dim)."""
    batch, *spatial, dim = x.shape
    rank = len(spatial)
    sizes = [size for n, d in zip(spatial, dilation, strict=True) for size in (n // d, d)]
    groups, positions = range(2, 2 * rank + 1, 2), range(1, 2 * rank, 2)
    return x.reshape(batch, *sizes, dim).permute(0, *groups, *positions, 2 * rank + 1).flatten(0, rank)


def _join(x: Tensor, dilation: Sequence[int]) -> Tensor:
    """Undo `_split`."""
    _, *positions, dim = x.shape
    rank = len(positions)
    spatial = [n * d for n, d in zip(positions, dilation, strict=True)]
    order = [1 + axis + part * rank for axis in range(rank) for part in (1, 0)]
    return x.reshape(-1, *dilation, *positions, dim).permute(0, *order, 2 * rank + 1).reshape(-1, *spatial, dim)


class _NeighborhoodAttention(nn.Module):
    """Multi-head self-attention over each token's neighborhood (NAT, Hassani et al., CVPR 2023, section 3).

    A map that is shorter than `kernel_size * dilation` on some axis is zero-padded to that size at its end before the
    qkv projection and cropped afterwards, as in the published models: a padded token has its key and value equal to the
    biases of the projection, and takes part in the softmax.

    Args:
        dim: channels in and out.
        num_heads: attention heads; must divide `dim`.
        kernel_size: window size, one for all axes or one per axis.
        dilation: distance between the tokens of a window, one or one per axis.
        stride: queries that share a window, one or one per axis.
        is_causal: hide the keys after the query, one or one per axis.  Requires `rel_pos_bias=False`.
        rel_pos_bias: learn a relative position bias `rpb` (num_heads, 2 * kernel_size - 1, ...).
        qkv_bias: learn a bias in the qkv projection.
        qk_scale: factor of the dot products, `(dim // num_heads) ** -0.5` by default.
        attn_drop: dropout probability of attention weights in training.  Runs outside the fused operator: it keeps the
            logits for the backward pass, and breaks the graph of torch.compile.
        proj_drop: dropout probability of the output in training.
        fused: False makes a tensor of the attention weights, which passes through the module `attn_drop`, where hooks
            see it: (batch, heads, *spatial, prod(kernel_size)), of padded maps if they are.  Slower, and they are kept
            for the backward pass.  Compiled, traced and scripted layers, which call no hooks, stay fused.
        backend: see `na2d`; None or "torch" where `fused` is False.

    Shape:
        (batch, *spatial, dim) to the same.

    Raises:
        ValueError: `num_heads` does not divide `dim`, window arguments are out of range, or `backend` is not one for
            `fused=False`; in `forward`, the input has another layout, such as channels first.
    """

    rank: int
    kernel_size: List[int]  # noqa: UP006
    dilation: List[int]  # noqa: UP006
    stride: List[int]  # noqa: UP006
    is_causal: List[bool]  # noqa: UP006
    rpb: Optional[Tensor]  # noqa: UP045
    backend: Optional[str]  # noqa: UP045

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints = 1,
        stride: Ints = 1,
        is_causal: Bools = False,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        fused: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads} with dim={dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else float(qk_scale)
        if not fused and backend not in (None, "torch"):
            raise ValueError(f'backend must be None or "torch" with fused=False, got {backend!r}')
        self.fused = fused
        self.backend = backend
        self.set_window(kernel_size, dilation, stride, is_causal)
        if rel_pos_bias and any(self.is_causal):
            raise ValueError(f"rel_pos_bias cannot be combined with a causal axis, got is_causal={is_causal!r}")

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size), **factory))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)  # not called while idle: that takes microseconds

    @torch.jit.ignore
    def set_window(self, kernel_size: Ints, dilation: Ints = 1, stride: Ints = 1, is_causal: Bools = False) -> None:
        """Change the window.  The caller keeps `rpb` in step when `kernel_size` changes."""
        window = make_neighborhood(self.rank, kernel_size, dilation, stride, is_causal)
        self.kernel_size, self.dilation, self.stride, self.is_causal = map(list, window)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_layout(x)
        padding = [0, 0]
        padded = False
        for axis in range(len(self.kernel_size), 0, -1):
            missing = self.kernel_size[axis - 1] * self.dilation[axis - 1] - x.shape[axis]
            padding += [0, missing if missing > 0 else 0]
            padded = padded or missing > 0
        y = F.pad(x, padding) if padded else x

        if torch.jit.is_scripting():
            assert not (self.training and self.attn_drop.p > 0), "attn_drop is not supported by TorchScript training"
            backend = self.backend
            y, _ = torch.ops.dinat_kernels.attention(
                torch.unflatten(self.qkv(y), -1, (3, self.num_heads, self.head_dim)),
                None,
                None,
                self.rpb,
                self.kernel_size + self.dilation + self.stride + [int(causal) for causal in self.is_causal],
                self.scale,
                "" if backend is None else backend,
            )
            y = y.flatten(-2)
        else:
            y = self._attend(y)
        if padded:
            for axis in range(1, x.dim() - 1):
                y = y.narrow(axis, 0, x.shape[axis])
        y = self.proj(y)
        return self.proj_drop(y) if self.proj_drop.p > 0 else y

    @torch.jit.unused
    def _check_layout(self, x: Tensor) -> None:
        if x.dim() != self.rank + 2 or x.shape[-1] != self.dim:
            axes = ", ".join("XYZ"[: self.rank])
            raise ValueError(
                f"x must be (batch, {axes}, dim), channels last, with dim={self.dim}, got shape {tuple(x.shape)}"
            )

    @torch.jit.unused
    def _attend(self, x: Tensor) -> Tensor:
        """Projection and attention, heads side by side."""
        window = Neighborhood(*map(tuple, (self.kernel_size, self.dilation, self.stride, self.is_causal)))
        if not (self.fused or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return self._attend_explicitly(x, window)
        dilation = window.dilation
        split = _is_split(x, window)
        if split:
            x, window = _split(x, dilation), window.undilated()
        qkv = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, self.head_dim))
        if self.training and self.attn_drop.p > 0:
            if self.backend not in (None, "torch"):
                raise RuntimeError(f'attn_drop needs backend None or "torch" in training, got backend={self.backend!r}')
            q, k, v = qkv.unbind(-3)
            y, _ = unrolled.attention(q, k, v, self.rpb, window, self.scale, dropout_p=self.attn_drop.p)
        else:
            y = attend(self.rank, qkv, None, None, window, self.scale, self.rpb, return_lse=False, backend=self.backend)
        y = y.flatten(-2)
        return _join(y, dilation) if split else y

    @torch.jit.unused
    def _attend_explicitly(self, x: Tensor, window: Neighborhood) -> Tensor:
        """`_attend` with the weights as a tensor."""
        qkv = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.movedim((-3, -2), (0, 2))  # (batch, heads, *spatial, head_dim) each
        dtype = working_dtype(q.dtype)
        weights = logits(q.to(dtype) * self.scale, k.to(dtype), window, self.rpb).softmax(-1)
        return average(self.attn_drop(weights), v, window).movedim(1, -2).flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"stride={self.stride}, is_causal={self.is_causal}, rel_pos_bias={self.rpb is not None}"
        )


class NeighborhoodAttention1d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 1


class NeighborhoodAttention2d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 2


class NeighborhoodAttention3d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 3
