"""Images with several labels, through every reader that gives them, and what is wrong with some."""

import json

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch.nn import functional as F

from dinat.data import IGNORE, SeveralLabels, blank, count_images, eval_loader, open_split
from dinat.engine import evaluate, train
from dinat.errors import UserError

LABELS = 4
NUMBERS = range(24)
PIXELS = load_digits().images[: len(NUMBERS)].astype(np.uint8)


def of(number: int) -> list[int]:
    """The labels of an image: the binary digits of its number, so that some have none and some all."""
    return [bit for bit in range(LABELS) if number % 16 >> bit & 1]


def hot(number: int) -> list[int]:
    return [number % 16 >> bit & 1 for bit in range(LABELS)]


class Pairs(torch.utils.data.Dataset):
    """A data set of torchvision: vectors as targets."""

    def __init__(self, root, **_):
        pass

    def __len__(self):
        return len(NUMBERS)

    def __getitem__(self, index):
        return torchvision.transforms.functional.to_pil_image(PIXELS[index]), torch.tensor(hot(index))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same images as a Hugging Face data set, with lists and with vectors, and as webdataset shards."""
    datasets = pytest.importorskip("datasets")
    webdataset = pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("several")
    datasets.disable_progress_bars()
    pictures = [torchvision.transforms.functional.to_pil_image(pixels) for pixels in PIXELS]
    features = {"image": datasets.Image(), "parts": datasets.Sequence(datasets.Value("int64"))}
    features["vector"] = datasets.Sequence(datasets.Value("int64"))
    columns = {"image": pictures, "parts": [of(n) for n in NUMBERS], "vector": [hot(n) for n in NUMBERS]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (root / "hf").mkdir()
    for split in ("train", "validation"):
        table.to_parquet(str(root / "hf" / f"{split}-00000.parquet"))
        with webdataset.TarWriter(str(root / f"{split}-0.tar")) as writer:
            for number, picture in enumerate(pictures):
                writer.write({"__key__": f"{number:04d}", "png": picture, "json": {"parts": of(number)}})
    hf = ["data=hf", f"data.name=hfds/{root / 'hf'}", f"data.root={root / 'cache'}"]
    return {
        "hf": [*hf, "data.target_key=parts", "data.labels=indices"],
        "hf vectors": [*hf, "data.target_key=vector", "data.labels=multi_hot"],
        "webdataset": [
            "data=webdataset", f"data.root={root}", "data.train_split='train-0.tar|24'", "data.target_key=parts",
            "data.val_split='validation-0.tar|24'", "data.labels=indices",
        ],
        "torch": ["data.name=torch/pairs", f"data.root={root}", "data.labels=multi_hot"],
    }  # fmt: skip


@pytest.fixture
def open_store(stores, monkeypatch):
    from timm.data import dataset_factory

    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "pairs", Pairs)
    return lambda kind: stores[kind]


@pytest.mark.parametrize("kind", ["hf", "hf vectors", "webdataset", "torch"])
def test_every_reader_with_several_labels(kind, open_store, compose):
    data = compose(*open_store(kind), f"data.num_classes={LABELS}").data
    found = []
    for rank in range(5):  # 24 images, so that one process has a filler
        loader = eval_loader(
            open_split(data, "validation"), lambda image: torch.from_numpy(np.array(image))[None], (1, 8, 8),
            batch_size=3, rank=rank, ranks=5, workers=1 if kind == "webdataset" else 0, pin_memory=False,
            labels=SeveralLabels(data.labels, LABELS), opener=lambda file: _opened(file),
        )  # fmt: skip
        for batch in loader:
            _, targets, problems = batch
            assert not problems
            assert targets.shape[1:] == (LABELS,)
            assert count_images(targets) == (targets[:, 0] != IGNORE).sum()
            assert count_images(blank(batch)[1]) == 0
            found += [target for target in targets.tolist() if target[0] != IGNORE]
    assert sorted(found) == sorted(map(hot, NUMBERS))


def _opened(file):
    from dinat.data import open_image

    return open_image(file, channels=1)


def test_trained_and_evaluated(open_store, compose, evaluation, command_line, tmp_path):
    """Two epochs; the figures of the run are those of eval.py; loss and step are those of the formula."""
    overrides = (*open_store("hf"), f"data.num_classes={LABELS}", "batch_size=8", "augment.smoothing=0")
    auc = train(compose(*command_line, *overrides), tmp_path / "run")
    result = evaluate(evaluation(f"checkpoint={tmp_path / 'run'}", "per_class=true"))
    assert result["auc"] == pytest.approx(auc, abs=1e-4)
    assert result["headline"] == "auc"
    assert result["count"] == len(NUMBERS)
    header = (tmp_path / "run" / "per_class.csv").read_text().splitlines()[0]
    assert header == "class,name,count,recall,auc"
    with pytest.raises(UserError, match="confusion=true: not for several labels per image"):
        evaluate(evaluation(f"checkpoint={tmp_path / 'run'}", "confusion=true"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss(smoothing, open_store, observe):
    """Cross-entropy of each label with its target, moved towards a half by half of the smoothing."""
    observed = observe(
        *open_store("hf"), f"data.num_classes={LABELS}", "batch_size=24", f"augment.smoothing={smoothing}"
    )
    training, _, logits = next(step for step in observed.forward if step[0])
    targets = observed_targets(observed.forward[0][1])
    soft = targets * (1 - smoothing) + smoothing / 2
    expected = -(soft * F.logsigmoid(logits) + (1 - soft) * F.logsigmoid(-logits)).mean()
    assert training
    assert float(observed.rows[0]["train_loss"]) == pytest.approx(expected.item(), rel=1e-5)
    accuracy = ((logits > 0) == targets.bool()).float().mean()
    assert float(observed.rows[0]["train_acc"]) == pytest.approx(100 * accuracy.item(), rel=1e-5)


def observed_targets(images: torch.Tensor) -> torch.Tensor:
    """The targets of normalised images, found by their pixels."""
    pixels = ((images[:, 0] * 0.5 + 0.5) * 255).round()
    known = torch.from_numpy(PIXELS).float()
    numbers = (pixels[:, None] == known).flatten(2).all(2).int().argmax(1)
    return torch.tensor([hot(number) for number in numbers.tolist()]).float()


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ("indices", [0, 4], r"its labels are \[0, 4\], not numbers of classes, 0 to 3"),
        ("indices", [-1, 2], r"its labels are \[-1, 2\], not numbers of classes"),
        ("indices", ["a"], r"its labels are \['a'\], not numbers of classes"),
        ("multi_hot", [0, 1, 1], r"its labels are \[0, 1, 1\], not 4 zeros and ones"),
        ("multi_hot", [0, 1, 2, 0], r"its labels are \[0, 1, 2, 0\], not 4 zeros and ones"),
    ],
)
def test_wrong_labels(labels, given, message):
    with pytest.raises(ValueError, match=message):
        SeveralLabels(labels, LABELS)(given)


def test_labels_of_one_kind_for_another(open_store, compose, command_line, tmp_path, caplog):
    """One class expected, several given: said of the images by name; of a mistaken key before anything starts."""
    overrides = [override for override in open_store("hf") if "labels" not in override]
    with pytest.raises(UserError, match="an image without a label, or too many unreadable images"):
        train(compose(*command_line, *overrides, f"data.num_classes={LABELS}", "batch_size=8"), tmp_path / "run")
    assert "not one class; for several set data.labels=indices or multi_hot" in caplog.text
    with pytest.raises(UserError, match=r"data\.labels=multihot: no such kind\. Known: indices, multi_hot\. Did you"):
        train(compose(*command_line, "data.labels=multihot"), tmp_path / "other")
    mixup = ["augment.mixup.mixup_alpha=0.2", f"data.num_classes={LABELS}", "batch_size=8"]
    with pytest.raises(UserError, match=r"augment\.mixup: not for several labels per image"):
        train(compose(*command_line, *open_store("hf"), *mixup), tmp_path / "mixed")


def test_json_of_shards_without_the_labels(tmp_path):
    """As for single labels: the image is named."""
    webdataset = pytest.importorskip("webdataset")
    from dinat.data.shards import Shards

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(2):
            fields = {"parts": of(number + 1)} if number else {}
            writer.write({"__key__": f"{number}", "png": b"", "json": json.dumps(fields).encode()})
    reader = Shards(str(tmp_path), "several", split="a.tar|2", target_key="parts", num_samples=2)
    (first, _), (second, target) = list(reader)
    assert "label" in first.problem
    assert (second.problem, target) == (None, [1])
