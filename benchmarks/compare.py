"""Time a git revision against the working tree; print ratios.  Above 1, the working tree is faster.

    python benchmarks/compare.py main                                          # layers of dinat_tiny, batch 1
    python benchmarks/compare.py HEAD~3 --layers dinat_s_tiny --models dinat_tiny dinat_s_tiny --batch 1 8

The revision is checked out in a temporary folder.  Each side runs in a process of its own with its own packages; both
are timed by this tree's benchmarks, in turn (A B A B ...), and wait while the other one works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness import ROOT, add_device, warmed
from problems import MODELS


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of `revision`, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, revision], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


class Side:
    """A process that times cases with the packages of the tree at `path`."""

    def __init__(self, path: Path, device: str) -> None:
        paths = os.pathsep.join([str(path), str(path / "kernels")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"}  # do not spin while waiting
        command = [sys.executable, __file__, "--side", device]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, question: list | None) -> float:
        """Prepare a case; with None, take one sample of it: seconds."""
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("One side failed; what it said is above.")
        return json.loads(answer)


def serve(device: str) -> None:
    """The other end of `Side`."""
    import model_speed
    import operator_speed

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed
    layers = {p.name: p for problems in MODELS.values() for p in problems}
    kernel = "triton" if device == "cuda" else "torch"
    sample = None
    for line in sys.stdin:
        if (case := json.loads(line)) is None:
            print(sample(), file=answers, flush=True)
            continue
        name, batch, mode = case
        if name in layers:
            run = operator_speed.build(kernel, True, layers[name], batch, mode, device)
        else:
            run = model_speed.build(name, 224, batch, mode, device)
        sample = warmed(run, device)
        print(0, file=answers, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="git revision")
    parser.add_argument("--layers", nargs="*", default=["dinat_tiny"], choices=MODELS, help="of these models")
    parser.add_argument("--models", nargs="*", default=[], help="whole models, 224 px, eager")
    parser.add_argument("--batch", nargs="*", type=int, default=[1])
    parser.add_argument("--passes", nargs="*", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--rounds", type=int, default=15)
    add_device(parser)
    args = parser.parse_args(arguments)
    names = [p.name for model in args.layers for p in MODELS[model]] + args.models
    with ExitStack() as stack:
        base, tree = (
            stack.enter_context(Side(path, args.device)) for path in (stack.enter_context(checkout(args.base)), ROOT)
        )
        for name, batch, mode in itertools.product(names, args.batch, args.passes):
            for side in (base, tree):
                side.ask([name, batch, mode])
            turns = [(base.ask(None), tree.ask(None)) for _ in range(args.rounds)]
            ratios = [before / after for before, after in turns]
            p20, *_, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
            before, after = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
            print(
                f"{statistics.median(ratios):6.3f}x ({p20:.3f} .. {p80:.3f})  {before:9.3f} -> {after:9.3f} ms  "
                f"{name} batch {batch} {mode}",
                flush=True,
            )


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--side"] else main()
