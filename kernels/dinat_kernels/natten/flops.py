"""Multiply-adds of neighborhood attention, by NATTEN's functions and for fvcore's counter: `natten.flops`.

`torch.utils.flop_counter.FlopCounterMode` knows the operator without any of this.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..functional import Bools, Ints
from ..geometry import Neighborhood, make_neighborhood, visible_pairs

__all__ = ["add_natten_handle", "fna_flop_count", "get_flops", "has_fvcore", "na_av_flop_count", "na_qk_flop_count"]

has_fvcore = importlib.util.find_spec("fvcore") is not None


def _product(
    shape: Sequence[int], kernel_size: Ints, dilation: Ints, is_causal: Bools, is_heads_last: bool, return_macs: bool
) -> int:
    """One of the two products of attention; shape is that of the query or value."""
    batch, *spatial, dim = shape
    heads = spatial.pop(-1 if is_heads_last else 0)
    window = make_neighborhood(len(spatial), kernel_size, dilation, 1, is_causal)
    return (1 if return_macs else 2) * batch * heads * dim * visible_pairs(window, spatial)


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: Ints,
    dilation: Ints,
    is_causal: Bools,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """FLOP (or multiply-adds) of the dot products: 2 (or 1) per channel of a visible pair, so fewer on causal axes."""
    return _product(q_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Ints,
    dilation: Ints,
    is_causal: Bools,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """FLOP (or multiply-adds) of the weighted sums."""
    return _product(v_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs)


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Ints,
    dilation: Ints,
    is_causal: Bools,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """FLOP (or multiply-adds) of both products."""
    window = kernel_size, dilation, is_causal, is_heads_last, return_macs
    return na_qk_flop_count(q_shape, k_shape, *window) + na_av_flop_count(q_shape, v_shape, *window)


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Of the operator; inputs and outputs are values of a trace."""
    batch, *spatial, heads, value_dim = _shape(outputs[0])
    window = Neighborhood.from_flat([x.toIValue() for x in inputs[4].node().inputs()])
    return batch * heads * (_shape(inputs[0])[-1] + value_dim) * visible_pairs(window, spatial)


def _scores_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _average_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(_shape(inputs[0])) * _shape(outputs[0])[-1]


def add_natten_handle(flop_ctr: Any) -> Any:
    """Make a `fvcore.nn.FlopCountAnalysis` know neighborhood attention; returns it.  It counts multiply-adds."""
    return flop_ctr.set_op_handle(
        **{
            "dinat_kernels::attention": _attention_macs,
            "prim::PythonOp._Scores": _scores_macs,
            "prim::PythonOp._Average": _average_macs,
        }
    )


def get_flops(model: nn.Module, input: Any, disable_warnings: bool = False) -> int:
    """Multiply-adds of a model, by fvcore.

    Raises:
        ImportError: fvcore is not installed.
    """
    if not has_fvcore:
        raise ImportError(
            "natten.flops.get_flops needs fvcore: pip install fvcore, or use torch.utils.flop_counter.FlopCounterMode"
        )
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input))
    return counter.unsupported_ops_warnings(not disable_warnings).total()
