"""`dinat inspect`: what docs/inspect.md does not show of it."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dinat import dense
from dinat.commands.inspect import class_index, schedule
from dinat.inspect import effective_fields, grad_cam, pictures, squares


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of five classes in `model`, and two images."""
    place = tmp_path_factory.mktemp("inspect")
    torch.manual_seed(0)
    model = timm.create_model("dinat_pico", num_classes=5)
    torch.save(model.state_dict(), place / "pico.pth")
    for i, name in enumerate(("a.png", "b.png")):
        ramp = np.indices((64, 96)).sum(0)[..., None] * [1, 2, 3] + 50 * i
        Image.fromarray((ramp % 256).astype("uint8")).save(place / name)
    return place


@pytest.fixture
def inspect(dinat, place, monkeypatch, tmp_path):
    """Runs a report of the model in `place`; (status, stdout, stderr), results in the current folder's `out`."""
    monkeypatch.chdir(tmp_path)

    def inspect(report, *arguments):
        files = [place / argument if str(argument).endswith(".png") else argument for argument in arguments]
        model = ("--model", "dinat_pico", "--checkpoint", place / "pico.pth")
        return dinat("inspect", report, *files, *model, "--output", "out")

    return inspect


def loaded(place):
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(place / "pico.pth")), num_classes=5)
    return timm.create_model("dinat_pico", **options).eval()


def seen(place, name, size):
    """An image as the model sees it."""
    image = Image.open(place / name).resize(size, Image.Resampling.BICUBIC)
    scaled = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(scaled).float().permute(2, 0, 1)[None]


def test_attention(inspect, place, tmp_path):
    status, out, err = inspect("attention", "a.png", "--at", "12,30", "--npz", "--block", "1.0", "--size", "48")
    assert (status, err) == (0, "")
    assert out.split() == ["out/attention.html", "out/attention_12_30.png", "out/attention.npz"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name.removeprefix("out/") for name in out.split()}
    arrays = np.load("out/attention.npz")
    assert arrays["0.0.weights"].shape == (1, 1, 24, 24, 9)
    page = (tmp_path / "out" / "attention.html").read_text()
    assert "dinat_pico: a.png" in page
    assert '"first":{"block":2,"head":-1,"x":12,"y":30}' in page


def test_heads(inspect, tmp_path):
    status, out, err = inspect("heads", "a.png", "b.png", "--importance", "ablation", "--batch-size", "2")
    assert (status, err) == (0, "")
    rows = list(csv.DictReader((tmp_path / "out" / "heads.csv").open()))
    assert [row["block"] for row in rows[:4]] == ["0.0", "0.1", "1.0", "1.0"]
    assert all(float(row["importance"]) for row in rows)
    assert out.split()[-3:] == ["out/heads.csv", "out/heads.png", "out/patterns.png"]


def test_erf_is_of_the_whole_image(inspect, place, tmp_path, monkeypatch):
    given = []
    spy = lambda model, batches: effective_fields(model, (given.append(batch) or batch for batch in batches))  # noqa: E731
    monkeypatch.setattr("dinat.inspect.effective_fields", spy)
    status, _, err = inspect("erf", "a.png", "b.png", "--size", "32", "--limit", "1")
    assert (status, err) == (0, "")
    image = seen(place, "a.png", (32, 32))
    (batch,) = given
    torch.testing.assert_close(batch, image, atol=0.02, rtol=0)  # the resized pixels are rounded
    fields = effective_fields(loaded(place), [image])
    rows = list(csv.DictReader((tmp_path / "out" / "erf.csv").open()))
    found = [float(row["area"]) for row in rows if row["measure"] == "sums"]
    expected = [square.area for field in fields for square in squares(field)]
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_cam(inspect, place, tmp_path, monkeypatch):
    """Of the class that is asked for; else of the likeliest."""
    model, images = loaded(place), seen(place, "a.png", (48, 32))[..., 8:40]  # resized, then the middle of it
    with torch.no_grad():
        probabilities = model(images).softmax(1)[0]
    drawn, draw_cam = [], pictures.draw_cam
    monkeypatch.setattr(pictures, "draw_cam", lambda *arguments: (drawn.append(arguments), draw_cam(*arguments))[1])
    for index, options in ((probabilities.argmax().item(), ()), (3, ("--class", "3"))):
        status, out, err = inspect("cam", "a.png", *options)
        assert (status, err) == (0, "")
        title, file = out.splitlines()
        assert title == f"{index} ({index}), {100 * probabilities[index]:.1f} %"
        picture, cam, _ = drawn.pop()
        assert picture.size == cam.shape == (32, 32)
        np.testing.assert_allclose(cam, grad_cam(model, images, [index])[0], atol=0.1)  # pixels are rounded
        assert (tmp_path / file).is_file()


def test_schedules():
    assert (schedule("max"), schedule("2"), schedule("1 8 | 1")) == ("max", 2, [[1, 8], [1]])
    assert class_index("sea lion", ["otter", "sea lion, Zalophus", "lion"]) == 1
    assert class_index("lion", ["otter", "sea lion, Zalophus", "lion"]) == 2


def refused(result, message):
    status, out, err = result
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_bad_input(inspect, dinat, place, tmp_path):
    refused(inspect("attention", "a.png", "--at", "12"), "--at 12: give two whole numbers, x,y")
    refused(
        inspect("attention", "a.png", "--at", "32,0"), "at=32,0: outside of the image, whose pixels are 0,0 to 31,31"
    )
    refused(inspect("attention", "a.png", "--block", "7.0"), "block=7.0: no such block")
    refused(inspect("attention", "a.png", "--head", "1"), "head=1: block 0.0 has heads 0 to 0")
    refused(inspect("attention", "no.png"), "no.png: no such file")
    refused(inspect("attention", place), f"IMAGE {place}: a folder, not an image")
    refused(inspect("cam", "a.png", "--class", "5"), "--class 5: the model has classes 0 to 4")
    refused(inspect("cam", "a.png", "--class", "cat"), "--class cat: no classes have this name")
    refused(dinat("inspect", "field", "dinat_mimi"), "MODEL dinat_mimi: no such model. Did you mean dinat_mini")
    refused(dinat("inspect", "field", "upernet_nat_mini.ade20k"), "is for dense prediction. Name its backbone")
    refused(dinat("inspect", "field", "nat_mini", "--dilations", "1 2"), "dilations must be one list per level")
    refused(dinat("inspect", "field", "nat_mini", "--dilations", "one"), "--dilations one: give max, gradual, a number")
    refused(dinat("inspect", "field", "dinat_3d_pico"), "is for volumes")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_dense_model(dinat, place, monkeypatch, tmp_path):
    """Its backbone, on the image resized and padded as the model has it."""
    monkeypatch.chdir(tmp_path)
    model = dense.create_model("upernet", num_classes=3, backbone="dinat_pico_patch4", channels=8)
    described = dict(
        task="semantic",
        model=dict(name="upernet", backbone="dinat_pico_patch4", kwargs=dict(channels=8)),
        num_classes=3,
        label_names=list("abc"),
        preprocessing=dict(mean=[0.5] * 3, std=[0.2] * 3, transform=[dict(resize=dict(shortest=32))]),
    )
    (tmp_path / "model").mkdir()
    dense.save(model, described, tmp_path / "model")
    options = ("--model", "local-dir:model", "--output", "out")
    status, _, err = dinat("inspect", "attention", place / "a.png", *options, "--npz")
    assert (status, err) == (0, "")
    assert np.load("out/attention.npz")["0.0.weights"].shape[2:4] == (8, 16)
    assert dinat("inspect", "heads", place / "a.png", *options, "--importance", "none")[0] == 0
    refused(dinat("inspect", "heads", place / "a.png", *options), "has no classifier. Use importance=none")
    refused(dinat("inspect", "cam", place / "a.png", *options), "has no classifier; Grad-CAM is for classes")
    refused(
        dinat("inspect", "attention", place / "a.png", *options, "--size", "64"),
        "--size 64: --model local-dir:model resizes images as it was trained to",
    )
