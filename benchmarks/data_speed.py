"""Time the data loaders on synthetic JPEG images; append rows to benchmarks/results/data.csv.

    PYTHONPATH=.:kernels python benchmarks/data_speed.py --workers 1 2

Images of 500 x 375 pixels (ImageNet's usual size, about 100 kB each) are made on the fly, as a folder and as webdataset
shards, and read by the project's own loaders: "train" with the augmentation of configs/augment/imagenet.yaml, "eval"
with resize and centre crop, to 224 pixels.  A worker uses one core: with one worker and a core to spare, images/s per
worker is images/s per core, and what the model consumes over that is the number of workers it needs.  The first epoch
warms up (processes start, files enter the cache); the median over the others is reported, the two sources in turn.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from harness import ROOT, add_arguments, append, facts, interleaved, rounded
from omegaconf import OmegaConf
from PIL import Image
from timm.data import resolve_data_config

from dinat.data import TrainLoader, eval_loader, eval_transform, open_split, train_transform

CLASSES, SHARDS, BATCH = 4, 4, 16


def jpegs(count: int, width: int = 500, height: int = 375) -> list[bytes]:
    """Smooth shapes with some noise, as large as photographs when compressed."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        noise = random.normal(0, 20, (height, width, 1))
        pixels = np.clip(np.asarray(shapes) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_folder(root: Path, files: list[bytes]) -> dict:
    """ROOT/SPLIT/CLASS/INDEX.jpg; returns what is to be set in configs/data."""
    for split, (index, file) in itertools.product(("train", "validation"), enumerate(files)):
        path = root / split / str(index % CLASSES) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return dict(name="folder", root=str(root))


def write_shards(root: Path, files: list[bytes]) -> dict:
    """The same images as .tar files of INDEX.jpg and INDEX.cls."""
    root.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for index in range(shard, len(files), SHARDS):
                for name, content in ((f"{index}.jpg", files[index]), (f"{index}.cls", b"%d" % (index % CLASSES))):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    split = f"{{0..{SHARDS - 1}}}.tar|{len(files)}"
    return dict(name="wds/shards", root=str(root), train_split=split, val_split=split)


def build(settings: dict, split: str, workers: int) -> Callable[[], object]:
    """What is timed: an epoch."""
    data = OmegaConf.merge(OmegaConf.load(ROOT / "configs" / "data" / "default.yaml"), settings)
    source = open_split(data, split, batch_size=BATCH)
    preprocessing, size = resolve_data_config(dict(img_size=224)), (3, 224, 224)
    common = dict(batch_size=BATCH, rank=0, ranks=1, workers=workers, pin_memory=False)
    if split == "validation":
        loader = eval_loader(source, eval_transform(preprocessing), size, **common)
        return lambda: sum(len(images) for images, *_ in loader)
    augment = OmegaConf.load(ROOT / "configs" / "augment" / "imagenet.yaml").transform
    loader = TrainLoader(source, train_transform(preprocessing, augment), size, parts=1, seed=0, **common)
    epochs = itertools.count()
    return lambda: sum(len(images) for images, *_ in loader.batches(next(epochs)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="in an epoch")
    parser.add_argument("--workers", nargs="*", type=int, default=[1], help="processes that decode")
    add_arguments(parser, "data.csv", seconds=10.0)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        files = jpegs(args.images)
        kilobytes = sum(map(len, files)) / len(files) / 1000
        sources = {
            "folder": write_folder(Path(folder, "folder"), files),
            "webdataset": write_shards(Path(folder, "webdataset"), files),
        }
        print(f"{len(files)} images of {kilobytes:.0f} kB")
        for split, workers in itertools.product(("train", "validation"), args.workers):
            started = facts("cpu")
            builders = {name: partial(build, settings, split, workers) for name, settings in sources.items()}
            for name, timing in interleaved(builders, "cpu", args.seconds, args.rounds).items():
                rate = args.images // BATCH * BATCH / timing.median
                problem = dict(source=name, split=split, images=args.images, workers=workers)
                speed = dict(
                    per_worker=rounded(rate / workers), images_per_s=rounded(rate), ratio=rounded(timing.ratio)
                )
                append(args.output, started | problem | speed | timing.columns(1e-3))
                print(f"{speed['per_worker']:8.1f} images/s per worker  {workers} workers  {split} {name}", flush=True)


if __name__ == "__main__":
    main()
