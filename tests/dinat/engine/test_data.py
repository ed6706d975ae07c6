"""Datasets of every kind, the order of their images, and the randomness of their augmentation."""

import multiprocessing
import os
import sys
import tarfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dinat.data import IGNORE, TrainLoader, class_to_idx, eval_loader, open_split, train_transform
from dinat.data.digits import Digits
from dinat.data.loaders import EvalOrder, TrainOrder
from dinat.data.seeding import derive
from dinat.engine import train

SIZE = (3, 16, 16)


def pixels(image):
    """A 16x16 tensor without any randomness."""
    return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)


def loader_of(source, **options):
    defaults = {"batch_size": 10, "parts": 1, "rank": 0, "ranks": 1, "seed": 0, "workers": 0, "pin_memory": False}
    return TrainLoader(source, options.pop("transform", pixels), SIZE, **{**defaults, **options})


def all_of(batches):
    images, targets, problems = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets), [line for lines in problems for line in lines]


def test_digits_split_is_stratified_and_fixed():
    train_set, val_set = Digits("train"), Digits("validation")
    assert (len(train_set), len(val_set)) == (1437, 360)
    assert torch.bincount(torch.from_numpy(val_set.targets)).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    digits = load_digits().target
    _, held_out = train_test_split(digits, test_size=360, stratify=digits, random_state=0)
    assert np.array_equal(val_set.targets, held_out)
    image, digit = val_set[0]
    assert (image.size, image.mode, digit) == ((8, 8), "RGB", int(val_set.targets[0]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [9, 10, 1, 2])
def test_evaluation_shows_every_image_once(length, ranks):
    orders = [EvalOrder(length, 4, rank, ranks) for rank in range(ranks)]
    shown = [index for order in orders for batch in order for index in batch]
    assert sorted(index for index in shown if index != IGNORE) == list(range(length))
    assert len({len(order) for order in orders}) == 1  # processes stay in step


def test_an_update_has_the_same_images_however_it_is_divided():
    def updates(batch_size, parts, ranks):
        orders = [TrainOrder(100, batch_size, parts, rank, ranks, seed=3) for rank in range(ranks)]
        batches = [[key for batch in order for key in batch] for order in orders]
        share = batch_size * parts
        return [
            sorted(key for mine in batches for key in mine[update * share : (update + 1) * share])
            for update in range(100 // (share * ranks))
        ]

    whole = updates(12, 1, 1)
    assert len(whole) == 8
    assert whole == updates(6, 2, 1) == updates(6, 1, 2) == updates(2, 3, 2)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch, start=0):
        sampler = TrainOrder(100, 10, 1, 0, 1, seed)
        sampler.epoch, sampler.start = epoch, start
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 2, start=7) == order(0, 2)[7:]


def test_seeds_are_spread():
    assert len({derive(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(40)}) == 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_the_image_and_the_epoch(digits_folder, compose, workers):
    """An epoch that is entered in the middle, with any number of workers, continues with the same pixels."""
    source = open_split(compose("data=folder", f"data.root={digits_folder}").data, "train")
    options = compose("augment=imagenet").augment.transform
    transform = train_transform({"input_size": SIZE, "mean": (0.5,) * 3}, dict(options))
    reference, _, _ = all_of(loader_of(source, transform=transform).batches(epoch=1))
    other, _, _ = all_of(loader_of(source, transform=transform).batches(epoch=2))
    assert not torch.equal(reference, other)
    loader = loader_of(source, transform=transform, workers=workers)
    all_of(loader.batches(epoch=0))
    late, _, _ = all_of(loader.batches(epoch=1, start=5))
    assert torch.equal(late, reference[50:])


# ---- the same 120 digits through each of timm's readers ----


@pytest.fixture(scope="module")
def stores(digits_folder, tmp_path_factory):
    """The digits as a folder, as tar files, as webdataset shards and as a Hugging Face data set."""
    webdataset = pytest.importorskip("webdataset")
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("stores")
    (root / "tar").mkdir()
    (root / "wds").mkdir()
    for split in ("train", "validation"):
        paths = sorted((digits_folder / split).rglob("*.png"))
        with tarfile.open(root / "tar" / f"{split}.tar", "w") as archive:
            for path in paths:
                archive.add(path, arcname=f"{path.parent.name}/{path.name}")
        for shard in range(3):
            with webdataset.TarWriter(str(root / "wds" / f"{split}-{shard}.tar")) as writer:
                for index, path in list(enumerate(paths))[shard::3]:
                    label = path.parent.name.encode()
                    writer.write({"__key__": f"{index:04d}", "png": path.read_bytes(), "cls": label})
    datasets.disable_progress_bars()
    return {
        "folder": ["data=folder", f"data.root={digits_folder}"],
        "tar": ["data=folder", f"data.root={root}/tar"],
        "webdataset": [
            "data=webdataset", f"data.root={root}/wds", "data.num_classes=10",
            "data.train_split='train-{0..2}.tar|120'", "data.val_split='validation-{0..2}.tar|37'",
        ],
        "hf": ["data=hf", f"data.name=hfds/{digits_folder}", f"data.root={root}/cache"],
        "hf_stream": [
            "data=hf_stream", f"data.name=hfids/{digits_folder}", f"data.root={root}/cache", "data.num_classes=10",
            "data.train_samples=120", "data.val_samples=37",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar", "webdataset", "hf", "hf_stream"])
def test_every_store_holds_the_same_images(stores, compose, kind):
    def contents(data, ranks):
        found = []
        for rank in range(ranks):
            source = open_split(data, "validation")
            loader = eval_loader(
                source, pixels, SIZE, batch_size=8, rank=rank, ranks=ranks, workers=2, pin_memory=False
            )
            images, targets, _ = all_of(loader)
            found += [
                (int(target), image.flatten().tolist())
                for image, target in zip(images, targets, strict=True)
                if target != IGNORE
            ]
        return sorted(found)

    expected = contents(compose(*stores["folder"]).data, 1)
    data = compose(*stores[kind]).data
    assert contents(data, 1) == expected
    assert contents(data, 2) == expected  # two processes: each image at one of them
    if kind in ("folder", "tar", "hf"):
        assert class_to_idx(open_split(data, "train")) == {str(digit): digit for digit in range(10)}


@pytest.mark.parametrize("kind", ["tar", "webdataset", "hf", "hf_stream"])
def test_every_store_trains(stores, tiny, tmp_path, kind):
    cfg = tiny(*stores[kind], "scheduler.epochs=1", "scheduler.warmup_epochs=0", "batch_size=60")
    assert 0 <= train(cfg, tmp_path) <= 100


def test_a_stream_can_be_entered_in_the_middle(stores, compose):
    def images(start):
        source = open_split(compose(*stores["webdataset"]).data, "train", seed=1, batch_size=10)
        return all_of(loader_of(source, workers=2).batches(epoch=1, start=start))[0]

    whole = images(0)
    assert len(whole) == 120
    assert torch.equal(images(7), whole[70:])


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_workers_are_children_of_this_process(stores, compose, kind):
    """Whatever Python's default: 3.14 has a fork server start them, 3.13 a fork. What is forked is never pickled."""
    torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # this process has threads
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        source = open_split(compose(*stores[kind]).data, "train", seed=1, batch_size=10)
        loader = loader_of(source, transform=lambda _: torch.tensor([os.getppid()]), workers=2)
        parents, _, _ = all_of(loader.batches(epoch=0))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert parents.unique().tolist() == [os.getpid()]


# ---- images that cannot be read ----


@pytest.fixture
def damaged(digits_folder, tmp_path):
    """The digits with one training and one validation image cut short and one of each not an image."""
    for split in ("train", "validation"):
        for path in (digits_folder / split).rglob("*.png"):
            copy = tmp_path / split / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        cut, other = sorted((tmp_path / split / "3").glob("*.png"))[:2]
        cut.write_bytes(cut.read_bytes()[:60])
        other.write_text("not an image")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_and_replaced_in_training(damaged, compose, workers):
    source = open_split(compose("data=folder", f"data.root={damaged}").data, "train")
    _, targets, problems = all_of(loader_of(source, workers=workers).batches(0))
    assert len(targets) == 120
    assert (targets != IGNORE).all()
    assert len(problems) >= 2
    assert any("00.png" in line and "truncated" in line for line in problems)
    assert any("01.png" in line and "cannot identify image file" in line for line in problems)


def test_bad_images_are_named_and_not_counted_in_evaluation(damaged, compose):
    source = open_split(compose("data=folder", f"data.root={damaged}").data, "validation")
    loader = eval_loader(source, pixels, SIZE, batch_size=8, rank=0, ranks=1, workers=0, pin_memory=False)
    _, targets, problems = all_of(loader)
    assert (targets != IGNORE).sum() == 35
    assert len(problems) == 2
