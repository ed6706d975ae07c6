"""Published models by their names, with weights from a file, on generated sets in the formats of their data."""

import csv
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.nn import functional as F

from dinat import dense
from dinat.classes import CLASSES
from dinat.data import scenes
from dinat.dense import mask2former
from dinat.dense.mask2former import OneFormer
from dinat.engine import evaluate, train
from dinat.errors import UserError
from dinat.metrics.detection import DetectionMetric

HEIGHT, WIDTH = 24, 40
BACKBONE = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "kernel_size": 3, "dilations": [[1]] * 4}
QUERIES = {
    "width": 64, "heads": 2, "encoder_layers": 1, "encoder_mlp": 16, "decoder_layers": 2, "decoder_mlp": 16,
    "queries": 6, "object_threshold": 0.0,
}  # fmt: skip
SMALL = {
    "mask_rcnn": {
        "fpn_channels": 8, "box_channels": 8, "mask_channels": 8, "rpn_top": 20, "rpn_keep": 10, "score_threshold": 0.0,
    },
    "upernet": {"channels": 8, "auxiliary_channels": 8},
    "mask2former": QUERIES,
    "oneformer": QUERIES,
}  # fmt: skip


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_coco(file, classes, names, segments=None):
    """An annotation file for images NAME.jpg: a square of the last thing each, or segments 1 and 2 of these classes."""
    images = [{"id": i, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for i, n in enumerate(names)]
    categories = [
        {"id": number, "name": name, "isthing": int(thing)}
        for number, name, thing in zip(classes.ids, classes.names, classes.things, strict=True)
    ]
    if segments:
        infos = [{"id": i, "category_id": classes.ids[label]} for i, label in enumerate(segments, start=1)]
        annotations = [{"image_id": i, "file_name": f"{n}.png", "segments_info": infos} for i, n in enumerate(names)]
    else:
        box = {"category_id": classes.ids[-1], "bbox": [4, 4, 16, 12], "area": 192, "iscrowd": 0}
        corners = {"segmentation": [[4, 4, 20, 4, 20, 16, 4, 16]]}
        annotations = [{"id": i, "image_id": i, **box, **corners} for i in range(len(names))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two images of each data set; the left half of a map is of one class, the right half of another."""
    root, draw = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    halves = np.repeat([1, 2], WIDTH // 2)[None].repeat(HEIGHT, 0)
    ids = np.stack([halves, 0 * halves, 0 * halves], 2).astype(np.uint8)

    def photograph(path):
        save(path, draw.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))

    names = ["a", "b"]
    for name in names:
        for folder in ("coco/val2017", "ade20k/images/validation", "mapillary/validation/images"):
            photograph(root / folder / f"{name}.jpg")
        for folder in ("coco/annotations/panoptic_val2017", "ade20k/ade20k_panoptic_val",
                       "mapillary/validation/v1.2/panoptic"):  # fmt: skip
            save(root / folder / f"{name}.png", ids)
        save(root / f"ade20k/annotations/validation/{name}.png", halves.astype(np.uint8))
        city = f"{name}ville/{name}ville_000000_000019"
        photograph(root / f"cityscapes/leftImg8bit/val/{city}_leftImg8bit.png")
        save(root / f"cityscapes/gtFine/val/{city}_gtFine_labelIds.png", np.where(halves == 1, 7, 26).astype(np.uint8))
        of_a_car = np.where(halves == 1, 7, 26000).astype(np.uint16)
        save(root / f"cityscapes/gtFine/val/{city}_gtFine_instanceIds.png", of_a_car)
    write_coco(root / "coco/annotations/instances_val2017.json", CLASSES["coco"], names)
    write_coco(root / "coco/annotations/panoptic_val2017.json", CLASSES["coco_panoptic"], names, (0, 132))
    write_coco(root / "ade20k/ade20k_instance_val.json", CLASSES["ade20k_instance"], names)
    write_coco(root / "ade20k/ade20k_panoptic_val.json", CLASSES["ade20k"], names, (0, 7))
    panoptic = root / "mapillary/validation/v1.2/panoptic/panoptic_2018.json"
    write_coco(panoptic, CLASSES["mapillary"], names, (0, 1))
    listed = "\n".join(f"{i}\t0\t0\t0\t{name}" for i, name in enumerate(CLASSES["ade20k"].names, start=1))
    (root / "ade20k/objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{listed}\n")
    return root


@pytest.fixture
def published(evaluation, root, tmp_path):
    """Evaluates a published model, made small, from a file of weights: the result, and the model."""

    def published(name, data, *overrides, **kwargs):
        row, file = dense.PUBLISHED[name], tmp_path / "weights.pth"
        kwargs = {**SMALL[row.method], **kwargs, "backbone_kwargs": BACKBONE}
        torch.manual_seed(0)
        model = dense.create_model(name, **kwargs).eval()
        torch.save({"state_dict": model.state_dict()}, file)
        folder = root / (data.partition("_")[0] if data.startswith("coco") else data)
        cfg = evaluation(
            f"model.name={name}", f"model.checkpoint={file}", f"data={data}", f"data.root={folder}",
            "data.eval_transform=[{resize: {shortest: 32, longest: 64, resample: bilinear}}]", f"output={tmp_path}",
            *overrides,
        )  # fmt: skip
        OmegaConf.update(cfg, "model.kwargs", kwargs, force_add=True)
        return evaluate(cfg), model

    return published


@pytest.mark.parametrize(
    ("name", "data", "task", "headline"),
    [
        ("mask_rcnn_dinat_mini.coco", "coco", "detection", "mask_ap"),
        ("upernet_dinat_mini.ade20k", "ade20k", "semantic", "miou"),
        ("mask2former_dinat_large.ade20k_instance", "ade20k", "detection", "mask_ap"),
        ("mask2former_dinat_large.ade20k_panoptic", "ade20k", "panoptic", "pq"),
        ("mask2former_dinat_large.cityscapes_instance", "cityscapes", "detection", "mask_ap"),
        ("mask2former_dinat_large.cityscapes_semantic", "cityscapes", "semantic", "miou"),
        ("mask2former_dinat_large.coco_panoptic", "coco_panoptic", "panoptic", "pq"),
        ("oneformer_dinat_large.mapillary", "mapillary", "panoptic", "pq"),
    ],
)
def test_by_name_and_file(published, name, data, task, headline):
    """The task, the classes and the head are those of the name."""
    result, _ = published(name, data)
    assert (result["task"], result["count"], result["skipped"], result["model"]) == (task, 2, 0, name)
    assert 0 <= result[headline] <= 100


def test_every_image_is_evaluated(published, root):
    """`keep_empty=false`, of the recipes, is for training."""
    content = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    content["annotations"] = content["annotations"][:1]
    (root / "coco/annotations/mine.json").write_text(json.dumps(content))
    options = "+data.kwargs={keep_empty: false, annotations: annotations/mine.json, images: val2017}"
    result, _ = published("mask_rcnn_dinat_mini.coco", "coco", options)
    assert result["count"] == 2


def test_the_published_figure_stands_beside_ours(published, tmp_path):
    result, _ = published("upernet_dinat_mini.ade20k", "ade20k", f"table={tmp_path / 'table.csv'}")
    published("upernet_dinat_mini.ade20k", "ade20k", f"table={tmp_path / 'table.csv'}", "test.multi_scale=true",
              "test.scales=[1]")  # fmt: skip
    rows = {row["model"].partition(" ")[2]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert {tested: float(row["published"]) for tested, row in rows.items()} == {"": 45.8, "at several scales": 47.2}
    assert float(rows[""]["difference"]) == pytest.approx(result["miou"] - 45.8, abs=1e-3)


def test_a_model_of_several_tasks_is_told_which(published):
    result, model = published("oneformer_dinat_large.ade20k", "ade20k", "test.task=semantic")
    assert (result["task"], model.task) == ("semantic", "panoptic")
    assert 0 <= result["miou"] <= 100


@pytest.mark.parametrize(
    ("name", "data", "things"),
    [
        ("oneformer_dinat_large.cityscapes", "cityscapes", "cityscapes_instance"),
        ("mask2former_dinat_large.ade20k_panoptic", "ade20k", "ade20k_instance"),
        ("mask2former_dinat_large.coco_panoptic", "coco", "coco"),
    ],
)
def test_things_of_models_of_all_segments(published, monkeypatch, name, data, things):
    """`test.task=detection`: what they find keeps its name, though the data numbers things alone."""
    found, scored = [], []
    predict, update = dense.model.DenseModel.predict, DetectionMetric.update
    monkeypatch.setattr(
        dense.model.DenseModel, "predict", lambda *args: (found.extend(predict(*args)), found[-len(args[1]) :])[1]
    )
    monkeypatch.setattr(DetectionMetric, "update", lambda self, *args: (scored.extend(args[0]), update(self, *args))[1])
    result, model = published(name, data, "test.task=detection")
    assert (result["task"], result["count"], model.task) == ("detection", 2, "panoptic")
    assert 0 <= result["mask_ap"] <= 100
    theirs, ours = CLASSES[dense.PUBLISHED[name].data].names, CLASSES[things].names
    named = [[theirs[label] for label in one["labels"]] for one in found]
    assert sum(map(len, named)) > 0
    assert [[ours[label] for label in one["labels"]] for one in scored] == named


def test_the_map_of_segments(published):
    """`task=semantic` on panoptic data; the truth is of two classes, so mIoU is of these and of what is found."""
    result, _ = published("mask2former_dinat_large.coco_panoptic", "coco_panoptic", "test.task=semantic")
    assert (result["task"], result["count"]) == ("semantic", 2)
    assert 0 <= result["miou"] <= 100


def test_classes_of_other_data_are_refused(published):
    with pytest.raises(
        UserError, match=r"class counts differ: mask2former_.* has 8 classes of things, the data 100\. Evaluate on the"
    ):
        published("mask2former_dinat_large.cityscapes_panoptic", "ade20k", "test.task=detection")
    with pytest.raises(
        UserError, match=r"class counts differ: upernet_dinat_mini\.ade20k has 150, the data 19\. Evaluate on the data"
    ):
        published("upernet_dinat_mini.ade20k", "cityscapes")


def test_ones_own_classes_in_the_place_of_the_published(compose, tmp_path):
    """A recipe on a folder of masks, from a file of the published model: without a rate, only classifiers are new."""
    for split in ("train", "validation"):
        for name in "abcd":
            save(tmp_path / f"images/{split}/{name}.png", np.full((32, 32, 3), 90, np.uint8))
            save(tmp_path / f"masks/{split}/{name}.png", np.eye(32, dtype=np.uint8))
    (tmp_path / "classes.txt").write_text("ground\nant\n")
    kwargs, file = {**SMALL["upernet"], "backbone_kwargs": BACKBONE}, tmp_path / "weights.pth"
    model = dense.create_model("upernet_dinat_mini.ade20k", **kwargs)
    torch.save({"state_dict": model.state_dict()}, file)
    cfg = compose(
        "experiment=upernet_dinat_mini", f"model.checkpoint={file}", "model.reset_head=true", "model.pretrained=false",
        "data=masks", f"data.root={tmp_path}", "data.eval_transform=[]", "augment.transform=[]", "runtime=default",
        "runtime.device=cpu", "batch_size=4", "scheduler.updates=1", "optimizer.lr=0", "scheduler.warmup_updates=0",
    )  # fmt: skip
    OmegaConf.update(cfg, "model.kwargs", kwargs, force_add=True)
    train(cfg, tmp_path / "run")
    trained = dense.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    described = dense.read_config(tmp_path / "run")
    assert (described["label_names"], described["model"]["name"]) == (["ground", "ant"], "upernet_dinat_mini.ade20k")
    before = model.state_dict()
    differing = {k for k, v in trained.state_dict().items() if v.shape != before[k].shape or not v.equal(before[k])}
    new = {
        f"network.{head}.classifier.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")
    }
    assert new <= differing
    assert all("running" in key or "num_batches" in key for key in differing - new)


def test_texts_of_a_recipe(compose, tmp_path, monkeypatch):
    """OneFormer's recipes train the contrast with texts about the data's classes; what comes out needs no tokenizer."""
    cfg = compose(
        "experiment=oneformer_dinat_large_coco", "model.pretrained=false", "data=digit_scenes", "data.img_size=32",
        "++data.kwargs={digits: [1, 2], digit_size: [12, 20], scenes: 8}", "data.eval_transform=[]",
        "augment.transform=[]", "runtime=default", "runtime.device=cpu", "batch_size=4", "scheduler.updates=2",
    )  # fmt: skip
    queries = {**QUERIES, "queries": 20, "points": 64, "text_layers": 1, "backbone_kwargs": BACKBONE}
    OmegaConf.update(cfg, "model.kwargs", queries, force_add=True)
    seen, texts = [], OneFormer.texts
    monkeypatch.setattr(scenes, "VALIDATION_SCENES", 2)
    monkeypatch.setattr(OneFormer, "texts", lambda *args: (seen.append(texts(*args)), seen[-1])[1])
    train(cfg, tmp_path)
    assert len(seen) == 8
    sentences = {text for one in seen for text in one}
    assert sentences & {f"a photo with a {digit}" for digit in range(10)}
    (row,) = csv.DictReader((tmp_path / "summary.csv").open())
    assert 0 < float(row["train_loss_contrastive"]) < float("inf")
    described = dense.read_config(tmp_path)
    assert described["model"]["kwargs"]["tokenizer"] == "clip"
    assert described["model"]["kwargs"]["class_names"] == described["label_names"]
    monkeypatch.setattr(mask2former, "find_tokenizer", None)
    model = dense.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert model.predict([torch.zeros(3, 40, 56)])[0]["panoptic"].shape == (40, 56)


def plain_maps(model, images, scales, flips):
    """Scores at several scales averaged, in so many words: sizes and resizing of mmsegmentation, padding."""
    mean, std = (torch.tensor(model.preprocessing[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    maps = []
    for image in images:
        total = 0
        for scale in scales:
            ratio = min(int(32 * scale) / HEIGHT, int(64 * scale) / WIDTH)
            height, width = int(HEIGHT * ratio + 0.5), int(WIDTH * ratio + 0.5)
            seen = F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)
            seen = (seen / 255 - mean) / std
            for flip in flips:
                view = seen.flip(3) if flip else seen
                divisor = model.size_divisor
                padded = F.pad(view, (0, -width % divisor, 0, -height % divisor))
                with torch.no_grad():
                    found = model.outputs(padded)
                scores = class_scores(model, found, padded.shape[2:], (height, width))
                total = total + (scores.flip(2) if flip else scores)
        maps.append(total.argmax(0))
    return maps


def class_scores(model, found, padded, frame):
    def resize(x, size):
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)

    if model.method == "upernet":
        return resize(found[..., : frame[0], : frame[1]], (HEIGHT, WIDTH)).softmax(1)[0]
    logits, masks = found
    masks = resize(masks, padded)[..., : frame[0], : frame[1]].sigmoid()
    return resize(torch.einsum("bqc,bqhw->bchw", logits.softmax(2)[..., :-1], masks), (HEIGHT, WIDTH))[0]


def miou(maps, truth, classes):
    """By sets of pixels."""
    ious = []
    for label in range(classes):
        wanted, found = truth == label, maps == label
        if (wanted | found).any():
            ious.append(float((wanted & found).sum() / (wanted | found).sum()))
    return 100 * sum(ious) / len(ious)


@pytest.mark.parametrize(
    ("name", "data", "flip"),
    [
        ("upernet_dinat_mini.ade20k", "ade20k", True),
        ("upernet_dinat_mini.ade20k", "ade20k", False),
        ("mask2former_dinat_large.cityscapes_semantic", "cityscapes", True),
    ],
)
def test_several_scales_are_those_of_a_plain_loop(published, root, monkeypatch, name, data, flip):
    """`test.multi_scale=true`: the maps, and mIoU of them."""
    scales, found = [0.5, 1.0, 1.75], []
    predict = dense.model.DenseModel.predict_views

    def spy(self, *args):
        found.append(predict(self, *args))
        return found[-1]

    monkeypatch.setattr(dense.model.DenseModel, "predict_views", spy)
    result, model = published(name, data, "test.multi_scale=true", f"test.scales={scales}", f"test.flip={flip}")
    folder = root / (f"{data}/images/validation" if data == "ade20k" else f"{data}/leftImg8bit/val")
    images = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(folder.rglob("*.*g"))]
    maps = plain_maps(model, images, scales, (False, True)[: 1 + flip])
    agree = torch.stack([(one["semantic"] == other).float().mean() for one, other in zip(found, maps, strict=True)])
    assert agree.min() > 0.999  # but for pixels at which two classes are equal up to rounding
    # the left half is of the first class, the right half of the second, which is the car of Cityscapes
    left, right = (0, 1) if data == "ade20k" else (0, 13)
    truth = torch.tensor([left, right]).repeat_interleave(WIDTH // 2).expand(len(maps), HEIGHT, WIDTH)
    assert result["miou"] == pytest.approx(miou(torch.stack(maps), truth, model.num_classes), abs=0.05)


@pytest.mark.parametrize(
    ("name", "data"),
    [("upernet_dinat_mini.ade20k", "ade20k"), ("mask2former_dinat_large.cityscapes_semantic", "cityscapes")],
)
def test_windows_are_averaged_where_they_overlap(name, data):
    """A view of 40 x 72 in windows of 32 at steps of 20: at 0 and 8, and at 0, 20, 40."""
    torch.manual_seed(0)
    row = dense.PUBLISHED[name]
    model = dense.create_model(name, **SMALL[row.method], backbone_kwargs=BACKBONE).eval()
    view = torch.randn(3, 40, 72)
    total, count = torch.zeros(model.num_classes, 40, 72), torch.zeros(40, 72)
    for top in (0, 8):
        for left in (0, 20, 40):
            with torch.no_grad():
                found = model.outputs(view[None, :, top : top + 32, left : left + 32])
            if row.method == "mask2former":
                masks = F.interpolate(found[1], size=(32, 32), mode="bilinear", align_corners=False).sigmoid()
                found = torch.einsum("bqc,bqhw->bchw", found[0].softmax(2)[..., :-1], masks)
            total[:, top : top + 32, left : left + 32] += found[0]
            count[top : top + 32, left : left + 32] += 1
    expected = F.interpolate((total / count)[None], size=(20, 36), mode="bilinear", align_corners=False)[0]
    found = model.predict_views([view], (20, 36), flip=False, window=(32, 20))["semantic"]
    assert (found == expected.argmax(0)).float().mean() > 0.998
    small = model.predict_views([view[:, :20, :24]], (20, 24), flip=False, window=(32, 20))["semantic"]
    assert torch.equal(small, model.predict([view[:, :20, :24]])[0]["semantic"])  # one window is the whole


@pytest.mark.parametrize("window", ["3", "[32]", "[32, 0]"])
def test_windows_that_cannot_be(published, window):
    with pytest.raises(
        UserError, match=r"test\.window=.*: must be a list \[side, step\] in pixels, such as \[512, 341\]"
    ):
        published("upernet_dinat_mini.ade20k", "ade20k", f"test.window={window}")


def test_several_scales_need_scores_of_pixels(published):
    with pytest.raises(UserError, match=r"test\.multi_scale=True: not with task=detection, only with task=semantic"):
        published("mask_rcnn_dinat_mini.coco", "coco", "test.multi_scale=true")
