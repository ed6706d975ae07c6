"""What a compiled kernel would take on a GPU, worked out on paper: ranks variants, measures nothing.

A kernel is bound by the slowest of what it asks for: bytes of DRAM (each tensor once), bytes that its programs fetch
from the L2 cache (each program its own), warp instructions (loops by their trips), exponentials.  Where a program waits
for its copies before it goes on (no copies in flight), only other programs of the multiprocessor hide that wait.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from dinat_kernels.geometry import group_length, seeing_range, visible_range
from dinat_kernels.impl.fused.backward import ENTRIES
from dinat_kernels.impl.fused.launch import Plan
from problems import Device

LATENCY = 0.7e-6  # seconds from a request to its bytes, under load
MATRIX = r"[HQ]G?MMA|UTC\w*MMA|v_mfma"
EXP2 = r"MUFU\.EX2|v_exp_f32"
WAIT = r"TRYWAIT"  # for what other units do, again and again
SPILL = r"LDL|STL|scratch_(load|store)"
# Kernel -> tensors as large as the query that it reads and writes, each row once; and numbers per query and head.
_UNIQUE = {"forward": (4, 1), "query": (6, 2), "rpb": (4, 2), "key": (6, 2)}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str
    target: int | None  # of a branch
    goes_on: bool = True  # with the next instruction: not after a branch without a condition, or an end


class Compiled(NamedTuple):
    """What a compiler made of a kernel."""

    registers: int  # of a thread
    spills: int  # bytes
    shared: int  # bytes of a program
    code: list[Instruction]


class Limits(NamedTuple):
    """Of a multiprocessor; of a program where that is said."""

    program_shared: int  # bytes
    shared: int = 0
    registers: int = 64 << 10
    warps: int = 64
    programs: int = 32


class Counts(NamedTuple):
    """Instructions of a warp."""

    body: list[str]  # mnemonics inside the innermost loop with products; of the whole kernel where there is none
    other: int  # outside of it, each once
    all: float  # loops by their trips
    exponentials: float
    in_flight: int | None  # groups of copies that are not waited for at the top of the loop; None without such a wait
    loop_spills: int  # loads and stores of spilled registers inside loops


def count(code: list[Instruction], trips: int, images: float, entries: int) -> Counts:
    """Counts of a kernel: `trips` blocks for each of `images` images, `entries` steps through the table."""
    loops = find_loops(code)
    products = [x.address for x in code if re.match(MATRIX, x.name)]
    with_products = [loop for loop in loops if any(_holds(loop, at) for at in products)]
    innermost = with_products[0] if with_products else (-1, math.inf)
    waiting = {loop for loop in loops if any(re.search(WAIT, x.name) and _holds(loop, x.address) for x in code)}
    repeats = {loop: 1 if loop in waiting else entries for loop in loops}
    repeats |= dict.fromkeys(with_products, images)
    if with_products:
        repeats[innermost] = trips if len(with_products) > 1 else trips * images

    def times(x: Instruction) -> float:
        return math.prod(repeats[loop] for loop in loops if _holds(loop, x.address))

    body = [x for x in code if _holds(innermost, x.address)]
    waits = [re.search(r"0x(\w+)\s*$", x.operands) for x in body if x.name.startswith("DEPBAR")]
    in_flight = [int(wait[1], 16) for wait in waits if wait] if with_products else []
    return Counts(
        body=[x.name for x in body],
        other=len(code) - len(body),
        all=sum(map(times, code)),
        exponentials=sum(times(x) for x in code if re.match(EXP2, x.name)),
        in_flight=min(in_flight, default=None),
        loop_spills=sum(bool(re.match(SPILL, x.name)) for x in code if any(_holds(loop, x.address) for loop in loops)),
    )


def find_loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop, the shortest first.

    A branch back is a loop only if there is no other way to it than through its target: compilers put what is seldom
    done, such as waiting, behind the end of a kernel, and that branches back to where it was called for.
    """
    following = {a.address: b.address for a, b in pairwise(code) if a.goes_on}
    targets = {x.address: x.target for x in code if x.target is not None}

    def reached_without(address: int) -> set[int]:
        found, open_ = {address}, [code[0].address]
        while open_:
            at = open_.pop()
            if at not in found:
                found.add(at)
                open_ += [step[at] for step in (following, targets) if at in step]
        return found

    back = [(target, address) for address, target in targets.items() if target < address]
    return sorted((loop for loop in back if loop[1] not in reached_without(loop[0])), key=_length)


def _length(loop: tuple[int, int]) -> int:
    return loop[1] - loop[0]


def _holds(loop: tuple[float, float], address: int) -> bool:
    return loop[0] <= address <= loop[1]


def steps_of(plan: Plan) -> int:
    """Times that the innermost loop runs for an image."""
    if plan.name == "rpb":
        return 1
    return plan.constants["BOX"][-1] * (plan.constants["GROUP"] if plan.name == "key" else 1)


def counts_of(plan: Plan, code: list[Instruction]) -> Counts:
    constants = plan.constants
    table = math.prod(2 * k - 1 for k in constants["WINDOW"][0::4])
    return count(code, steps_of(plan), images_of(plan) / plan.grid[0], -(-table // ENTRIES.value))


def programs_per_processor(compiled: Compiled, warps: int, limits: Limits) -> int:
    """Programs that a multiprocessor holds at a time."""
    registers = -(-compiled.registers // 8) * 8 * 32 * warps
    shared = compiled.shared + (1 << 10)  # what the system keeps of each
    return min(limits.registers // registers, limits.shared // shared, limits.warps // warps, limits.programs)


def images_of(plan: Plan) -> int:
    """The images of all programs of a launch together."""
    *_, batch, images = plan.integers
    return plan.grid[0] // -(-batch // images) * batch


def boxes(plan: Plan) -> int:
    """Positions in the boxes of all tiles of a map: what programs read of the other side, for one head and image."""
    lengths, dilations = (plan.integers[first : first + 3] for first in (-12, -9))
    window, tile, total = plan.constants["WINDOW"], plan.constants["TILE"], 1
    bounds = seeing_range if plan.name == "key" else visible_range
    for axis, (length, dilation) in enumerate(zip(lengths, dilations, strict=True)):
        size, stride, causal, _ = window[4 * axis : 4 * axis + 4]
        rows = 0
        for group in range(dilation):
            n = group_length(length, dilation, group)
            start, end = bounds(np.arange(n), n, size, stride, causal)
            first = np.arange(0, n, tile[axis])
            rows += (end[np.minimum(first + tile[axis], n) - 1] - start[first]).sum()
        total *= int(rows)
    return total


def traffic(plan: Plan, tokens: int, size: int) -> tuple[int, int]:
    """Bytes of DRAM and of L2 cache that a launch moves, of elements of `size` bytes; heads share no keys."""
    constants = plan.constants
    *_, heads, batch, _ = plan.integers
    rows, numbers = _UNIQUE[plan.name]
    whole = constants.get("WHOLE", False)
    vectors, vector = batch * tokens * heads, constants["HEAD_DIM"] * size
    dram = vectors * ((rows + 2 * whole) * vector + 4 * numbers)
    others = batch * heads * boxes(plan)
    own = vectors * (constants["BOX"][-1] if plan.name == "rpb" else 1)  # of a program for each block
    loads, scalars, stores = {
        "forward": (own + 2 * others, vectors, 1),
        "query": (3 * own + 2 * others, 2 * own, 1 + 2 * whole),
        "rpb": (2 * own + 2 * others, 2 * own, 0),
        "key": (2 * own + 2 * others, 2 * others, 2),
    }[plan.name]
    return dram, (loads + stores * vectors) * vector + 4 * scalars


def estimate(
    plan: Plan, compiled: Compiled, counts: Counts, device: Device, limits: Limits, bytes_moved: tuple[int, int]
) -> dict[str, float | str]:
    """Seconds that a launch takes by each resource, in all, and which of them binds it."""
    warps = plan.options["num_warps"]
    resident = programs_per_processor(compiled, warps, limits) * device.processors
    times = dict(
        dram=bytes_moved[0] / device.bandwidth,
        l2=bytes_moved[1] / device.l2,
        issue=counts.all * warps * plan.grid[0] / device.instructions,
        exp2=counts.exponentials * 32 * warps * plan.grid[0] / device.exponentials,
    )
    busy = max(times.values())
    total, binds = busy, max(times, key=times.get)
    if not counts.in_flight:
        # A program alternates between waiting and working; of P programs on a processor, P - 1 work while one waits.
        rounds = images_of(plan) * steps_of(plan) / resident
        waiting = rounds * LATENCY + busy * device.processors / resident
        if waiting > busy:
            total, binds = waiting, "latency"
    return times | dict(time=total, binds=binds, waves=plan.grid[0] / resident)
