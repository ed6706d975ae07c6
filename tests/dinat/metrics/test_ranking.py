"""AUC and accuracies against scikit-learn, put together as MedMNIST's evaluator does."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torch.nn import functional as F

from dinat.data import IGNORE
from dinat.distributed import ALONE
from dinat.errors import UserError
from dinat.metrics.ranking import RankingMetric, area


class Processes:
    """Several processes of which each gathers what the others have."""

    def __init__(self, *others: RankingMetric) -> None:
        self.others = others

    def gather(self, value):
        if isinstance(value, float):
            return [value, *(other.loss.item() for other in self.others)]
        return [value, *(other.gathered(ALONE)[:2] for other in self.others)]


def reference(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """MedMNIST's formulas in scikit-learn's terms; truth is (N,), or (N, classes) for several labels."""
    if truth.ndim == 2:
        columns = range(truth.shape[1])
        return {
            "auc": np.mean([roc_auc_score(truth[:, i], scores[:, i]) for i in columns]),
            "acc": np.mean([accuracy_score(truth[:, i], scores[:, i] > 0.5) for i in columns]),
            "balanced_acc": np.mean([balanced_accuracy_score(truth[:, i], scores[:, i] > 0.5) for i in columns]),
        }
    binary = scores.shape[1] == 2
    one_of = [roc_auc_score(truth == i, scores[:, i]) for i in range(scores.shape[1])]
    found = scores[:, 1] > 0.5 if binary else scores.argmax(1)
    return {
        "auc": roc_auc_score(truth, scores[:, 1]) if binary else np.mean(one_of),
        "acc": accuracy_score(truth, found),
        "balanced_acc": balanced_accuracy_score(truth, found),
    }


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_figures(classes, several):
    """With ties, over batches and two processes, fillers left out."""
    logits = (torch.randn(60, classes) * 3).round() / 3 + 0.01 * torch.arange(classes)
    targets = torch.randint(0, 2, (60, classes)) if several else torch.randint(0, classes, (60,))
    first, second = (RankingMetric(list("abcde")[:classes], several=several) for _ in range(2))
    filler = torch.full_like(targets[:3], IGNORE)
    for metric, part in ((first, slice(0, 20)), (first, slice(20, 33)), (second, slice(33, 60))):
        metric.update(torch.cat([torch.randn(3, classes), logits[part]]), torch.cat([filler, targets[part]]))
    scores = logits.sigmoid() if several else logits.softmax(1)
    found = first.compute(Processes(second))
    loss = F.binary_cross_entropy(scores, targets.float()) if several else F.nll_loss(scores.log(), targets)
    assert found.pop("loss") == pytest.approx(loss.item(), rel=1e-5)
    expected = reference(scores.numpy(), targets.numpy())
    assert found == pytest.approx({name: 100 * value for name, value in expected.items()}, abs=1e-9)


def test_area_by_hand():
    """Positives 3 and 1, negatives 1 and 0: of four pairs, three in order and one a tie."""
    assert area(torch.tensor([3.0, 1, 1, 0]), torch.tensor([True, True, False, False])) == 3.5 / 4


def test_classes_without_images_are_left_out_and_told(caplog):
    metric = RankingMetric(["cat", "dog", "newt"])
    metric.update(torch.tensor([[3.0, 1, 0], [0, 3, 1], [1, 2, 0]]), torch.tensor([0, 1, 0]))
    found = metric.compute()
    assert found["auc"] == pytest.approx(100)
    assert found["acc"] == pytest.approx(100 * 2 / 3)
    assert found["balanced_acc"] == pytest.approx(100 * (0.5 + 1) / 2)
    assert "left out are classes that all images have or none: newt" in caplog.text
    rows = metric.per_class()
    assert [(row["name"], row["count"], row["recall"], row["auc"]) for row in rows] == [
        ("cat", 2, 50.0, 100.0),
        ("dog", 1, 100.0, 100.0),
        ("newt", 0, None, None),
    ]
    assert metric.confusion_matrix().tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    alone = RankingMetric(["cat", "dog"])
    alone.update(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="AUC: every class has all images or none"):
        alone.compute()
    with pytest.raises(UserError, match="the data has a label 5, the model 2 classes"):
        alone.update(torch.randn(1, 2), torch.tensor([5]))
