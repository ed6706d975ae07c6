"""NATTEN's interfaces on this operator, for code that was written against NATTEN.

Either import from here what the code imports from `natten`:

    from dinat_kernels.natten import na2d                                    # NATTEN 0.20 and newer
    from dinat_kernels.natten.v0_17 import NeighborhoodAttention2D           # 0.15 to 0.17; v0_14 for 0.14
    from dinat_kernels.natten.functional import natten2dav, natten2dqkrpb    # any

or leave the code as it is and call `install` before it imports `natten`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import functional
from .v0_21 import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, na1d, na2d, na3d

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "functional",
    "install",
    "na1d",
    "na2d",
    "na3d",
    "uninstall",
]

_VERSIONS = {"0.14": "v0_14", "0.17": "v0_17", "0.21": "v0_21"}
_replaced: dict[str, ModuleType] | None = None  # what `install` took out of sys.modules; None while it is not active


def install(version: str = "0.21", *, override: bool = False) -> None:
    """Make `import natten` and `import natten.functional` give this package, in this process.

    Code that was imported before keeps what it imported.

    Args:
        version: whose arguments and defaults hold, as the same call means different things: "0.14" (bias on by
            default), "0.17" (`rel_pos_bias`, off by default; also for 0.15) or "0.21" (strides; also for 0.20).
            The functions of the older ones that return attention weights are there whatever the version.
        override: also where NATTEN is installed.

    Raises:
        ValueError: unknown version.
        RuntimeError: NATTEN is installed and `override` is False.
    """
    global _replaced
    if version not in _VERSIONS:
        raise ValueError(f"version must be one of {', '.join(map(repr, _VERSIONS))}, got {version!r}")
    uninstall()
    if not override and ("natten" in sys.modules or importlib.util.find_spec("natten")):
        raise RuntimeError("NATTEN is installed; pass override=True to use dinat_kernels in its place")
    source = importlib.import_module(f".{_VERSIONS[version]}", __name__)
    layers = {name: getattr(source, name) for name in source.__all__}
    fused = {name: x for name, x in layers.items() if name.startswith("na")}
    modules = {
        "natten": layers,
        "natten.functional": {n: x for n, x in vars(functional).items() if n.startswith(("na", "neighborhood"))}
        | fused,
    }
    if version != "0.14":  # whose absence tells 0.14 from later versions
        modules["natten.context"] = {name: x for name, x in layers.items() if name.startswith("use")}
    _replaced = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "natten"}
    for name, contents in modules.items():
        module = ModuleType(name, f"NATTEN {version} on dinat_kernels, see dinat_kernels.natten.")
        module.__spec__ = ModuleSpec(name, None, is_package=name == "natten")
        vars(module).update(contents)
        sys.modules[name] = module
    natten = sys.modules["natten"]
    natten.__path__, natten.__version__ = [], f"{version}+dinat"
    for name in modules:
        if name != "natten":
            setattr(natten, name.removeprefix("natten."), sys.modules[name])


def uninstall() -> None:
    """Undo `install`; an installed NATTEN is what `import natten` gives again."""
    global _replaced
    if _replaced is not None:
        for name in ("natten", "natten.functional", "natten.context"):
            sys.modules.pop(name, None)
        sys.modules.update(_replaced)
        _replaced = None
