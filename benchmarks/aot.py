"""Compile every shipped kernel configuration without a GPU, check it, and tabulate what the compiler made of it.

    python benchmarks/aot.py                      # everything, rewrites benchmarks/results/aot.csv
    python benchmarks/aot.py --arch sm_90 --only dinat_tiny --batch 127 --output -
    python benchmarks/aot.py --once --output -    # each kernel once: problems that share theirs left out
    python benchmarks/aot.py --warm --arch sm_90  # no table: Triton's cache gets what models, tests and tuning launch

Checks: no spills in a loop, shared memory within the architecture's limit, for 16-bit inputs tensor-core instructions
and, for NVIDIA's GPUs, copies in flight where a tile has one key block.  Needs `triton` 3.6 or newer and PyTorch, and
`kernels/` on PYTHONPATH or dinat installed.  Triton's own dispatcher compiles, for tensors of the device "meta", so
that a launch finds its kernel in the cache; no GPU is touched.

Columns: `kernel` is forward, or of the backward pass query (with the gradients of keys, values and bias where it can),
rpb (the gradient of the bias where it cannot) or key.  A program does the same tile of up to `images` images.
`launches`: of this kernel, and of PyTorch's that add up the parts of the bias table, and zero them where programs have
no tile.
Instruction counts are per warp; `block_*` inside the loop with the products (over key blocks or images; the whole
kernel where there is none), `other` outside it, each instruction once.  `in_flight`: groups of asynchronous copies that
the loop does not wait for; empty where it waits for none.  `programs`: that a multiprocessor holds; `waves`: the
programs over those that the GPU holds.  `*_us` is what each resource would take, as paper.py says, and
`time_us` what `binds` takes; `floor_us` (see problems.py) and `paper_ratio`, floor over time, are of the pass, forward
or backward, that the kernel belongs to.  All that is an estimate which ranks variants; it is no measurement.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import paper
import torch
import triton
from dinat_kernels.geometry import make_neighborhood
from dinat_kernels.impl.fused.configs import Config, user_configs
from dinat_kernels.impl.fused.launch import Gpu, Launch, forget_plans
from dinat_kernels.impl.fused.positions import SIZES
from dinat_kernels.tune import candidates, class_of, launches, layers
from problems import DEVICES, MODELS, Problem, floor
from triton.backends.compiler import GPUTarget

BATCH = 128
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Architecture(NamedTuple):
    gpu: Gpu
    target: GPUTarget
    limits: paper.Limits
    device: str | None  # of the paper estimate


def _nvidia(capability: int, device: str, shared: int) -> Architecture:
    gpu, target = Gpu(f"sm_{capability}", DEVICES[device].processors), GPUTarget("cuda", capability, 32)
    return Architecture(gpu, target, paper.Limits(shared - 1 << 10, shared << 10), device)


ARCHITECTURES = {
    "sm_80": _nvidia(80, "A100", 164),
    "sm_90": _nvidia(90, "H200", 228),
    "sm_100": _nvidia(100, "B200", 228),
    "gfx942": Architecture(Gpu("gfx942", 304), GPUTarget("hip", "gfx942", 64), paper.Limits(64 << 10), None),
}
# Mnemonics of NVIDIA's and AMD's assembly.
KINDS = {
    "matrix": paper.MATRIX,
    "exp2": paper.EXP2,
    "shared": r"LDS|STS|LDSM|STSM|LDTM|STTM|ds_(read|write)",
    "global": r"LDG|STG|(global|buffer)_(load|store)",
}


class Case(NamedTuple):
    """A problem whose kernels are compiled: views of a packed projection, heads that share nothing."""

    name: str
    lengths: tuple[int, ...]
    window: dict
    heads: int = 4
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    rpb_dtype: torch.dtype = torch.float32
    batch: int = BATCH
    kv_heads: int | None = None
    value_dim: int | None = None
    layer: Problem | None = None  # of the paper estimate
    config: tuple[str, Config] | None = None  # class of problems, and its configuration instead of the shipped one

    def launches(self, arch: str) -> list[Launch]:
        """The kernels of a forward and a backward pass, on tensors without memory."""
        user_configs().clear()
        if self.config:
            user_configs()[self.config[0]] = self.config[1]
        forget_plans()
        neighborhood = make_neighborhood(len(self.lengths), **self.window)
        kv_heads, value_dim = self.kv_heads or self.heads, self.value_dim or self.head_dim
        heads, dims = (self.heads, kv_heads, kv_heads), (self.head_dim, self.head_dim, value_dim)
        sizes = [n * dim for n, dim in zip(heads, dims, strict=True)]
        options = dict(dtype=self.dtype, device="meta")
        packed = torch.empty(self.batch, *self.lengths, sum(sizes), **options).split(sizes, -1)
        q, k, v = (x.unflatten(-1, (n, dim)) for x, n, dim in zip(packed, heads, dims, strict=True))
        rpb = None
        if not any(neighborhood.is_causal):
            table = (self.heads, *[2 * k - 1 for k in neighborhood.kernel_size])
            rpb = torch.empty(table, dtype=self.rpb_dtype, device="meta")
        d_out = torch.empty(self.batch, *self.lengths, self.heads, value_dim, **options)
        return launches(q, k, v, rpb, d_out, neighborhood, ARCHITECTURES[arch].gpu)


def case_of(p: Problem, **fields: Any) -> Case:
    """A layer of a model."""
    window = dict(kernel_size=p.kernel_size, dilation=p.dilation)
    return Case(p.name, (p.side, p.side), window, p.heads, p.head_dim, layer=p)._replace(**fields)


def cases() -> list[Case]:
    """What the table shows: the layers of DiNAT-Tiny, and at least one problem for each row of the configurations."""
    rows = [case_of(p) for p in MODELS["dinat_tiny"]]
    halo7, halo11 = ((96, 96), dict(kernel_size=7)), ((96, 96), dict(kernel_size=11))
    dense7, dense11 = ((56, 56), dict(kernel_size=7, dilation=8)), ((88, 88), dict(kernel_size=11, dilation=8))
    causal = ((4096,), dict(kernel_size=64, is_causal=True))
    long = ((4096,), dict(kernel_size=256))
    volume = ((16, 32, 32), dict(kernel_size=3))
    others = {
        (torch.bfloat16, 32): dict(halo11=halo11, dense11=dense11, causal_1d=causal, long_1d=long, volume=volume),
        (torch.bfloat16, 64): dict(halo7=halo7, dense7=dense7, halo11=halo11, dense11=dense11, long_1d=long),
        (torch.bfloat16, 128): dict(halo7=halo7, dense7=dense7),
        (torch.float16, 32): dict(halo7=halo7, dense7=dense7),
        (torch.float32, 32): dict(halo7=halo7),
        (torch.float32, 64): dict(halo7=halo7),
        (torch.float32, 128): dict(halo7=halo7),
    }
    for (dtype, dim), problems in others.items():
        rows += [Case(name, lengths, window, head_dim=dim, dtype=dtype) for name, (lengths, window) in problems.items()]
    return rows


def cases_to_warm(arch: str) -> list[Case]:
    """What a session with a GPU launches: layers of models, the GPU tests, candidates of tuning."""
    tables = (torch.float32, torch.bfloat16)  # in training, and in a model cast to bf16
    found = [case_of(p, rpb_dtype=dtype) for problems in MODELS.values() for p in problems for dtype in tables]
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "dinat_kernels"))
    from test_triton_gpu import PROBLEMS

    for name, (lengths, window, heads, kv_heads, head_dim, value_dim) in PROBLEMS.items():
        for dtype in TYPES:
            found.append(
                Case(name, lengths, window, heads, head_dim, dtype, batch=2, kv_heads=kv_heads, value_dim=value_dim)
            )
    for layer in layers():
        gpu = ARCHITECTURES[arch].gpu
        for problem in dict.fromkeys(class_of(x, gpu) for x in layer.launches(BATCH, "meta", gpu)):
            for config in candidates(problem):
                window = dict(kernel_size=layer.kernel_size, dilation=layer.dilation)
                size = (layer.side, layer.side)
                found.append(Case("tuning", size, window, layer.heads, config=(str(problem), config)))
    return found


class _Driver:
    """Answers what Triton's dispatcher asks of a GPU's driver before it compiles."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: target  # Triton keeps what it compiled by device
        self.get_current_stream = lambda device: 0


def compile_launch(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel: made by its dispatcher, so that the cache has it under the name of a real launch."""
    triton.runtime.driver.set_active(_Driver(ARCHITECTURES[arch].target))
    return launch.plan.kernel.warmup(*launch.arguments(), grid=launch.plan.grid, **launch.plan.options)


def key(launch: Launch) -> tuple:
    """What Triton compiles by: equal keys, equal kernels."""
    plan = launch.plan
    named = zip(plan.kernel.arg_names[len(launch.tensors) + 1 :], plan.integers, strict=False)
    integers = tuple(1 if n == 1 else (n % 16 == 0, n >= 2**31) for name, n in named if name not in SIZES)
    dtypes = tuple(x.dtype for x in launch.tensors)
    return plan.name, integers, dtypes, str(plan.constants), str(plan.options)


def distinct(work: Iterable[tuple[str, Case]]) -> list[tuple[str, Case]]:
    """The (architecture, case) pairs with a kernel that none before has, by `key`."""
    seen, kept = set(), []
    for arch, case in work:
        keys = {(arch, *key(launch)) for launch in case.launches(arch)}
        if not keys <= seen:
            kept.append((arch, case))
        seen |= keys
    return kept


def _cuobjdump(kernel: Any, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def read_code(kernel: Any) -> paper.Compiled:
    """Resources and instructions of a compiled kernel."""
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
                code.append((len(code), instruction[1], "", instruction[2]))
        ends = ("s_branch", "s_endpgm", "s_setpc_b64")
        code = [paper.Instruction(*rest, labels.get(label), rest[1] not in ends) for *rest, label in code]
        return paper.Compiled(registers, spills, kernel.metadata.shared, code)
    dump = _cuobjdump(kernel, "-res-usage", "-sass")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK", "LOCAL"))
    code = []
    parts = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z]\w+[\w.]*)([^;]*);"
    for address, condition, name, rest in re.findall(parts, dump):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        goes_on = bool(condition) or not re.match(r"BRA|EXIT|RET", name) or re.match(r"\s*!?U?P\w", rest) is not None
        code.append(paper.Instruction(int(address, 16), name, rest, int(target[1], 16) if target else None, goes_on))
    return paper.Compiled(registers, stack + local, kernel.metadata.shared, code)


def rows(arch: str, case: Case) -> list[dict]:
    """Compile all kernels of one case and describe the results."""
    return describe(arch, case, [(launch, compile_launch(launch, arch)) for launch in case.launches(arch)])


def describe(arch: str, case: Case, compiled: Iterable[tuple[Launch, Any]]) -> list[dict]:
    """A row for each of a case's launches and what Triton made of it."""
    table = [row(arch, case, launch, kernel) for launch, kernel in compiled]
    device = ARCHITECTURES[arch].device
    if case.layer is not None and device is not None:
        for mode in ("forward", "backward"):
            of_pass = [entry for entry in table if (entry["kernel"] == "forward") == (mode == "forward")]
            least = 1e6 * floor(case.layer, case.batch, DEVICES[device], mode=mode)
            for entry in of_pass:
                entry["floor_us"] = round(least, 1)
                entry["paper_ratio"] = round(least / sum(other["time_us"] for other in of_pass), 2)
    return table


def row(arch: str, case: Case, launch: Launch, compiled_kernel: Any) -> dict:
    plan = launch.plan
    compiled = read_code(compiled_kernel)
    counts = paper.counts_of(plan, compiled.code)
    constants, kernel = plan.constants, plan.name
    target = ARCHITECTURES[arch]
    result = dict(
        arch=arch,
        dtype=TYPES[case.dtype],
        head_dim=case.head_dim,
        problem=case.name,
        kernel=kernel,
        tile="x".join(map(str, constants["TILE"][:3])),
        block="{3}x{4}/".format(*constants["BOX"]) + "+".join(map(str, constants["BQ" if kernel == "key" else "BK"])),
        blocks=constants["BOX"][-1] if kernel != "rpb" else 1,
        images=plan.integers[-1],
        launches=1 + (2 - plan.complete if constants.get("GRAD_RPB") else 0),
        num_warps=plan.options["num_warps"],
        num_stages=plan.options["num_stages"],
        registers=compiled.registers,
        spills=compiled.spills,
        loop_spills=counts.loop_spills,
        shared_bytes=compiled.shared,
        in_flight=counts.in_flight,
        **{f"block_{kind}": sum(bool(re.match(p, m)) for m in counts.body) for kind, p in KINDS.items()},
        block_all=len(counts.body),
        other=counts.other,
    )
    if target.device is None:
        return result
    warps = plan.options["num_warps"]
    result["programs"] = paper.programs_per_processor(compiled, warps, target.limits)
    if case.layer is not None:
        moved = paper.traffic(plan, case.layer.side**2, case.dtype.itemsize)
        estimate = paper.estimate(plan, compiled, counts, DEVICES[target.device], target.limits, moved)
        binds, waves = estimate.pop("binds"), estimate.pop("waves")
        result |= dict(waves=round(waves, 2), dram_bytes=moved[0], l2_bytes=moved[1])
        result |= {f"{name}_us": round(1e6 * seconds, 1) for name, seconds in estimate.items()}
        result["binds"] = binds
    return result


def faults(row: dict) -> list[str]:
    """What is wrong with a compiled configuration."""
    limit = ARCHITECTURES[row["arch"]].limits.program_shared
    found = {
        f"{row['loop_spills']} spills in a loop": row["loop_spills"] > 0,
        "no copy in flight": row["arch"].startswith("sm") and _is_pipelined(row) and not row["in_flight"],
        f"{row['shared_bytes']} bytes of shared memory, of {limit}": row["shared_bytes"] > limit,
        "no tensor-core instructions": row["dtype"] != "fp32" and not row["block_matrix"],
    }
    where = " ".join(str(row[column]) for column in ("arch", "dtype", "head_dim", "problem", "kernel"))
    return [f"{where}: {fault}" for fault, is_true in found.items() if is_true]


def _is_pipelined(row: dict) -> bool:
    """Whether a kernel should copy an image while it works on another: 16 bits, all keys of a tile in one block."""
    return row["dtype"] != "fp32" and row["blocks"] == 1 and row["kernel"] != "rpb"


def warm(arch: str, case: Case) -> str | None:
    """Compile all kernels of one case; returns what does not compile, as some candidates of tuning do not."""
    failed = []
    for launch in case.launches(arch):
        try:
            compile_launch(launch, arch)
        except Exception as error:
            failed.append(f"{case.name} {launch.plan.name}: {type(error).__name__}: {str(error)[:100]}")
    return "\n".join(failed) or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="beginning of the problem's name")
    parser.add_argument("--once", action="store_true", help="leave out problems whose kernels others have")
    parser.add_argument("--warm", action="store_true", help="compile into Triton's cache what a GPU will be asked for")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of each problem")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "aot.csv"), help="- for the screen")
    args = parser.parse_args()
    work = [
        (arch, case if args.warm else case._replace(batch=args.batch))
        for arch in args.arch
        for case in (cases_to_warm(arch) if args.warm else cases())
        if case.name.startswith(args.only)
    ]
    if args.warm or args.once:
        work = distinct(work)
    table = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        if args.warm:
            failed = list(filter(None, pool.map(warm, *zip(*work, strict=True))))
            print(f"{len(work)} problems compiled, {len(failed)} with failures", *failed, sep="\n")
            return
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
