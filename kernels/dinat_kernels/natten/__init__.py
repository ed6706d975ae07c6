"""NATTEN's interfaces on this operator, for code that was written against NATTEN.

Either import from here what the code imports from `natten`:

    from dinat_kernels.natten import na2d                                    # NATTEN 0.20 and newer
    from dinat_kernels.natten.v0_17 import NeighborhoodAttention2D           # or v0_14, v0_15
    from dinat_kernels.natten.functional import natten2dav, natten2dqkrpb    # any

or leave the code as it is and call `install` before it imports `natten`.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from . import functional, switches
from .functional import attention, merge_attentions
from .release import RELEASES, Finder
from .v0_21 import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, na1d, na2d, na3d

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention",
    "functional",
    "install",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "uninstall",
]

# What `install` put into sys.meta_path and took out of sys.modules; None while it is not active.
_installed: tuple[Finder, dict[str, ModuleType]] | None = None


def install(version: str = "0.21", *, override: bool = False) -> None:
    """Make `import natten` and the modules below it give this package, in this process.

    Every public name of the generation's last release is served, or refused with what to use instead: an ImportError
    by `from natten import name`, an AttributeError by `natten.name`.  Switches of NATTEN start at their defaults.
    Code that was imported before keeps what it imported.

    Args:
        version: whose arguments and defaults hold, as the same call means different things: "0.14" (bias on by
            default), "0.15" (likewise; the first axis of a volume has its own window), "0.17" (`rel_pos_bias`, off by
            default; causal axes) or "0.21" (strides; also for 0.20).  The functions that return attention weights are
            there whatever the version.
        override: also where NATTEN is installed.

    Raises:
        ValueError: unknown version.
        RuntimeError: NATTEN is installed and `override` is False.
    """
    global _installed
    if version not in RELEASES:
        raise ValueError(f"version must be one of {', '.join(map(repr, RELEASES))}, got {version!r}")
    uninstall()
    if not override and ("natten" in sys.modules or importlib.util.find_spec("natten")):
        raise RuntimeError("NATTEN is installed; pass override=True to use dinat_kernels in its place")
    switches.NattenContext.reset()
    switches.AutotunerContext.reset()
    _installed = Finder(version), _take_out()
    sys.meta_path.insert(0, _installed[0])


def uninstall() -> None:
    """Undo `install`; an installed NATTEN is what `import natten` gives again."""
    global _installed
    if _installed is not None:
        finder, replaced = _installed
        sys.meta_path.remove(finder)
        _take_out()
        sys.modules.update(replaced)
        _installed = None


def _take_out() -> dict[str, ModuleType]:
    """Modules of `natten` that were imported, removed from sys.modules."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "natten"}
