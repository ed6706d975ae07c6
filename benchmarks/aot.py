"""Compile every shipped kernel configuration without a GPU, check it, and tabulate what the compiler made of it.

    python benchmarks/aot.py                      # everything, rewrites benchmarks/results/aot.csv
    python benchmarks/aot.py --arch sm_90 --only dinat_tiny.0 --output -
    python benchmarks/aot.py --once --output -    # each configuration once: problems with other heads left out

Checks: no spills, shared memory within the architecture's limit, tensor-core instructions for 16-bit inputs.  Needs
`triton` 3.6 or newer and PyTorch, and `kernels/` on PYTHONPATH or dinat installed.

Columns: `kernel` is forward, or of the backward pass query (with the gradients of keys, values and bias where it can),
rpb (the gradient of the bias where it cannot) or key.  A program does the same tile of `images` images.  Instruction
counts are per warp; `block_*` inside the loop with the products (over key blocks or images; the whole kernel where
there is none), `other` outside it, each instruction once.  `issue_us` is a paper estimate for batch 128: warp
instructions over issue slots, if every scheduler issued one in every cycle; `exp2_us` the same for the units of
exponentials; `floor_us` as in problems.py.  `paper_ratio` = floor / max(issue, exp2, floor).  It ranks variants; it is
no measurement.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from dinat_kernels.geometry import make_neighborhood
from dinat_kernels.impl.fused import launch
from problems import DEVICES, MODELS, Problem, floor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BATCH = 128
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Target, shared memory limit in bytes, and the GPU of the paper estimate with its multiprocessors and clock (Hz).
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10, ("A100", 108, 1.41e9)),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10, ("H200", 132, 1.83e9)),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10, ("B200", 148, 1.85e9)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10, None),
}
# Mnemonics of NVIDIA's and AMD's assembly.
KINDS = {
    "matrix": r"[HQ]G?MMA|UTC\w*MMA|v_mfma",
    "exp2": r"MUFU\.EX2|v_exp_f32",
    "shared": r"LDS|STS|LDSM|STSM|LDTM|STTM|ds_(read|write)",
    "global": r"LDG|STG|(global|buffer)_(load|store)",
}


def cases() -> list[tuple[str, int, Problem | None, tuple[int, ...], dict, torch.dtype, int]]:
    """name, heads, layer, lengths, window, dtype and head_dim of everything that is compiled."""
    rows = []
    for p in MODELS["dinat_tiny"]:
        window = dict(kernel_size=p.kernel_size, dilation=p.dilation)
        rows.append((p.name, p.heads, p, (p.side, p.side), window, torch.bfloat16, p.head_dim))
    halo7, halo11 = ((96, 96), dict(kernel_size=7)), ((96, 96), dict(kernel_size=11))
    dense7, dense11 = ((56, 56), dict(kernel_size=7, dilation=8)), ((88, 88), dict(kernel_size=11, dilation=8))
    causal = ((4096,), dict(kernel_size=64, is_causal=True))
    long = ((4096,), dict(kernel_size=256))
    volume = ((16, 32, 32), dict(kernel_size=3))
    others = {  # at least one problem for each row of the table of configurations
        (torch.bfloat16, 32): dict(halo11=halo11, dense11=dense11, causal_1d=causal, long_1d=long, volume=volume),
        (torch.bfloat16, 64): dict(halo7=halo7, dense7=dense7, halo11=halo11, dense11=dense11, long_1d=long),
        (torch.bfloat16, 128): dict(halo7=halo7, dense7=dense7),
        (torch.float16, 32): dict(halo7=halo7, dense7=dense7),
        (torch.float32, 32): dict(halo7=halo7),
        (torch.float32, 64): dict(halo7=halo7),
        (torch.float32, 128): dict(halo7=halo7),
    }
    for (dtype, dim), problems in others.items():
        rows += [(name, 4, None, lengths, window, dtype, dim) for name, (lengths, window) in problems.items()]
    return rows


def make_plan(kernel: str, arch: str, heads: int, lengths: tuple, window: dict, dtype: torch.dtype, dim: int):
    """The plan of a problem whose q, k, v are views of one packed projection, and so are their gradients."""
    neighborhood = make_neighborhood(len(lengths), **window)
    packed = torch.empty(BATCH, *lengths, 3, heads, dim, dtype=dtype, device="meta").unbind(-3)[0]
    layouts, grad_rows = [packed] * 3, ()
    if kernel != "forward":
        layouts, grad_rows = [*layouts, packed.contiguous()], (packed.stride(-3),) * 3
    layouts = tuple((x.shape, x.stride()) for x in layouts)
    with_bias = not any(neighborhood.is_causal)
    return launch.make_plan(kernel, layouts, dtype, arch, neighborhood, with_bias, 1, "ieee", grad_rows)


def plans_of(arch: str, case: tuple) -> Callable[[str], launch.Plan]:
    """`make_plan` of a case, which wants the kernel."""
    _, heads, _, lengths, window, dtype, dim = case
    return partial(make_plan, arch=arch, heads=heads, lengths=lengths, window=window, dtype=dtype, dim=dim)


def kernels(plan: Callable[[str], launch.Plan]) -> list[str]:
    """The kernels that a problem needs, of all that there are."""
    query = plan("query").constants
    names = ["forward", "query"]
    if query["HAS_RPB"] and not query["GRAD_RPB"]:
        names.append("rpb")
    return names if query["WHOLE"] else [*names, "key"]


def compile_plan(plan: launch.Plan, arch: str, dtype: torch.dtype):
    """The compiled kernel of a plan."""
    # What Triton's launcher would specialise on: ones, and divisibility by 16.
    names = plan.kernel.arg_names
    constants = dict(plan.constants)
    fp32 = ("p_rpb", "p_drpb", "p_lse", "p_dlse", "p_delta")
    pointers = {name: "*fp32" if name in fp32 else f"*{TYPES[dtype]}" for name in names if name.startswith("p_")}
    integers = dict(zip(names[names.index("scale") + 1 :], plan.integers, strict=False))
    signature, divisible = {}, []
    for name in names:
        if name in constants or integers.get(name) == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, 1)
        elif name in integers:
            signature[name] = "i32" if integers[name] < 2**31 else "i64"
        else:
            signature[name] = pointers.get(name, "fp32")
        if name in pointers or (signature[name] != "constexpr" and integers.get(name, 1) % 16 == 0):
            divisible.append(name)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(plan.kernel, signature, constants, attributes)
    return triton.compile(source, target=ARCHITECTURES[arch][0], options=plan.options)


def without_repetition(work: list[tuple[str, tuple]]) -> list[tuple[str, tuple]]:
    """The (architecture, case) pairs whose kernels differ from all before them in more than the number of heads."""
    seen, kept = set(), []
    for arch, case in work:
        plan = plans_of(arch, case)
        keys = set()
        for kernel in kernels(plan):
            constants = {name: value for name, value in plan(kernel).constants.items() if name != "HEADS"}
            keys.add((arch, case[5], kernel, str(constants), str(plan(kernel).options)))
        if not keys <= seen:
            kept.append((arch, case))
        seen |= keys
    return kept


def _cuobjdump(kernel, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel) -> tuple[int, int, list[tuple[int, str, int | None]]]:
    """Registers, bytes spilled to memory, and the instructions: (address, mnemonic, branch target)."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spills = (
            sum(int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", text))
            for name in ("vgpr_count", "private_segment_fixed_size")  # scalar registers spill into vector ones
        )
        code, labels = [], {}
        for line in text.splitlines():
            if label := re.match(r"(\.LBB\w+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\t([a-z]\w+_\w+)(?:\s+(\.LBB\w+))?", line):
                code.append((len(code), instruction[1], instruction[2]))
        return registers, spills, [(at, name, labels.get(target)) for at, name, target in code]
    dump = _cuobjdump(kernel, "-res-usage", "-sass")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK", "LOCAL"))
    code = []
    for address, name, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z]\w+[\w.]*)([^;]*);", dump):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        code.append((int(address, 16), name, int(target[1], 16) if target else None))
    return registers, stack + local, code


def split_loop(code: list[tuple[int, str, int | None]]) -> tuple[list[str], list[str]]:
    """Mnemonics inside the longest loop with matrix instructions and outside of it; all are inside if there is none."""
    loops = [(target, at) for at, _, target in code if target is not None and target < at]
    matrix = [at for at, name, _ in code if re.match(KINDS["matrix"], name)] or [0]
    loops = [(first, last) for first, last in loops if any(first <= at <= last for at in matrix)]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(-1, math.inf))
    inside = [name for at, name, _ in code if first <= at <= last]
    return inside, [name for at, name, _ in code if not first <= at <= last]


def rows(arch: str, case: tuple) -> list[dict]:
    """Compile all kernels of one case and describe the results."""
    name, _, layer, _, _, dtype, _ = case
    plan = plans_of(arch, case)
    return [row(arch, name, kernel, layer, plan(kernel), dtype) for kernel in kernels(plan)]


def row(arch: str, name: str, kernel: str, layer: Problem | None, plan: launch.Plan, dtype: torch.dtype) -> dict:
    compiled = compile_plan(plan, arch, dtype)
    registers, spills, code = resources(compiled)
    inside, outside = split_loop(code)
    constants = plan.constants
    blocks = constants["BOX"][-1] if kernel != "rpb" else 1
    counts = {kind: sum(bool(re.match(pattern, m)) for m in inside) for kind, pattern in KINDS.items()}
    result = dict(
        arch=arch,
        dtype=TYPES[dtype],
        head_dim=constants["HEAD_DIM"],
        problem=name,
        kernel=kernel,
        tile="x".join(map(str, constants["TILE"][:3])),
        block="{3}x{4}".format(*constants["BOX"]) + f"/{constants['BQ' if kernel == 'key' else 'BK']}",
        blocks=blocks,
        images=plan.integers[-1],
        **plan.options,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        **{f"block_{kind}": count for kind, count in counts.items()},
        block_all=len(inside),
        other=len(outside),
    )
    if layer is not None and ARCHITECTURES[arch][2] is not None:
        gpu, processors, clock = ARCHITECTURES[arch][2]
        warps = plan.grid[0] * plan.options["num_warps"]
        loops = blocks * plan.integers[-1]
        issue = warps * (len(outside) + loops * len(inside)) / (4 * processors * clock)
        exponentials = warps * 32 * loops * counts["exp2"] / DEVICES[gpu].exponentials
        times = dict(issue_us=issue, exp2_us=exponentials)
        if kernel == "forward":
            least = times["floor_us"] = floor(layer, BATCH, DEVICES[gpu])
        result |= {column: round(1e6 * seconds, 1) for column, seconds in times.items()}
        if kernel == "forward":
            result["paper_ratio"] = round(least / max(issue, exponentials, least), 2)
    return result


def faults(row: dict) -> list[str]:
    """What is wrong with a compiled configuration."""
    limit = ARCHITECTURES[row["arch"]][1]
    found = {
        f"{row['spills']} spills": row["spills"] > 0,
        f"{row['shared_bytes']} bytes of shared memory, of {limit}": row["shared_bytes"] > limit,
        "no tensor-core instructions": row["dtype"] != "fp32" and not row["block_matrix"],
    }
    where = " ".join(str(row[column]) for column in ("arch", "dtype", "head_dim", "problem", "kernel"))
    return [f"{where}: {fault}" for fault, is_true in found.items() if is_true]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="beginning of the problem's name")
    parser.add_argument(
        "--once", action="store_true", help="leave out problems that differ in the number of heads alone"
    )
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "aot.csv"), help="- for the screen")
    args = parser.parse_args()
    work = [(arch, case) for arch in args.arch for case in cases() if case[0].startswith(args.only)]
    if args.once:
        work = without_repetition(work)
    table = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for entries in pool.map(rows, *zip(*work, strict=True)):
            table += entries
            for entry in entries:
                print(*entry.values(), file=sys.stderr, flush=True)
    with open(args.output, "w", newline="") if args.output != "-" else sys.stdout as file:
        writer = csv.DictWriter(file, max(table, key=len).keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    sys.exit("\n".join(fault for entry in table for fault in faults(entry)) or None)


if __name__ == "__main__":
    main()
