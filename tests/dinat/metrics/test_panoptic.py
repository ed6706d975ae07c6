"""Panoptic quality against a plainly written reference, worked examples, and hotcoco's port of panopticapi."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinat.metrics.panoptic import PanopticMetric

CLASSES, THINGS = ["ant", "bee", "grass", "sky"], [True, True, False, False]


def made_up(seed, size=(24, 30)):
    """A target with void and crowds, and a prediction that is the target disturbed; as (prediction, target)."""
    random = np.random.default_rng(seed)
    target = np.kron(random.integers(0, 7, (4, 5)), np.ones((6, 6), int))
    predicted = np.roll(target, random.integers(-2, 3), 1)
    for old in random.choice(7, 3):  # some segments vanish or grow together
        predicted[predicted == old] = random.integers(0, 7)
    ids = [number for number in np.unique(target) if number]
    found = [number for number in np.unique(predicted) if number]
    of_ids = dict(zip(range(1, 7), random.integers(0, 4, 6), strict=True))
    labels = np.array([of_ids[number] for number in ids], int)
    crowds: dict[int, int] = {}
    for number, label in zip(ids, labels, strict=True):  # at most one per class, as in COCO
        if THINGS[label] and random.random() < 0.4:
            crowds.setdefault(label, number)
    renamed = {number: of_ids[number] if random.random() < 0.8 else random.integers(0, 4) for number in found}
    return (
        {
            "panoptic": torch.from_numpy(predicted.astype(np.int32)),
            "segments": [{"id": int(number), "label": int(label)} for number, label in renamed.items()],
        },
        {
            "panoptic": torch.from_numpy(target.astype(np.int32)),
            "segment_ids": torch.tensor(ids),
            "labels": torch.from_numpy(labels),
            "iscrowd": torch.tensor([number in crowds.values() for number in ids]),
        },
    )


def reference(pairs):
    """(IoU sum, TP, FP, FN) of each class, segment by segment with boolean masks."""
    totals = np.zeros((4, 4))
    for prediction, target in pairs:
        truth, guess = target["panoptic"].numpy(), prediction["panoptic"].numpy()
        objects = list(
            zip(target["segment_ids"].tolist(), target["labels"].tolist(), target["iscrowd"].tolist(), strict=True)
        )
        void = truth == 0
        taken = set()
        for number, label, crowd in objects:
            best = None
            for segment in prediction["segments"]:
                both = ((truth == number) & (guess == segment["id"])).sum()
                either = ((truth == number) | ((guess == segment["id"]) & ~void)).sum()
                if segment["label"] == label and 2 * both > either:
                    best = segment["id"], both / either
            if crowd:
                continue
            if best:
                taken.add(best[0])
                totals[label, :2] += best[1], 1
            else:
                totals[label, 3] += 1
        for segment in prediction["segments"]:
            mine = guess == segment["id"]
            excused = void.copy()
            for number, label, crowd in objects:
                if crowd and label == segment["label"]:
                    excused |= truth == number
            if segment["id"] not in taken and 2 * (mine & excused).sum() <= mine.sum():
                totals[segment["label"], 2] += 1
    return totals


def test_counts_are_those_of_the_reference_on_random_maps():
    crowds = voids = 0
    for seed in range(250):
        pair = made_up(seed)
        metric = PanopticMetric(CLASSES, THINGS)
        metric.update([pair[0]], [pair[1]])
        assert metric.counts == pytest.approx(reference([pair]), abs=1e-12)
        crowds += bool(pair[1]["iscrowd"].any())
        voids += bool((pair[1]["panoptic"] == 0).any())
    assert min(crowds, voids) > 50


def test_figures_are_those_of_hotcoco(tmp_path):
    panoptic = pytest.importorskip("hotcoco.panoptic")
    pairs = [made_up(seed) for seed in range(40)]
    metric = PanopticMetric(CLASSES, THINGS)
    metric.update(*zip(*pairs, strict=True))
    for name, side in (("found", 0), ("truth", 1)):
        (tmp_path / name).mkdir()
        annotations = []
        for image, pair in enumerate(pairs):
            ids = pair[side]["panoptic"].numpy()
            Image.fromarray(np.stack([ids, ids * 0, ids * 0], 2).astype(np.uint8)).save(
                tmp_path / name / f"{image}.png"
            )
            if side:
                rows = zip(*(pair[1][key].tolist() for key in ("segment_ids", "labels", "iscrowd")), strict=True)
            else:
                rows = ((segment["id"], segment["label"], False) for segment in pair[0]["segments"])
            segments = [
                {"id": number, "category_id": label, "iscrowd": int(crowd), "area": int((ids == number).sum())}
                for number, label, crowd in rows
            ]
            annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": segments})
        images = [{"id": image, "height": 24, "width": 30, "file_name": f"{image}.png"} for image in range(len(pairs))]
        categories = [
            {"id": label, "name": CLASSES[label], "isthing": int(THINGS[label])} for label in range(len(CLASSES))
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    theirs = panoptic.pq_compute(str(tmp_path / "truth.json"), str(tmp_path / "found.json"))
    figures = metric.compute()
    for suffix, group in {"": "All", "_things": "Things", "_stuff": "Stuff"}.items():
        for name in ("pq", "sq", "rq"):
            assert figures[name + suffix] == pytest.approx(100 * theirs[group][name], abs=1e-6)
    assert 5 < figures["pq"] < 80


def found(panoptic, *labels):
    segments = [{"id": number, "label": label} for number, label in enumerate(labels, start=1)]
    return {"panoptic": torch.tensor(panoptic, dtype=torch.int32), "segments": segments}


def there(panoptic, *labels, crowds=()):
    ids = torch.arange(1, len(labels) + 1)
    return {
        "panoptic": torch.tensor(panoptic, dtype=torch.int32),
        "segment_ids": ids,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.tensor([number in crowds for number in ids.tolist()], dtype=torch.bool),
    }


def figures(*pairs):
    metric = PanopticMetric(CLASSES, THINGS)
    metric.update(*zip(*pairs, strict=True))
    return metric.compute()


def test_a_thing_found_and_stuff_left_unassigned_is_half():
    result = figures((found([[1, 1, 0, 0]], 0), there([[1, 1, 2, 2]], 0, 2)))
    assert (result["pq"], result["pq_things"], result["pq_stuff"]) == (50, 100, 0)


def test_nothing_predicted_is_zero_and_nothing_there_is_nan():
    assert figures((found([[0, 0]]), there([[1, 1]], 0)))["pq"] == 0
    empty = figures((found([[0, 0]]), there([[0, 0]])))
    assert all(np.isnan(value) for value in empty.values())


def test_void_and_crowds_by_hand():
    # 3 of the 5 predicted pixels are void: not a false alarm. IoU without void: 3 / 4.
    assert figures((found([[1, 1, 1, 1, 1, 0]], 0), there([[0, 0, 0, 1, 1, 1]], 0)))["rq"] == 100
    # unmatched, half of it void: a false alarm; more than half: none
    half = (found([[1, 1, 1, 1, 2, 2]], 0, 2), there([[0, 0, 1, 1, 1, 1]], 2))
    assert figures(half)["pq_things"] == 0
    more = (found([[1, 1, 1, 2, 2, 2]], 0, 2), there([[0, 0, 1, 1, 1, 1]], 2))
    assert np.isnan(figures(more)["pq_things"])
    # in a crowd of its class a prediction counts for nothing, in one of another class it is wrong
    assert np.isnan(figures((found([[1, 1]], 0), there([[1, 1]], 0, crowds=(1,))))["pq"])
    assert figures((found([[1, 1]], 1), there([[1, 1]], 0, crowds=(1,))))["pq"] == 0


def test_classes_and_processes():
    pairs = [made_up(seed) for seed in range(6)]
    whole, parts = PanopticMetric(CLASSES, THINGS), [PanopticMetric(CLASSES, THINGS) for _ in range(2)]
    whole.update(*zip(*pairs, strict=True))
    for rank, part in enumerate(parts):
        part.update(*zip(*pairs[rank::2], strict=True))

    class Gathered:
        def gather(self, value):
            return [part.counts for part in parts]

    assert parts[0].compute(Gathered()) == pytest.approx(whole.compute(), abs=1e-10)
    rows = whole.per_class()
    assert [row["name"] for row in rows] == CLASSES
    assert [row["thing"] for row in rows] == THINGS
    assert np.mean([row["pq"] for row in rows if row["pq"] is not None]) == pytest.approx(
        whole.compute()["pq"], abs=1e-10
    )


def test_ids_and_sizes_must_agree():
    metric = PanopticMetric(CLASSES, THINGS)
    with pytest.raises(ValueError, match=r"the found map has ids \[2\], which no segment has"):
        metric.update([found([[1, 2]], 0)], [there([[1, 1]], 0)])
    with pytest.raises(ValueError, match=r"a prediction of \[1, 3\] pixels for a target of \[1, 2\]"):
        metric.update([found([[1, 1, 1]], 0)], [there([[1, 1]], 0)])
