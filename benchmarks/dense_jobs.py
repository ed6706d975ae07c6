"""The default jobs of dense prediction as a user starts them: what they reach and how long they take, and a picture.

    python benchmarks/dense_jobs.py                               # all three, half an hour on two CPU cores
    python benchmarks/dense_jobs.py --tasks semantic --runs /tmp/runs --picture /tmp/dense.png

Trains task=semantic and task=detection from scratch and task=panoptic from the backbone of the semantic run, and
appends a row for each figure to benchmarks/results/dense.csv. Seconds are of the whole command. The picture has the
first scenes of the validation split, whatever the models make of them: image, truth and prediction of each task.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import RESULTS, ROOT, append, command, facts, rounded
from harness import read as read_rows
from PIL import Image

from dinat.visualize import CELL, GAP, HEAD

TASKS = ("semantic", "detection", "panoptic")


def train(task: str, runs: Path, overrides: Sequence[str]) -> float:
    """Runs the job as a process of its own; returns its seconds."""
    start = time.perf_counter()
    semantic = runs / "semantic"
    backbone = [f"model.checkpoint={semantic}", "model.reset_head=true"] if semantic.exists() else []
    words = backbone if task == "panoptic" else []
    command("train.py", f"task={task}", f"dir={runs / task}", *words, *overrides)
    return time.perf_counter() - start


def picture(runs: Sequence[Path], rows: int) -> Image.Image:
    """The first rows of each run's predictions.png side by side, half as large."""
    sheets = [Image.open(run / "predictions.png") for run in runs]
    height = HEAD + rows * (CELL + GAP)
    joined = Image.new("RGB", (sum(sheet.width + 3 * GAP for sheet in sheets) - 3 * GAP, height), "white")
    left = 0
    for sheet in sheets:
        joined.paste(sheet.crop((0, 0, sheet.width, height)), (left, 0))
        left += sheet.width + 3 * GAP
    return joined.resize((joined.width // 2, joined.height // 2), Image.Resampling.LANCZOS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--runs", type=Path, help="where the run folders go: RUNS/TASK; a temporary folder by default")
    parser.add_argument("--rows", type=int, default=3, help="of the picture")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "dense.png")
    parser.add_argument("--output", type=Path, default=RESULTS / "dense.csv")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration, for a trial")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(options.runs or temporary).absolute()
        for task in options.tasks:
            machine = facts("cpu")  # before the job, which loads it
            seconds = train(task, runs, options.overrides)
            last = read_rows(runs / task / "summary.csv")[-1]
            figures = {name.removeprefix("val_"): x for name, x in last.items() if name.startswith("val_")}
            for name, value in figures.items():
                row = dict(task=task, updates=last["step"], seconds=round(seconds), figure=name)
                append(options.output, {**machine, **row, "value": rounded(float(value))})
        picture([runs / task for task in options.tasks], options.rows).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
