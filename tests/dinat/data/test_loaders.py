"""Randomness of images: the same for the same epoch and image, another for any other, in streams too."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from dinat.data import TrainLoader, open_split
from dinat.data.seeding import derive, reseed, reseed_host

SIZE = (3, 1, 1)


class Numbered(Dataset):
    """Images that are their index."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return Image.new("RGB", (1, 1), (index, 0, 0)), index


def draw(image):
    """What PyTorch, NumPy and Python draw for an image, (3, 1, 1), beside the image itself."""
    drawn = [torch.randint(1 << 30, ()).item(), np.random.randint(1 << 30), random.getrandbits(30)]  # noqa: NPY002
    return torch.tensor([image.getpixel((0, 0))[0], *drawn])


def loader(source, seed=0, **options):
    defaults = {"batch_size": 4, "parts": 1, "rank": 0, "ranks": 1, "workers": 0, "pin_memory": False}
    return TrainLoader(source, draw, SIZE, seed=seed, **{**defaults, **options})


def drawn(batches):
    """Image -> what was drawn for it."""
    images = torch.cat([images for images, _, _ in batches])
    return {row[0]: row[1:] for row in images.tolist()} if len(images.unique(dim=0)) == len(images) else None


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_draws_anew(workers):
    first, again, second = (drawn(loader(Numbered(), workers=workers).batches(epoch)) for epoch in (1, 1, 2))
    assert first == again
    assert first.keys() == second.keys() == set(range(24))
    for kind in range(3):
        numbers = [row[kind] for epoch in (first, second) for row in epoch.values()]
        assert len(set(numbers)) == 48
    other = drawn(loader(Numbered(), seed=1).batches(1))
    assert not {tuple(row) for row in first.values()} & {tuple(row) for row in other.values()}


def test_processes_and_parts_share_what_one_would_draw():
    alone = drawn(loader(Numbered(), batch_size=12).batches(0))
    shared = {}
    for rank in range(3):
        shared |= drawn(loader(Numbered(), batch_size=2, parts=2, rank=rank, ranks=3).batches(0))
    assert shared == alone


def test_order_of_each_epoch():
    def order(seed, epoch):
        return [index for images, targets, _ in loader(Numbered(), seed).batches(epoch) for index in targets.tolist()]

    orders = [order(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0))]
    assert all(sorted(one) == list(range(24)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4


def test_three_generators_are_seeded():
    def numbers():
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    for seeded in (reseed, reseed_host):
        seeded(3, 1)
        first = numbers()
        torch.rand(5), np.random.rand(7), random.random()  # noqa: NPY002
        seeded(3, 1)
        assert numbers() == first
        seeded(1, 3)
        assert all(one != other for one, other in zip(numbers(), first, strict=True))


def test_accelerators_are_seeded_where_a_step_draws(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    reseed(3, 1)
    reseed_host(1, 3)
    assert seeds == [derive(3, 1)]


def test_facts_are_told_apart_by_place_and_number():
    facts = [(1, 2), (2, 1), (3,), (0, 3), (3, 0), (3, 0, 0), (1, 1, 1), (1, 0, 1), (0,), (0, 0)]
    assert len({derive(*one) for one in facts}) == len(facts)


# ---- streams ----


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 images in two shards, each its number."""
    webdataset = pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with webdataset.TarWriter(str(root / f"train-{shard}.tar")) as writer:
            for index in range(shard, 24, 2):
                writer.write({"__key__": f"{index:02d}", "png": Image.new("RGB", (1, 1), (index, 0, 0)), "cls": index})
    return root


def stream(shards, seed=0, **options):
    section = {
        "name": "wds/x", "root": str(shards), "train_split": "train-{0..1}.tar|24", "train_samples": None,
        "download": False, "class_map": None, "input_key": None, "target_key": None,
    }  # fmt: skip
    return loader(open_split(section, "train", seed=seed, batch_size=4), seed, **options)


def test_a_stream_draws_anew_in_every_epoch(shards):
    first, again, second = ([*stream(shards).batches(epoch)] for epoch in (1, 1, 2))
    assert drawn(first) == drawn(again)
    numbers = [{tuple(row) for row in drawn(epoch).values()} for epoch in (first, second)]
    assert [len(rows) for rows in numbers] == [24, 24]
    assert not numbers[0] & numbers[1]
    order = [torch.cat([targets for _, targets, _ in epoch]).tolist() for epoch in (first, second)]
    assert order[0] != order[1]


def test_a_stream_is_told_its_epoch(shards, monkeypatch):
    source, told = stream(shards).loader.dataset.source, []
    monkeypatch.setattr(type(source), "set_epoch", lambda _, epoch: told.append(epoch))
    for epoch in (3, 1):
        next(stream(shards).batches(epoch))
    assert told == [3, 1]


def test_readers_of_a_stream_draw_different_numbers(shards):
    """Two loader processes, and two training processes of the same seed."""
    rows = [tuple(row) for row in drawn(stream(shards, workers=2).batches(0)).values()]
    assert len({number for row in rows for number in row}) == 3 * len(rows)
    first, second = (drawn(stream(shards, rank=rank, ranks=2).batches(0)) for rank in (0, 1))
    assert not {tuple(row) for row in first.values()} & {tuple(row) for row in second.values()}


def test_a_stream_is_entered_at_an_update(shards):
    whole, late = ([*stream(shards, batch_size=2, parts=2).batches(1, start)] for start in (0, 2))
    assert len(whole) == 12
    assert len(late) == 12 - 2 * 2
    assert drawn(late) == drawn(whole[4:])


def test_no_more_workers_than_shards(shards):
    assert stream(shards, workers=5).loader.num_workers == 2
    assert stream(shards, workers=5, rank=0, ranks=2).loader.num_workers == 1
    assert stream(shards, workers=0).loader.num_workers == 1
