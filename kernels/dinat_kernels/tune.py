"""Find launch configurations for this GPU: `python -m dinat_kernels.tune`.

Times the Triton kernels, forward and backward, on layers of the published models, and writes the fastest
configuration of every class of problems to `impl.fused.configs.cache_file()`.  From then on they are used instead of
the shipped ones.  Opt-in: tune once, and give the same file to all ranks (DINAT_TUNE_FILE).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys

import torch

DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dinat_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--head-dim", nargs="*", type=int, default=[32])
    parser.add_argument("--kernel-size", nargs="*", type=int, default=[7, 11], help="of two-dimensional windows")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("Tuning needs a CUDA or ROCm device, and PyTorch finds none here.")

    import triton  # `dinat_kernels` itself must import without it

    from . import na2d
    from .impl.fused import launch
    from .impl.fused.configs import Config, ProblemClass, cache_file, next_power_of_two, user_configs

    sizes = dict(tile=(16, 32, 64), block=(32, 64, 128, 256), num_warps=(1, 2, 4, 8), num_stages=(1, 2, 3))
    candidates = [Config(*c) for c in itertools.product(*sizes.values())]
    found = {}
    for dtype, head_dim, k, dense in itertools.product(args.dtype, args.head_dim, args.kernel_size, (True, False)):
        side, dilation = (8 * k, 8) if dense else (64, 1)
        shape = (args.batch, side, side, 3, 4, head_dim)
        inputs = [x.detach().requires_grad_() for x in torch.randn(shape, device="cuda", dtype=DTYPES[dtype]).unbind(3)]
        inputs.append(torch.randn(4, 2 * k - 1, 2 * k - 1, device="cuda", requires_grad=True))
        d_out = torch.randn_like(inputs[0])

        def forward(inputs=inputs, k=k, dilation=dilation) -> torch.Tensor:
            *qkv, rpb = inputs
            return na2d(*qkv, k, dilation=dilation, rpb=rpb, backend="triton")

        def training(inputs=inputs, d_out=d_out, forward=forward) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(forward(), inputs, d_out)

        for kernel, run in dict(forward=forward, query=training, key=training).items():
            bits, dim = 8 * DTYPES[dtype].itemsize, max(16, next_power_of_two(head_dim))
            name = str(ProblemClass(kernel, launch.architecture(d_out.device), bits, dim, dense, k * k))

            def seconds(config: Config, name=name, run=run) -> float:
                user_configs()[name] = config
                launch.forget_plans()
                try:
                    return statistics.median(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="all"))
                except Exception:  # does not compile, or needs more than this GPU has
                    return math.inf

            found[name] = user_configs()[name] = min(candidates, key=seconds)
            print(f"{name}: {found[name]._asdict()}", flush=True)
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | found, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
