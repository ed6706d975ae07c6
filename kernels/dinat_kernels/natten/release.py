"""A release of NATTEN as this package serves it: which module shows which name, and why some show none."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

RELEASES = {"0.14": "v0_14", "0.15": "v0_15", "0.17": "v0_17", "0.21": "v0_21"}

# What is not served: a pattern of full names, and what to use.  The first one that matches holds.
_REFUSED = {
    r".*\.(logger|torch_ver|amp_fwd|amp_bwd)": "use the modules logging and torch.amp, and torch.__version__",
    r"natten\.(_C|libnatten|_libnatten|_environment)": "it is the compiled library; see dinat_kernels.backends() "
    "for what runs here",
    r"natten\.functional\..*F(unctio)?n": "it is an autograd function; call natten2dqkrpb, natten2dav, na2d_qk or "
    "na2d_av and their like",
    r"natten\.functional\.FusedNeighborhoodAttention.D": "it is an autograd function; call na1d, na2d or na3d",
    r"natten\.flops\..*_flop": "it counts one node of a trace of NATTEN's kernels; use add_natten_handle or get_flops",
    r"natten\.nested": "call na2d_qk and na2d_av of natten.functional for each tensor of x.unbind()",
    r"natten\.ops": "natten.functional takes additional_keys and additional_values, and "
    "dinat_kernels.natten.merge_attentions merges",
    r"natten\.(flex|backends)": "na1d, na2d and na3d choose what runs, or take backend=; see dinat_kernels.backends()",
    r"natten\.attn_merge": "use natten.functional.merge_attentions",
    r"natten\.autotuner": "python -m dinat_kernels.tune finds launch configurations once, for all runs",
    r"natten\.(profiler|profiling_utils)": "use torch.profiler",
    r"natten\.token_permute": "na1d, na2d and na3d take tokens as they are; there is nothing to permute",
    r"natten\.experimental": "na1d, na2d and na3d are operators of torch.library already: torch.compile and "
    "FlopCounterMode know them",
    r"natten\.modules\.NeighborhoodAttentionGeneric": "use NeighborhoodAttention1D, 2D or 3D",
    r"natten\.utils\.testing": "use pytest.mark.skipif with torch.cuda.is_available()",
    r"natten\.utils(\.checks)?\..*(tiling|tile|schedule).*": "tile shapes and schedules are ignored here, so pass any",
    r"natten\.utils\.checks": "na1d, na2d, na3d and attention check what they are given, and name the argument",
    r"natten\.utils\.log": "use the module logging",
    r"natten\.utils\.varlen": "call natten.attention for each sequence, or torch.nn.attention.varlen.varlen_attn",
    r"natten\.utils\.(device|dtype)": "use torch.Tensor.device and torch.Tensor.dtype, and torch.cuda",
    r"natten\.utils\.environment": "use os.environ, torch.compiler.is_compiling() and torch.cuda.is_available()",
    r"natten\.utils\.tuples": "compute with the tuples' entries, as in tuple(map(operator.mul, x, y))",
}


class Release(NamedTuple):
    """A generation of NATTEN's interface, as its last release has it."""

    number: str
    modules: dict[str, dict[str, object]]  # NATTEN's module: its names, and what serves them


def public(namespace: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Names that a module declares in `__all__`, those with a prefix, and what they are."""
    return {name: namespace[name] for name in namespace["__all__"] if name.startswith(prefix)}


def release(version: str) -> Release:
    """The release that a generation is known by, see `RELEASES`."""
    return importlib.import_module(f".{RELEASES[version]}", __package__).RELEASE


def refusal(name: str) -> str | None:
    """Why NATTEN's `name`, with its module, is not served and what to use instead; None if nothing is known of it."""
    for pattern, instead in _REFUSED.items():
        if re.fullmatch(rf"{pattern}(\..*)?", name):
            return f"dinat_kernels has no {name}: {instead}."
    if others := list(_generations(name)):
        return f"{name} is of another NATTEN: dinat_kernels.natten.install({others[-1]!r}) has it."
    return None


def _generations(name: str) -> Iterator[str]:
    module, _, last = name.rpartition(".")
    for version in RELEASES:
        modules = release(version).modules
        if name in modules or last in modules.get(module, ()):
            yield version


class Finder(MetaPathFinder, Loader):
    """Finds and loads the modules of a release."""

    def __init__(self, version: str) -> None:
        self._number, self._modules = release(version)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Also asked for the names that `from natten.X import name` does not find in the module: all are packages."""
        if fullname in self._modules:
            spec = ModuleSpec(fullname, self, origin=__file__, is_package=True)
            spec.has_location = True
            return spec
        if fullname.startswith("natten.") and (reason := refusal(fullname)):
            raise ImportError(reason, name=fullname)
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        names = self._modules[name]

        def missing(attribute: str) -> object:
            full = f"{name}.{attribute}"
            if full in self._modules:
                return importlib.import_module(full)
            raise AttributeError(refusal(full) or f"module {name!r} has no attribute {attribute!r}")

        vars(module).update(
            names,
            __all__=list(names),
            __doc__=f"NATTEN {self._number} on dinat_kernels, see dinat_kernels.natten.",
            __getattr__=missing,
            __version__=f"{self._number}+dinat",
        )
