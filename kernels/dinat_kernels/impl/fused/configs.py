"""Launch configurations: a checked-in table, and the user's own in front of it (see `dinat_kernels.tune`).

Chosen by tables and arithmetic only, never by a measurement at run time: ranks that time kernels pick different
winners, and then differ in their results.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Config(NamedTuple):
    """How a kernel is launched.  `tile` and `block` are upper limits: small maps and windows need less."""

    tile: int  # queries of a program
    block: int  # keys of a block
    num_warps: int
    num_stages: int


class ProblemClass(NamedTuple):
    """What a configuration may depend on."""

    arch: str  # "sm_90", "gfx942"
    bits: int  # of an input element
    dim: int  # the larger of head_dim and value_dim, rounded up to a power of two, at least 16
    dense: bool  # every query sees its whole dilation group: kernel_size * dilation == length on every axis
    window: int  # keys that a query sees

    def __str__(self) -> str:
        return f"{self.arch}/{self.bits}bit/dim{self.dim}/{'dense' if self.dense else 'halo'}/window{self.window}"


def cache_file() -> Path:
    """Where the user's configurations are: `DINAT_TUNE_FILE`, or a file in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dinat_kernels" / "configs.json"
    return Path(os.environ.get("DINAT_TUNE_FILE", default))


@cache
def _user_configs() -> dict[str, Config]:
    path = cache_file()
    if not path.exists():
        return {}
    return {name: Config(*fields) for name, fields in json.loads(path.read_text()).items()}


# Bits, whether for dense problems only, the largest dim and window, and the configuration: the first row that covers a
# problem serves it.  Ranked by issued instructions, and held to no spills on any architecture, with benchmarks/aot.py:
# small tiles waste less key work, fewer warps compute fewer addresses twice.
_SHIPPED = (
    (16, True, 32, 64, Config(64, 64, 2, 2)),
    (16, True, 128, 64, Config(64, 64, 4, 2)),
    (16, False, 64, math.inf, Config(32, 64, 2, 2)),
    (16, False, 128, math.inf, Config(32, 32, 2, 2)),
    (32, False, 64, math.inf, Config(32, 32, 4, 1)),
    (32, False, 128, math.inf, Config(16, 32, 8, 1)),
)


def choose(problem: ProblemClass) -> Config:
    """The user's configuration for this class of problems, else the shipped one."""
    user = _user_configs().get(str(problem))
    if user is not None:
        return user
    return next(
        config
        for bits, dense_only, dim, window, config in _SHIPPED
        if problem.bits == bits and problem.dense >= dense_only and problem.dim <= dim and problem.window <= window
    )


def next_power_of_two(n: int) -> int:
    return 1 << math.ceil(math.log2(n))
