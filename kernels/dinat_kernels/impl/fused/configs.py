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
from typing import Literal, NamedTuple


class Config(NamedTuple):
    """How a kernel is launched.  Tile and block are upper limits: small maps and windows need less, and fewer warps."""

    tile: int  # tokens that a program owns: queries, or keys in the key kernel
    block: int  # tokens of a block of the other side, or of a part of it
    num_warps: int  # of a tile and block of these sizes
    num_stages: int
    programs: int = 4  # that a multiprocessor holds at a time, about
    parts: int = 1  # of a block that holds all of the other side, where one of `block` tokens does not


# What the lengths of dilation groups are: "dense", a window on every axis, so that every query sees its whole group;
# "halves", one or two windows; "halo", any.
Extent = Literal["dense", "halves", "halo"]
_DENSE, _HALVES, _ANY = ("dense",), ("halves",), ("dense", "halves", "halo")


class ProblemClass(NamedTuple):
    """What a configuration may depend on."""

    kernel: str  # "forward", "query", "key"
    arch: str  # "sm_90", "gfx942"
    bits: int  # of an input element
    dim: int  # the larger of head_dim and value_dim, rounded up to a power of two, at least 16
    extent: Extent  # of the dilation groups
    window: int  # keys that a query sees

    def __str__(self) -> str:
        return f"{self.kernel}/{self.arch}/{self.bits}bit/dim{self.dim}/{self.extent}/window{self.window}"


def cache_file() -> Path:
    """Where the user's configurations are: `DINAT_TUNE_FILE`, or a file in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dinat_kernels" / "configs.json"
    return Path(os.environ.get("DINAT_TUNE_FILE", default))


@cache
def user_configs() -> dict[str, Config]:
    """The user's configurations, by the name of the problem class."""
    path = cache_file()
    if not path.exists():
        return {}
    return {name: Config(*fields) for name, fields in json.loads(path.read_text()).items()}


# Beginning of the architecture's name, bits, extents, the largest dim and window, and the configuration: the first row
# that covers a problem serves it.  Where one block holds all keys of a tile, mask and bias are worked out once for many
# images.  Held to no spills in loops, and ranked by paper time, with benchmarks/aot.py; windows of up to 49 on sm_9
# ranked by an H200 (benchmarks/results/tuning.csv).  There fewer warps were faster: instructions wait for each other
# more often than for memory, and a warp with a larger share of a tile has more that are independent.
_SHIPPED = {
    "forward": (
        ("", 16, _DENSE, 64, 64, Config(64, 64, 4, 3)),
        ("sm_9", 16, _HALVES, 32, 64, Config(64, 128, 4, 3, 2)),
        ("sm_10", 16, _HALVES, 32, 64, Config(64, 128, 4, 3, 2)),
        ("sm_8", 16, _HALVES, 32, 64, Config(64, 128, 8, 3, 2)),
        ("gfx", 16, _ANY, 64, 128, Config(16, 256, 4, 1)),
        ("", 16, _ANY, 32, 27, Config(16, 256, 4, 3, 5)),
        ("sm_9", 16, _ANY, 32, 49, Config(16, 128, 1, 3, 6)),
        ("", 16, _ANY, 32, 128, Config(16, 256, 4, 3, 5)),
        ("", 16, _ANY, 64, 128, Config(16, 256, 8, 3, 2)),
        ("", 16, _ANY, 32, math.inf, Config(32, 64, 4, 2, 2)),
        ("gfx", 16, _ANY, 64, math.inf, Config(32, 64, 4, 2, 2)),
        ("", 16, _ANY, 64, math.inf, Config(32, 64, 4, 1, 2)),
        ("", 16, _ANY, 128, math.inf, Config(32, 32, 4, 1, 2)),
        ("", 32, _ANY, 32, math.inf, Config(16, 64, 4, 1)),
        ("", 32, _ANY, 64, math.inf, Config(32, 32, 8, 1)),
        ("", 32, _ANY, 128, math.inf, Config(16, 16, 8, 1)),
    ),
    "query": (
        ("", 16, _DENSE, 32, 64, Config(64, 64, 4, 3, 2)),
        ("gfx", 16, _ANY, 64, 128, Config(16, 128, 4, 1)),
        ("sm_9", 16, _ANY, 32, 49, Config(16, 32, 2, 3, parts=4)),
        ("", 16, _ANY, 32, 128, Config(16, 256, 8, 3, 2)),
        ("sm_10", 16, _ANY, 64, 64, Config(16, 256, 16, 3, 1)),
        ("sm_10", 16, _ANY, 64, 128, Config(32, 64, 4, 3, 2)),
        ("", 16, _ANY, 64, 128, Config(16, 256, 8, 3, 2)),
        ("sm_8", 16, _ANY, 32, math.inf, Config(32, 64, 4, 1, 2)),
        ("sm_10", 16, _ANY, 32, math.inf, Config(32, 64, 8, 1, 2)),
        ("sm_9", 16, _ANY, 32, math.inf, Config(32, 32, 4, 2)),
        ("", 16, _ANY, 64, math.inf, Config(32, 64, 4, 2)),
        ("sm_8", 16, _ANY, 128, math.inf, Config(16, 32, 4, 1)),
        ("", 16, _ANY, 128, math.inf, Config(16, 32, 2, 1)),
        ("gfx", 32, _ANY, 64, math.inf, Config(32, 32, 4, 1)),
        ("", 32, _ANY, 32, math.inf, Config(16, 32, 8, 1)),
        ("", 32, _ANY, 64, math.inf, Config(32, 32, 8, 1)),
        ("gfx", 32, _ANY, 128, math.inf, Config(16, 32, 4, 1, 2)),
        ("", 32, _ANY, 128, math.inf, Config(16, 16, 8, 1)),
    ),
    "key": (
        ("sm_9", 16, _HALVES, 32, 64, Config(64, 32, 4, 3, 2, parts=4)),
        ("sm_9", 16, _ANY, 32, 64, Config(16, 256, 4, 3)),
        ("gfx", 16, _ANY, 64, 128, Config(16, 128, 4, 1)),
        ("sm_8", 16, _ANY, 32, 49, Config(16, 256, 4, 3, 2)),
        ("", 16, _ANY, 32, 49, Config(16, 256, 8, 3, 3)),
        ("sm_10", 16, _ANY, 32, 64, Config(16, 256, 4, 3)),
        ("", 16, _ANY, 32, 64, Config(16, 256, 8, 3, 3)),
        ("", 16, _ANY, 64, 64, Config(16, 256, 8, 3, 2)),
        ("sm_10", 16, _DENSE, 32, 128, Config(16, 128, 4, 3, 3)),
        ("", 16, _DENSE, 32, 128, Config(16, 128, 2, 3)),
        ("", 16, _DENSE, 64, 128, Config(16, 128, 4, 3, 2)),
        ("sm_8", 16, _ANY, 32, math.inf, Config(32, 32, 4, 1)),
        ("sm_10", 16, _ANY, 32, math.inf, Config(32, 32, 4, 1)),
        ("", 16, _ANY, 32, math.inf, Config(32, 32, 2, 1)),
        ("", 16, _ANY, 64, math.inf, Config(32, 64, 4, 1)),
        ("", 16, _ANY, 128, math.inf, Config(32, 32, 4, 1)),
        ("gfx", 32, _ANY, 64, math.inf, Config(32, 32, 4, 1)),
        ("", 32, _ANY, 32, math.inf, Config(16, 32, 8, 1)),
        ("", 32, _ANY, 64, math.inf, Config(32, 32, 8, 1)),
        ("gfx", 32, _ANY, 128, math.inf, Config(16, 32, 4, 1)),
        ("", 32, _ANY, 128, math.inf, Config(16, 16, 8, 1)),
    ),
}


def choose(problem: ProblemClass) -> Config:
    """The user's configuration for this class of problems, else the shipped one."""
    user = user_configs().get(str(problem))
    if user is not None:
        return user
    return shipped(problem)


def shipped(problem: ProblemClass) -> Config:
    """The configuration that the table has for this class of problems."""
    return next(
        config
        for arch, bits, extents, dim, window, config in _SHIPPED[problem.kernel]
        if problem.arch.startswith(arch)
        and problem.bits == bits
        and problem.extent in extents
        and problem.dim <= dim
        and problem.window <= window
    )


def of_others(problem: ProblemClass) -> list[Config]:
    """The configurations that the table has for this kernel and size of elements, whatever the rest of the problem."""
    return [config for _, bits, _, _, _, config in _SHIPPED[problem.kernel] if bits == problem.bits]


def next_power_of_two(n: int) -> int:
    return 1 << math.ceil(math.log2(n))
