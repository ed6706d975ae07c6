"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`: 2 per multiply-add of a visible (query, key) pair.

PyTorch's module imports Triton, and warns where there is none.  So it is not imported here: the formulas are registered
when somebody else imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from .geometry import Neighborhood, visible_pairs

_FLOP_COUNTER = "torch.utils.flop_counter"


def _flops(out: Sequence[int], inner: int, window: Sequence[int]) -> int:
    """FLOP of products that take `inner` multiply-adds for each visible pair; `out` is the shape of the result."""
    batch, *spatial, heads, _ = out
    return 2 * inner * batch * heads * visible_pairs(Neighborhood.from_flat(window), spatial)


def _forward_flops(query, key, value, rpb, window, *args, out_shape=None, **kwargs) -> int:
    out, _ = out_shape
    return _flops(out, query[-1] + out[-1], window)


def _backward_flops(
    grad_out, grad_lse, query, key, value, rpb, out, lse, window, *args, out_shape=None, **kwargs
) -> int:
    return _flops(out, 3 * query[-1] + 2 * out[-1], window)


def _register(flop_counter: ModuleType) -> None:
    flop_counter.register_flop_formula(torch.ops.dinat_kernels.attention)(_forward_flops)
    flop_counter.register_flop_formula(torch.ops.dinat_kernels.attention_backward)(_backward_flops)


class _RegisterOnImport(MetaPathFinder):
    """Finds PyTorch's module as the usual finders do, and registers the formulas each time it has run."""

    searching = False

    def find_spec(self, fullname, path, target=None) -> ModuleSpec | None:
        if fullname != _FLOP_COUNTER or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Make FlopCounterMode know the operator, now or as soon as it is imported."""
    if _FLOP_COUNTER in sys.modules:
        _register(sys.modules[_FLOP_COUNTER])
    else:
        sys.meta_path.insert(0, _RegisterOnImport())
