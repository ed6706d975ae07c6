"""What an evaluation counts, on batches written by hand."""

import contextlib
import math
from functools import partial

import pytest
import torch

from dinat.data import IGNORE
from dinat.distributed import ALONE
from dinat.engine.scoring import measure
from dinat.errors import UserError
from dinat.metrics.classification import ClassificationMetric
from dinat.tasks.classification import Classification

CLASSES = 7


class Told(torch.nn.Module):
    """Its images are its logits."""

    def forward(self, images):
        assert not self.training
        return images


def logits(*best):
    """Rows that rank the classes given first, in that order, then the others by index."""
    rows = torch.zeros(len(best), CLASSES)
    for row, order in zip(rows, best, strict=True):
        others = [index for index in range(CLASSES) if index not in order]
        row[[*order, *others]] = torch.arange(CLASSES, 0, -1).float()
    return rows


BATCHES = [
    (logits([0], [1], [2]), torch.tensor([0, 1, 0]), []),
    (logits([2, 0], [2, 6]), torch.tensor([0, IGNORE]), ["b.png: damaged"]),
    (logits([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]), torch.tensor([6, 2]), []),
]


class Given(Classification):
    """Classification of batches that need no data set; `options` are those of its metric."""

    def __init__(self, num_classes, on_bad_image, prepare, autocast, options):
        self.data, self.world = {"on_bad_image": on_bad_image}, ALONE
        self.normalize, self.autocast, self.num_classes, self.options = prepare, autocast, num_classes, options

    def metric(self, confusion=False):
        names = [f"class {index}" for index in range(self.num_classes)]
        return ClassificationMetric(names, self.world.device, confusion=confusion, **self.options)


def scores(
    batches=BATCHES, model=None, *, num_classes=CLASSES, on_bad_image="skip", prepare=lambda images: images,
    autocast=contextlib.nullcontext, confusion=False, tick=lambda done: None, **options,
):  # fmt: skip
    task = Given(num_classes, on_bad_image, prepare, autocast, options)
    per_class = "accepted" not in options
    return measure(task, model or Told(), batches, per_class=per_class, confusion=confusion, tick=tick)


def column(found, name):
    return [row[name] for row in found.per_class]


def test_counts_of_three_batches():
    found = scores(confusion=True)
    # true 0 -> 0, 2, 2; true 1 -> 1; true 6 -> 1 (sixth of its ranking); true 2 -> 6 (fifth)
    assert found.count == 6
    assert found.skipped == 1
    assert found.figures["top1"] == pytest.approx(100 * 2 / 6)
    assert found.figures["top5"] == pytest.approx(100 * 5 / 6)
    assert column(found, "count") == [3, 1, 1, 0, 0, 0, 1]
    assert column(found, "correct") == [1, 1, 0, 0, 0, 0, 0]
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for true, predicted in ((0, 0), (1, 1), (0, 2), (0, 2), (6, 1), (2, 6)):
        expected[true, predicted] += 1
    assert torch.equal(found.confusion, expected)


def test_loss_is_the_mean_over_images():
    kept = [(images[targets != IGNORE], targets[targets != IGNORE]) for images, targets, _ in BATCHES]
    rows, targets = (torch.cat(parts) for parts in zip(*kept, strict=True))
    expected = torch.nn.functional.cross_entropy(rows.double(), targets).item()
    assert scores().figures["loss"] == pytest.approx(expected, rel=1e-6)


def test_classes_that_do_not_compete_are_never_predicted():
    found = scores(confusion=True, competing=[0, 1, 6])
    assert found.confusion[:, 2].sum() == 0
    assert found.confusion[0].tolist() == [3, 0, 0, 0, 0, 0, 0]
    only = scores([(logits([2, 0]), torch.tensor([0]), [])], competing=[0, 1, 6])
    rest = torch.tensor([6.0, 5.0, 1.0])  # the logits of 0, 1 and 6
    assert only.figures["loss"] == pytest.approx(-rest.log_softmax(0)[0].item(), rel=1e-6)


def test_any_accepted_class_is_right():
    accepted = torch.zeros(2, CLASSES, dtype=torch.bool)
    accepted[0, [2, 3]] = accepted[1, 4] = True
    found = scores([(logits([3], [0, 1, 2, 3, 4]), torch.tensor([0, 1]), [])], accepted=accepted)
    assert (found.figures["top1"], found.figures["top5"]) == (50, 100)
    assert found.count == 2
    chance = [row.softmax(0) for row in logits([3], [0, 1, 2, 3, 4])]
    expected = -(math.log(chance[0][2] + chance[0][3]) + math.log(chance[1][4])) / 2
    assert found.figures["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_model_with_fewer_than_five_classes():
    found = scores([(torch.eye(3), torch.tensor([0, 0, 2]), [])], num_classes=3)
    assert (found.figures["top1"], found.figures["top5"]) == (pytest.approx(100 * 2 / 3), 100)


def test_the_model_is_left_as_it_was():
    for training in (True, False):
        model = Told().train(training)
        scores(model=model)
        assert model.training == training


def test_batches_are_prepared_and_counted():
    done = []
    found = scores(prepare=lambda images: -images, tick=done.append, confusion=True)
    assert done == [1, 2, 3]
    assert sum(column(found, "correct")) == 0  # the order of all classes is reversed


def test_computed_in_the_precision_of_the_context():
    """The matrix product under autocast, the loss in float32."""

    class Rounded(torch.nn.Module):
        def forward(self, images):
            rounded = images @ torch.eye(CLASSES)
            assert rounded.dtype == torch.bfloat16
            return rounded

    images = torch.rand(4, CLASSES)
    targets = torch.arange(4)
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    found = scores([(images, targets, [])], model=Rounded(), autocast=half)
    expected = torch.nn.functional.cross_entropy(images.bfloat16().double(), targets).item()
    assert found.figures["loss"] == pytest.approx(expected, rel=1e-6)


def test_bad_images_by_policy(caplog):
    scores()
    assert "skipped unreadable image b.png: damaged" in caplog.text
    with pytest.raises(
        UserError, match=r"unreadable image b\.png: damaged\. Repair it, or set data\.on_bad_image=skip"
    ):
        scores(on_bad_image="fail")


def test_labels_outside_of_the_model():
    scores([(logits([0]), torch.tensor([CLASSES - 1]), [])])
    with pytest.raises(UserError, match=r"the data has a label 7, the model 7 classes"):
        scores([(logits([0]), torch.tensor([CLASSES]), [])])


def test_nothing_to_count():
    with pytest.raises(UserError, match="no image was counted"):
        scores([(logits([0]), torch.tensor([IGNORE]), ["a.png: damaged"])])
