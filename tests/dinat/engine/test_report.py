"""Tables, pictures and trackers: what is in them."""

import csv
import sys
import types

import matplotlib.figure
import pytest
import torch

from dinat.engine import report
from dinat.engine.evaluation import table_row
from dinat.errors import UserError
from dinat.metrics.classification import ClassificationMetric
from dinat.tasks.classification import Classification
from dinat.tasks.objectives import OneClass

CONFUSION = torch.tensor([[1, 1, 0], [0, 3, 1], [0, 0, 0]])


def read(path):
    return list(csv.DictReader(path.open(newline="")))


def test_rows_of_classes():
    metric = ClassificationMetric(["a", "b", "c"], torch.device("cpu"))
    metric.update(torch.eye(3)[[0, 1, 1, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 1, 1]))
    first, second, third = metric.per_class()
    assert first == {"class": 0, "name": "a", "count": 2, "correct": 1, "top1": 50.0}
    assert (second["top1"], third["top1"]) == (75.0, None)


def test_row_of_results():
    model = torch.nn.Linear(1000, 20)
    model.pretrained_cfg = {"architecture": "linear"}
    task = Classification.__new__(Classification)
    task.objective = OneClass(None)
    task.preprocessing = {"input_size": (3, 20, 30), "crop_pct": 0.9, "interpolation": "bicubic"}
    row = task.results_row(model, {"loss": 0.12345678, "top1": 66.66666, "top5": 90.0})
    assert list(row.values()) == ["linear", 66.6667, 33.3333, 90.0, 10.0, 0.02, 30, 0.9, "bicubic", 0.123457]
    assert table_row(row, "top1", "here", 66.0)["difference"] == 0.6667
    assert table_row(row, "top1", "here", None)["difference"] is None


def test_no_speed_is_made_up(monkeypatch):
    bar, now = report.Bar("epoch 1/1", 4, 8, primary=True), [0.0]
    monkeypatch.setattr(bar.progress, "get_time", lambda: now[0])
    with bar:
        for done, expected in ((1, ""), (2, "16 img/s")):
            bar.advance(done)
            assert bar.speed == expected
            now[0] += 0.5


def test_a_table_keeps_one_row_of_each_evaluation_best_first(tmp_path):
    path = tmp_path / "tables" / "table.csv"

    def add(data, model, top1, img_size=224, crop_pct=0.9):
        row = {
            "data": data,
            "model": model,
            "top1": top1,
            "img_size": img_size,
            "crop_pct": crop_pct,
            "published": None,
        }
        report.add_row(path, row, "top1")

    for row in (("b", "x", 9.0), ("a", "x", 70.0), ("a", "y", 80.0), ("a", "x", 75.0), ("a", "x", 100.0, 384)):
        add(*row)
    add("a", "x", 71.0, 224, 1.0)
    found = [(row["data"], row["model"], row["top1"], row["img_size"]) for row in read(path)]
    assert found == [
        ("a", "x", "100.0", "384"), ("a", "y", "80.0", "224"), ("a", "x", "75.0", "224"), ("a", "x", "71.0", "224"),
        ("b", "x", "9.0", "224"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"table=.*table\.csv: has other columns"):
        report.add_row(path, {"data": "a", "model": "x", "top1": 1.0}, "top1")


@pytest.mark.parametrize("content", [b"a line of my notes\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_table_stays(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"table=.*notes\.txt: .*Give another file"):
        report.add_row(tmp_path / "notes.txt", {"data": "a", "model": "x", "top1": 1.0}, "top1")
    assert (tmp_path / "notes.txt").read_bytes() == content


def test_confusion_is_drawn_by_true_class(tmp_path, monkeypatch):
    """Rows are true classes, each divided by its images; an empty one stays at zero."""
    drawn, imshow = [], matplotlib.axes.Axes.imshow

    def spy(axes, matrix, **options):
        drawn.append((axes, matrix))
        return imshow(axes, matrix, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", spy)
    report.draw_confusion(tmp_path / "confusion.png", CONFUSION, ["a", "b", "c"])
    ((axes, matrix),) = drawn
    assert matrix.tolist() == [[0.5, 0.5, 0], [0, 0.75, 0.25], [0, 0, 0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [text.get_text() for text in axes.texts] == list("110031000")
    assert [(text.get_position()) for text in axes.texts][1:4] == [(1, 0), (2, 0), (0, 1)]


def test_curves_over_epochs(tmp_path, monkeypatch):
    plotted = {}
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda self, x, y, label, marker: plotted.update({label: (x, y)}))
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda *_: None)
    rows = [
        {"epoch": epoch, "train_loss": loss, "val_loss": other, "train_top1": 1, "val_top1": other, "lr": 0.1}
        for epoch, loss, other in ((1, 3.0, None), (2, 2.0, 2.5))
    ]
    report.draw_curves(tmp_path / "curves.png", rows, "top1", "top-1")
    assert plotted["train_loss"] == ((1, 2), (3.0, 2.0))
    assert plotted["val_loss"] == plotted["val_top1"] == ((2,), (2.5,))
    assert plotted["lr"] == ((1, 2), (0.1, 0.1))


def test_tensorboard_takes_back_what_a_resumed_run_does_again(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    tracker = report.Tracker({"name": "tensorboard"}, tmp_path, {}, step=7)
    tracker.log({"a": 1.5, "b": None}, 8)
    tracker.close()
    assert written == [(str(tmp_path / "tensorboard"), 8), ("a", 1.5, 8), "closed"]


def test_wandb_is_told_which_run_it_is(compose, tmp_path, monkeypatch):
    told = {}
    run = types.SimpleNamespace(log=lambda values, step: told.update(values, step=step), finish=lambda: told.clear())
    init = lambda **options: (told.update(options), run)[1]  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    logger = compose("logger=wandb", "logger.project=digits", "logger.mode=offline").logger
    tracker = report.Tracker(logger, tmp_path / "run-3", {"seed": 1}, step=0)
    assert told == {
        "project": "digits", "mode": "offline", "dir": str(tmp_path / "run-3"), "id": "run-3", "resume": "allow",
        "config": {"seed": 1},
    }  # fmt: skip
    tracker.log({"loss": 2.0, "nothing": None}, 3)
    assert (told["loss"], told["step"], "nothing" in told) == (2.0, 3, False)
    tracker.close()
    assert not told
    with pytest.raises(UserError, match=r"logger\.name=mlflow: no such tracker\. Known: tensorboard, wandb"):
        report.Tracker({"name": "mlflow"}, tmp_path, {}, step=0)


def test_log_goes_to_a_file_of_the_first_process_only(tmp_path):
    for folder, primary in ((tmp_path / "first", True), (tmp_path / "second", False)):
        folder.mkdir()
        with report.logging_to(folder, primary):
            report.log.info("told")
            report.log.warning("warned")
    assert [line.split(" ", 2)[2] for line in (tmp_path / "first" / "train.log").read_text().splitlines()] == [
        "INFO told", "WARNING warned",
    ]  # fmt: skip
    assert not (tmp_path / "second" / "train.log").exists()
    assert not report.log.handlers
