"""The README's picture of dense prediction: the first rows of `predictions.png` of some runs, side by side.

    python benchmarks/dense_picture.py runs/semantic/mine runs/detection/mine --output docs/images/dense.png

These are the first scenes of the validation split, whatever the models make of them; none is chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dinat.visualize import CELL, GAP, HEAD


def join(runs: Sequence[Path], rows: int) -> Image.Image:
    """The first `rows` rows of each run, half as large."""
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
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of square images")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    join(options.runs, options.rows).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
