"""Mean intersection over union against NumPy."""

import numpy as np
import pytest
import torch

from dinat.metrics.semantic import SemanticMetric

CLASSES = ["ant", "bee", "cat", "dog", "elk"]  # nobody predicts a dog, and there is no elk at all


def maps(seed):
    random = np.random.default_rng(seed)
    target = random.choice([0, 1, 2, 3, 255], (30, 40))
    predicted = np.where(random.random((30, 40)) < 0.6, target, random.integers(0, 3, (30, 40)))
    return np.where(np.isin(predicted, (3, 255)), 0, predicted), target


def test_figures_are_those_of_numpy():
    pairs = [maps(seed) for seed in range(5)]
    parts = [SemanticMetric(CLASSES) for _ in range(2)]
    for index, (predicted, target) in enumerate(pairs):
        prediction = {"semantic": torch.from_numpy(predicted)}
        parts[index % 2].update([prediction], [{"semantic": torch.from_numpy(target.astype(np.uint8))}])

    class Gathered:
        def gather(self, value):
            return [part.confusion for part in parts]

    predicted, target = (np.concatenate(stack) for stack in zip(*pairs, strict=True))
    counted = target != 255
    ious = [
        ((predicted == label) & (target == label)).sum()
        / (((predicted == label) | (target == label)) & counted).sum().clip(1)
        for label in range(4)
    ]
    accuracies = [(predicted == label)[target == label].mean() for label in range(4)]
    figures = parts[0].compute(Gathered())
    assert figures["miou"] == pytest.approx(100 * np.mean(ious), abs=1e-10)
    assert figures["pixel_accuracy"] == pytest.approx(100 * (predicted == target)[counted].mean(), abs=1e-10)
    assert figures["class_accuracy"] == pytest.approx(100 * np.mean(accuracies), abs=1e-10)
    rows = parts[0].per_class(Gathered())
    assert [(row["class"], row["name"]) for row in rows] == list(enumerate(CLASSES))
    assert [row["iou"] for row in rows[:4]] == pytest.approx([100 * iou for iou in ious], abs=1e-10)
    assert [row["pixels"] for row in rows] == [int((target == label).sum()) for label in range(5)]
    assert rows[3]["iou"] == 0
    assert (rows[4]["iou"], rows[4]["accuracy"]) == (None, None)


def test_a_map_of_another_size():
    metric = SemanticMetric(CLASSES)
    with pytest.raises(ValueError, match=r"a prediction of \[4, 5\] pixels for a target of \[5, 4\]"):
        metric.update([{"semantic": torch.zeros(4, 5)}], [{"semantic": torch.zeros(5, 4)}])
