"""From a dataset to batches: transforms, order, and what is done about images that cannot be read.

A batch is `(images, targets, problems)`: uint8 `(B, C, H, W)` (of volumes `(B, C, D, H, W)`), int64 `(B,)` and a list
with one line for each image that could not be read. Where images have several labels, targets are int64 `(B, classes)`
of zeros and ones. For dense prediction, images are a list of uint8 `(C, h, w)` and targets a list of dicts. A target of
`IGNORE` marks an image that only fills the batch up and counts nowhere.

Normalisation, erasing and mixup happen on the device, in the training step: workers move uint8.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from dinat.data.imagenet import IGNORE
from dinat.data.images import ImageError, open_image
from dinat.data.labels import Labels, OneLabel
from dinat.data.seeding import derive, reseed_host
from dinat.errors import UserError

ATTEMPTS = 10  # neighbours tried in place of an unreadable training image before giving up

FILLER = (3, 32, 32)  # size of what stands in for an image where each has a size of its own

Batch = tuple[Any, Any, list[str]]
Opener = Callable[[Any], Image.Image]  # `open_image` with the settings of this data


class Images(Dataset):
    """Map-style images by key: `(index, epoch)` for training, a bare index for evaluation, `IGNORE` for a filler.

    An unreadable image is replaced by the next one in training (`substitute`) and by a filler in evaluation, where
    another image in its place would be counted twice.

    Args:
        transform: PIL image -> uint8 tensor of `size`; with `size` None, (image, target) -> (uint8 tensor, target).
        labels: what a reader gives for an image -> its target.
    """

    def __init__(
        self, source: Dataset, transform: Callable, size: Sequence[int] | None, opener: Opener, labels: Labels, *,
        seed: int, substitute: bool,
    ) -> None:  # fmt: skip
        self.source, self.transform, self.opener, self.labels = source, transform, opener, labels
        self.seed, self.substitute = seed, substitute
        self.joint = size is None
        self.filler = torch.zeros(tuple(size or FILLER), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, Any, list[str]]:
        index, epoch = key if isinstance(key, tuple) else (key, None)
        problems: list[str] = []
        while index != IGNORE:
            try:
                image, target = self.read(index)
            except Exception as error:  # decoders raise anything on malformed bytes: OSError, SyntaxError, struct.error
                problems.append(f"{self.describe(index)}: {error}")
                tries_left = self.substitute and len(problems) < ATTEMPTS
                index = (index + 1) % len(self) if tries_left else IGNORE
                continue
            if epoch is not None:
                reseed_host(self.seed, epoch, index)
            if self.joint:
                return *self.transform(image, target), problems
            return torch.as_tensor(self.transform(image)), target, problems
        return self.filler, IGNORE if self.joint else self.labels.filler, problems

    def read(self, index: int) -> tuple[Any, Any]:
        if self.joint:
            return self.source[index]
        if not isinstance(self.source, ImageDataset):
            image, target = self.source[index]
            return self.opener(image), self.labels(target)
        # Straight from timm's reader: ImageDataset itself puts the next image in place of one that it cannot read.
        file, target = self.source.reader[index]
        with file:
            return self.opener(file), self.labels(target)

    def describe(self, index: int) -> str:
        try:
            name = self.source.filename(index, absolute=True)
        except Exception:  # not every dataset can name its images
            name = None
        return str(name or f"image {index}")


class Stream(IterableDataset):
    """Images of a timm stream; every `stride`-th one from `offset` on, randomly transformed where `seed` is set.

    An unreadable image is replaced by the next one in training (where `seed` is set) and by a filler in evaluation, as
    in `Images`; what the stream calls it is its `name`, else its number in this worker's part.

    A stream opens its files where it is iterated and keeps its place there, so it is always iterated in a worker
    process that was forked for this epoch.
    """

    def __init__(
        self, source: IterableDataset, transform: Callable, size: Sequence[int], opener: Opener, labels: Labels, *,
        seed: int | None = None, stride: int = 1, offset: int = 0,
    ) -> None:  # fmt: skip
        self.source, self.transform, self.opener, self.labels = source, transform, opener, labels
        self.seed, self.stride, self.offset = seed, stride, offset
        self.filler = torch.zeros(tuple(size), dtype=torch.uint8)
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, list[str]]]:
        problems: list[str] = []  # of images that are still to be replaced, the ones just before `count`
        good = None
        for count, (encoded, target) in enumerate(self.source):
            if count % self.stride != self.offset:
                continue
            try:
                if problem := getattr(encoded, "problem", None):
                    raise ImageError(problem)
                good = self.opener(encoded), self.labels(target)
            except ValueError as error:  # of the image or its label
                problems.append(f"{getattr(encoded, 'name', None) or f'image {count}'}: {error}")
                if self.seed is None or len(problems) == ATTEMPTS:
                    yield self.filler, self.labels.filler, problems
                    problems = []
                continue
            yield from self.draw(good, problems, range(count - len(problems), count + 1))
            problems = []
        if problems and good:  # the last images have no next one
            yield from self.draw(good, problems, range(count + 1 - len(problems), count + 1))
        elif problems:
            yield self.filler, self.labels.filler, problems

    def draw(
        self, good: tuple[Image.Image, int], problems: list[str], numbers: Iterable[int]
    ) -> Iterator[tuple[torch.Tensor, int, list[str]]]:
        """An image in each of these places of the stream; the first tells of the problems."""
        image, target = good
        for number in numbers:
            if self.seed is not None:
                reseed_host(self.seed, self.epoch, self.offset, get_worker_info().id, number)
            yield torch.as_tensor(self.transform(image)), target, problems
            problems = []


def collate(samples: list[tuple[torch.Tensor, int | torch.Tensor, list[str]]]) -> Batch:
    """Stacks samples into a `Batch`."""
    images, targets, problems = collate_joint(samples)
    return default_collate(images), torch.stack([torch.as_tensor(target) for target in targets]), problems


def collate_joint(samples: list[tuple[torch.Tensor, Any, list[str]]]) -> Batch:
    """Lists samples of different sizes as a `Batch`."""
    images, targets, problems = zip(*samples, strict=True)
    return list(images), list(targets), [line for lines in problems for line in lines]


def count_images(targets: Sequence[Any]) -> int:
    """How many of a batch's targets are of images."""
    if isinstance(targets, torch.Tensor):
        return int((targets != IGNORE).reshape(len(targets), -1).all(dim=1).sum())
    return sum(target != IGNORE for target in targets)


def blank(batch: Batch) -> Batch:
    """The batch once more, with nothing in it that counts."""
    images, targets, _ = batch
    return images, torch.full_like(targets, IGNORE), []


def shield_worker(_: int) -> None:
    """Lets a worker outlive a SIGTERM or Ctrl-C sent to the whole job; it ends when its training process says so.

    A scheduler signals every process of a job. A worker that died of it would make the training process raise in the
    middle of an update, when its state cannot be saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # the way to learn who sent a signal; Linux has it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class TrainOrder:
    """Batch sampler of one epoch: a permutation from (seed, epoch), shared out to processes, from any update on.

    Update `u` of an epoch uses images `u * G ... (u + 1) * G` of the permutation, with G = batch_size * parts * ranks;
    its `parts` batches (gradient accumulation) interleave with the other processes'. An incomplete last update is
    dropped. So the images of an update do not depend on how it is divided among processes and parts.
    """

    def __init__(self, length: int, batch_size: int, parts: int, rank: int, ranks: int, seed: int) -> None:
        self.length, self.batch_size, self.parts, self.rank, self.ranks, self.seed = (
            length, batch_size, parts, rank, ranks, seed,
        )  # fmt: skip
        self.epoch = self.start = 0
        self.updates = length // (batch_size * parts * ranks)

    def __len__(self) -> int:
        return (self.updates - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(derive(self.seed, self.epoch)))
        shares = self.parts * self.ranks
        for update in range(self.start, self.updates):
            images = order[update * self.batch_size * shares : (update + 1) * self.batch_size * shares].tolist()
            for part in range(self.parts):
                yield [(index, self.epoch) for index in images[part * self.ranks + self.rank :: shares]]


class TrainLoader:
    """Endless supply of training batches, addressable by epoch and update.

    Args:
        source: a dataset as `open_split` returns it.
        transform, size: as `Images` takes them.
        opener: opens an image as the model needs it; data for dense prediction does so itself.
        labels: as `Images` takes them.
        batch_size: images per batch and process.
        parts: batches per update (gradient accumulation).

    Raises:
        UserError: where the dataset is smaller than one update, or has fewer shards than there are processes.
    """

    def __init__(
        self, source: Dataset, transform: Callable, size: Sequence[int] | None, *, batch_size: int, parts: int,
        rank: int, ranks: int, seed: int, workers: int, pin_memory: bool, opener: Opener = open_image,
        labels: Labels | None = None,
    ) -> None:  # fmt: skip
        labels = labels or OneLabel()
        self.parts = parts
        if isinstance(source, IterableDataset):
            workers = _stream_workers(source, workers, ranks)
            dataset = Stream(source, transform, size, opener, labels, seed=seed + rank)
            self.updates = len(source) // (batch_size * parts)  # the reader's length is this process's share
            self.loader = _loader(
                dataset, workers, pin_memory, batch_size=batch_size, drop_last=True, generator=torch.Generator()
            )
        else:
            dataset = Images(source, transform, size, opener, labels, seed=seed, substitute=True)
            order = TrainOrder(len(dataset), batch_size, parts, rank, ranks, seed)
            self.updates = order.updates
            self.loader = _loader(dataset, workers, pin_memory, batch_sampler=order, persistent_workers=workers > 0)
        if not self.updates:
            raise UserError(
                f"batch_size={batch_size * parts * ranks} is larger than the training set. Set batch_size below that."
            )
        self.seed = seed

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from update `start` on: `parts` of them for each update."""
        dataset = self.loader.dataset
        if isinstance(dataset, Stream):
            dataset.epoch = epoch
            dataset.source.set_epoch(epoch)
            self.loader.generator.manual_seed(derive(self.seed, epoch))  # timm's readers shuffle by the worker's seed
            # A stream has no random access: what was seen is read again and passed over.
            return islice(self.loader, start * self.parts, self.updates * self.parts)
        self.loader.batch_sampler.epoch, self.loader.batch_sampler.start = epoch, start
        return iter(self.loader)


class EvalOrder:
    """Batch sampler that shows every image to exactly one process, with fillers where a process would have one less."""

    def __init__(self, length: int, batch_size: int, rank: int, ranks: int) -> None:
        padded = list(range(length)) + [IGNORE] * (-length % ranks)
        mine = padded[rank::ranks]
        self.batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def eval_loader(
    source: Dataset, transform: Callable, size: Sequence[int] | None, *, batch_size: int, rank: int, ranks: int,
    workers: int, pin_memory: bool, opener: Opener = open_image, labels: Labels | None = None,
) -> DataLoader:  # fmt: skip
    """A loader of each image once over all processes; rows with target `IGNORE` are not images.

    Of a stream, every process reads everything and keeps its share: exact, where timm's own division by shards
    rounds the number of images up or down.
    """
    labels = labels or OneLabel()
    if isinstance(source, IterableDataset):
        source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1
        workers = _stream_workers(source, workers, 1)
        dataset = Stream(source, transform, size, opener, labels, stride=ranks, offset=rank)
        return _loader(dataset, workers, pin_memory, batch_size=batch_size)
    dataset = Images(source, transform, size, opener, labels, seed=0, substitute=False)
    order = EvalOrder(len(dataset), batch_size, rank, ranks)
    return _loader(dataset, workers, pin_memory, batch_sampler=order, persistent_workers=workers > 0)


def _loader(dataset: Dataset, workers: int, pin_memory: bool, **options: Any) -> DataLoader:
    """A loader whose workers are forked where that is sound, whatever the default of this Python (3.14 has changed it).

    Those of a fork server are not this process's children, so they would not know its signals (`shield_worker`), and
    would end with a server that a scheduler's SIGTERM has reached; and each would hold a copy of the list of images.
    They run neither our threads nor CUDA, so that this process has threads does not matter to them.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate_joint if getattr(dataset, "joint", False) else collate,
        worker_init_fn=shield_worker,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        **options,
    )


def _stream_workers(source: IterableDataset, workers: int, ranks: int) -> int:
    """At least one worker, and no more than there are shards: one without a shard would wait for data for ever."""
    info = getattr(source.reader, "split_info", None)
    shards = len(getattr(info, "filenames", ())) or max(1, workers) * ranks  # unknown: as many as are asked for
    if shards < ranks:
        raise UserError(f"data.root: {shards} shards for {ranks} processes. Write at least one shard per process.")
    workers = max(1, min(workers, shards // ranks))
    source.set_loader_cfg(num_workers=workers)
    return workers
