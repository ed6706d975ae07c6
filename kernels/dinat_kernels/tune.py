"""Find launch configurations for this GPU: `python -m dinat_kernels.tune`.

Times the Triton kernels, each alone, on layers like those of the published models, and writes the fastest configuration
of every class of problems to `impl.fused.configs.cache_file()`, one after the other.  From then on they are used
instead of the shipped ones.  Opt-in: tune once, and give the same file to all ranks (DINAT_TUNE_FILE).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .geometry import Neighborhood, make_neighborhood
from .impl.layout import Call, layout_of

if TYPE_CHECKING:  # `dinat_kernels` itself must import without Triton
    from .impl.fused.configs import Config, ProblemClass
    from .impl.fused.launch import Gpu, Launch

DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32)
# Class of a configuration -> kernels that it may change the time of.
AFFECTED = dict(forward=("forward",), query=("query", "rpb", "key"), key=("key",))


class Layer(NamedTuple):
    """A square map and its window, of which a class of problems has many."""

    side: int
    kernel_size: int
    dilation: int
    heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    rpb_dtype: torch.dtype = torch.float32

    def launches(self, batch: int, device: str, gpu: Gpu | None = None) -> list[Launch]:
        """As `launches`, with inputs as a layer has them: views of one packed projection."""
        packed = torch.randn(
            batch, self.side, self.side, 3, self.heads, self.head_dim, device=device, dtype=self.dtype
        ).unbind(3)
        table = (self.heads, *[2 * self.kernel_size - 1] * 2)
        rpb = torch.randn(table, device=device).to(self.rpb_dtype)
        d_out = torch.randn_like(packed[0], memory_format=torch.contiguous_format)
        return launches(*packed, rpb, d_out, make_neighborhood(2, self.kernel_size, self.dilation), gpu)


def layers(kernel_size: int = 7, head_dim: int = 32, dtype: torch.dtype = torch.bfloat16) -> list[Layer]:
    """A layer for each extent of `impl.fused.configs.Extent`.

    Maps of 8 x 8 windows, first with dilation 8, so that groups are single windows, then with 1; and a map of 2 x 2.
    """
    kinds = ((8, 8, 2), (8, 1, 2), (2, 1, 8))
    return [Layer(windows * kernel_size, kernel_size, d, heads, head_dim, dtype) for windows, d, heads in kinds]


def launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    d_out: Tensor,
    window: Neighborhood,
    gpu: Gpu | None = None,
) -> list[Launch]:
    """The kernels of a forward and a backward pass: launched in this order, they are these passes.

    The gradients lie beside each other, as those of a packed projection.

    Args:
        gpu: which to prepare for, where tensors are on the device "meta".
    """
    from .impl import fused

    scale = query.shape[-1] ** -0.5
    layouts = [layout_of(x) for x in (query, key, value)]
    call = Call(*layouts, None if rpb is None else layout_of(rpb), window, scale, True, None)
    widths = [x.shape[-2] * x.shape[-1] for x in (query, key, value)]
    grads = query.new_empty(*query.shape[:-2], sum(widths)).split(widths, -1)
    grads = [d.unflatten(-1, x.shape[-2:]) for d, x in zip(grads, (query, key, value), strict=True)]

    def passes() -> None:
        out, lse = fused.prepare(call)(query, key, value, rpb)
        backward = fused.prepare_backward(call, layout_of(d_out), False, list(map(layout_of, grads)))
        backward(d_out, None, query, key, value, rpb, out, lse, grads)

    return fused.launch.recorded(passes, gpu)


def candidates(problem: ProblemClass) -> list[Config]:
    """The shipped configuration, those that differ from it in one number by one step, and those of other problems."""
    from .impl.fused.configs import of_others, shipped

    known = shipped(problem)

    def neighbors() -> Iterator[Config]:
        for field, least, most in (("tile", 16, 64), ("block", 16, 256), ("num_warps", 1, 16), ("programs", 1, 16)):
            for value in (getattr(known, field) // 2, 2 * getattr(known, field)):
                if least <= value <= most:
                    yield known._replace(**{field: value})
        for stages in {1, 2, 3} - {known.num_stages}:
            yield known._replace(num_stages=stages)
        yield known._replace(parts=4 if known.parts == 1 else 1)

    return list(dict.fromkeys([known, *neighbors(), *of_others(problem)]))


class Trial(NamedTuple):
    problem: ProblemClass
    config: Config
    seconds: float  # infinite where `error` says what went wrong
    error: str


def class_of(launch: Launch, gpu: Gpu) -> ProblemClass:
    """The class whose configuration a launch has."""
    from .impl.fused.configs import ProblemClass

    constants = launch.plan.constants
    window = constants["WINDOW"]
    kernel = "query" if launch.plan.name == "rpb" else launch.plan.name
    bits, dim = 8 * launch.tensors[0].element_size(), max(constants["BD"], constants["BV"])
    return ProblemClass(kernel, gpu.arch, bits, dim, launch.plan.extent, math.prod(window[0::4]))


def trials(
    layer: Layer, batch: int, device: str, seconds: Callable[[Launch], float], gpu: Gpu | None = None
) -> Iterator[list[Trial]]:
    """Tries the candidates of each class that a layer's kernels belong to; the fastest is used from then on.

    Args:
        seconds: how long a launch takes.
        gpu: as in `launches`.
    """
    from .impl.fused import launch
    from .impl.fused.configs import user_configs

    gpu = gpu or launch.gpu_of(torch.device(device))
    for problem in dict.fromkeys(class_of(x, gpu) for x in layer.launches(batch, device, gpu)):
        tried = []
        for config in candidates(problem):
            user_configs()[str(problem)] = config
            launch.forget_plans()
            try:
                found = layer.launches(batch, device, gpu)
                if device != "meta":
                    for one in found:  # so that what is timed reads what it should
                        one()
                time = sum(seconds(one) for one in found if one.plan.name in AFFECTED[problem.kernel])
                tried.append(Trial(problem, config, time, ""))
            except Exception as error:  # does not compile, or needs more than this GPU has
                tried.append(Trial(problem, config, math.inf, f"{type(error).__name__}: {str(error)[:100]}"))
        user_configs()[str(problem)] = min(tried, key=lambda trial: trial.seconds).config
        launch.forget_plans()
        yield tried


def on_gpu(launch: Launch) -> float:
    """Seconds of a launch, the median of some, the L2 cache cleared before each."""
    import triton

    return triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median") / 1000


def keep(problem: ProblemClass, config: Config) -> None:
    """Puts a configuration into the user's file, whose others stay as they are."""
    from .impl.fused.configs import cache_file

    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(known | {str(problem): config}, indent=1) + "\n")
    new.replace(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dinat_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--head-dim", nargs="*", type=int, default=[32])
    parser.add_argument("--kernel-size", nargs="*", type=int, default=[7, 11], help="of two-dimensional windows")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("Tuning needs a CUDA or ROCm device, and PyTorch finds none here.")

    from .impl.fused.configs import cache_file

    kinds = itertools.product(args.kernel_size, args.head_dim, [DTYPES[name] for name in args.dtype])
    for layer in itertools.chain.from_iterable(itertools.starmap(layers, kinds)):
        for tried in trials(layer, args.batch, "cuda", on_gpu):
            best = min(tried, key=lambda trial: trial.seconds)
            if math.isinf(best.seconds):
                sys.exit(f"{best.problem}: no candidate runs here, the shipped one neither: {tried[0].error}")
            keep(best.problem, best.config)
            print(f"{best.problem}: {best.config._asdict()}", flush=True)
    print(f"written to {cache_file()}")


if __name__ == "__main__":
    main()
