"""Folders, archives, shards and images as they are found: used rightly, or named."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dinat.data import (
    IGNORE,
    ImageError,
    TrainLoader,
    class_to_idx,
    eval_loader,
    open_image,
    open_split,
    resolve_preprocessing,
)
from dinat.data import images as reading
from dinat.data.class_folders import natural_key
from dinat.distributed import World
from dinat.engine import evaluate, train
from dinat.errors import UserError
from dinat.tasks.classification import Classification

GREY = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4, 1)))  # its mean is 127.5
SIZE = (3, 8, 8)


@pytest.fixture
def put(tmp_path):
    """Writes a small image for each path below tmp_path; other contents where given."""

    def put(*paths, content=None):
        for path in paths:
            path = tmp_path / path
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                Image.new("RGB", (8, 8), (len(path.name), 0, 0)).save(path, "PNG")
            else:
                path.write_bytes(content)

    return put


@pytest.fixture
def opened(compose, tmp_path):
    """Opens a split of tmp_path; returns {file name: class name}."""

    def opened(split="train", class_map=None, *overrides):
        source = open_split(
            compose("data=folder", f"data.root={tmp_path}", *overrides).data, split, class_map=class_map
        )
        names = {index: name for name, index in class_to_idx(source).items()}
        return {source.filename(index): names[target] for index, (_, target) in enumerate(source.reader.samples)}

    return opened


def pack(folder):
    """The folder as a .tar file beside it, with itself around everything; the folder is gone."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(folder, arcname=folder.name)
    folder.rename(folder.with_name("unpacked"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_class_is_the_first_folder_below_the_split(put, opened, tmp_path, packed):
    put("train/cat/front/1.png", "train/dog/front/1.png", "train/dog/2.png", "validation/dog/front/left/3.png")
    (tmp_path / "train" / "notes").mkdir()
    if packed:
        (tmp_path / "train" / "notes").rmdir()
        pack(tmp_path / "train")
    else:
        with pytest.raises(UserError, match="notes holds no images"):
            opened()
        (tmp_path / "train" / "notes").rmdir()
    found = opened()
    expected = {"cat/front/1.png": "cat", "dog/2.png": "dog", "dog/front/1.png": "dog"}
    assert {name.removeprefix("train/"): label for name, label in found.items()} == expected
    assert opened("validation", {"cat": 0, "dog": 1}) == {"dog/front/left/3.png": "dog"}
    put("validation/bird/x.png")
    with pytest.raises(UserError, match=r"validation/bird is not among the 2 training classes, so its images"):
        opened("validation", {"cat": 0, "dog": 1})


def test_archives_in_archives_are_folders(put, opened, compose, tmp_path):
    """ImageNet-1k's own archive."""
    put("cat/1.png", "cat/2.png", "dog/1.png")
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for name in ("cat", "dog"):
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for path in (tmp_path / name).iterdir():
                    inner.add(path, arcname=path.name)
            outer.add(tmp_path / f"{name}.tar", arcname=f"{name}.tar")
    assert opened() == {"cat/1.png": "cat", "cat/2.png": "cat", "dog/1.png": "dog"}
    source = open_split(compose("data=folder", f"data.root={tmp_path}").data, "train")
    for index, (name, _) in enumerate(source.reader.samples):
        file, _ = source.reader[index]
        assert file.read() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_archives_are_refused(put, opened, tmp_path, kind):
    """Left out, the only image of dog would take its class along."""
    put("train/cat/1.png")
    pack(tmp_path / "train")
    link = tarfile.TarInfo("train/dog/1.png")
    link.type, link.linkname = kind, "train/cat/1.png"
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        archive.addfile(link)
    with pytest.raises(UserError, match=r"train/dog/1\.png in an archive is a link .* tar --dereference"):
        opened()


@pytest.mark.parametrize("kept", [0, 300])  # bytes after the fourth image; tarfile itself refuses half an image
@pytest.mark.parametrize("inner", [False, True])
def test_archives_that_end_early_are_refused(put, opened, tmp_path, kept, inner):
    with tarfile.open(tmp_path / "cat.tar", "w") as archive:
        for index in range(9):
            member = tarfile.TarInfo(f"cat/{index}.png")
            member.size = 512
            archive.addfile(member, io.BytesIO(bytes(512)))
    cut = (tmp_path / "cat.tar").read_bytes()[: 4 * 1024 + kept]
    put("cat.tar" if inner else "train.tar", content=cut)
    if inner:
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            archive.add(tmp_path / "cat.tar", arcname="cat.tar")
    with pytest.raises(UserError, match=r"ends early, after .*cat/3\.png"):
        opened()


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_names_are_no_data_and_stray_images_are_refused(put, opened, tmp_path, packed):
    put("train/cat/1.png", "train/cat/._1.png", "train/.ipynb_checkpoints/x.png", "train/__MACOSX/cat/1.png")
    put("train/cat/.cache/y.png")
    (tmp_path / "train" / ".empty").mkdir()
    if packed:
        pack(tmp_path / "train")
    assert opened() == {"cat/1.png": "cat"}
    if not packed:
        put("train/stray.png")
        with pytest.raises(UserError, match=r"beside the class folders .* have no class \(1 of 2\): stray\.png\. Move"):
            opened()


def test_links_are_followed_once(put, opened, tmp_path):
    put("train/cat/1.png", "elsewhere/2.png", "elsewhere/below/3.png")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "cat" / "all").symlink_to("..")  # which has no end
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    assert opened() == {"cat/1.png": "cat", "dog/2.png": "dog", "dog/below/3.png": "dog"}


def test_a_folder_that_cannot_be_read_is_not_passed_over(put, opened, tmp_path, monkeypatch):
    put("train/cat/1.png", "train/cat/mine/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("mine"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"data\.root=.*cannot be opened: .*Permission denied: '.*train/cat/mine'"):
        opened()


def test_whatever_pillow_opens_is_an_image_and_the_rest_is_told(put, opened, tmp_path, caplog, dinat, monkeypatch):
    endings = ("png", "jpg", "webp", "bmp", "tif", "gif", "PPM")
    for ending in endings:
        path = tmp_path / "train" / "cat" / f"x.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    put("train/cat/a.txt", "train/cat/b.txt", "train/cat/README", content=b"words")
    with caplog.at_level("INFO", "dinat"):
        assert set(opened()) == {f"cat/x.{ending}" for ending in endings}
    told = "3 files are left out as no image: 2 .txt, 1 without ending"
    assert told in caplog.text
    network = stand_in_model()
    monkeypatch.setattr("dinat.commands.predict.load", lambda *_: network)
    status, out, err = dinat("predict", tmp_path / "train", "--format", "csv", "--top", 1)
    assert (status, out.count("cat/x.")) == (0, len(endings))
    assert told in err


def stand_in_model():
    return timm.create_model("stand_in", num_classes=10).eval()


@pytest.mark.parametrize("scaled", ["I;16", "I", "F", "F of 1", "I of 8 bits", "F of 8 bits"])
def test_deeper_images_are_scaled_to_8_bits(tmp_path, scaled):
    values = np.asarray(GREY)
    deeper = {
        "I;16": values.astype(np.uint16) * 256 + 17,
        "I": values.astype(np.int32) * 256,
        "F": values.astype(np.float32) * 40 - 3000,  # its own range
        "F of 1": values.astype(np.float32) / 255,
        "I of 8 bits": values.astype(np.int32),
        "F of 8 bits": values.astype(np.float32),
    }[scaled]
    path = tmp_path / ("x.png" if scaled == "I;16" else "x.tif")
    Image.fromarray(deeper).save(path)
    assert Image.open(path).mode == scaled.split()[0]
    assert np.array_equal(open_image(path, channels=1), values)
    assert np.asarray(open_image(path)).mean() == 127.5


@pytest.mark.parametrize(("highest", "said"), [(4095, True), (65535, False), (0, False)])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_images_of_few_bits_are_dark_and_said_so_once(tmp_path, caplog, kind, highest, said):
    reading._mention_dark.cache_clear()
    Image.fromarray(np.array([[0, highest]], kind)).save(tmp_path / "x.tif")
    for _ in range(2):
        assert np.asarray(open_image(tmp_path / "x.tif", channels=1)).tolist() == [[0, highest // 256]]
    message = "an image of 16 bits uses 12, so it is nearly black here, as in OpenCV. Scale such images."
    assert caplog.messages == [message] * said


def test_torchvisions_folders_are_opened_alike(compose, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split / "a").mkdir(parents=True)
    Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257).save(tmp_path / "train" / "a" / "1.png")
    Image.new("RGBA", (256, 4)).save(tmp_path / "train" / "a" / "2.png")  # black under alpha 0
    source = open_split(compose("data=folder", "data.name=torch/image_folder", f"data.root={tmp_path}").data, "train")
    options = {"rank": 0, "ranks": 1, "workers": 0, "pin_memory": False}
    ((images, *_),) = eval_loader(source, pixels, (3, 4, 256), batch_size=2, **options)
    assert [image.float().mean() for image in images] == [127.5, 255]


def test_a_float_that_is_not_finite_is_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="not finite"):
        open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_pixels_lie_on_white(tmp_path, mode):
    """What is stored under them, black here, does not appear; half of it half."""
    path = tmp_path / "x.png"
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (3, 1))
        for x, alpha in enumerate((0, 51, 255)):
            image.putpixel((x, 0), (*[0] * (len(mode) - 1), alpha))
        image.save(path)
        expected = [255, 204, 0]
    else:
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
        if mode == "P":
            image.putpalette([0, 0, 0, 9, 9, 9, 7, 7, 7])
        image.save(path, transparency=0)
        expected = [255, 9, 7] if mode == "P" else [255, 1, 2]
    assert np.array_equal(open_image(path), np.repeat(expected, 3).reshape(1, 3, 3))
    assert np.array_equal(open_image(path, channels=1), [expected])


@pytest.mark.parametrize("upright", [False, True])
def test_orientation_is_a_choice_everywhere(tiny, tmp_path, monkeypatch, dinat, upright):
    left_bright = Image.new("L", (8, 8))
    left_bright.paste(200, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    for name in ("train/a/0", "train/b/1", "validation/a/2"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        left_bright.save(path, exif=exif)
    cfg = tiny(
        "model.name=stand_in", "model.kwargs=null", "data.img_size=8", "augment=none", "data.crop_pct=1",
        f"data.root={tmp_path}", f"data.exif_transpose={upright}", "runtime.workers=0",
    )  # fmt: skip
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[slice(4) if upright else slice(None), slice(None) if upright else slice(4)] = 200
    task = Classification(cfg.data, cfg.model, cfg.runtime, World(torch.device("cpu")))
    task.open(seed=0, batch_size=1)
    task.build_model()
    for images, *_ in (
        next(iter(task.eval_loader(1))),
        next(task.train_loader(cfg.augment, batch_size=1, parts=1, seed=0).batches(0)),
    ):
        assert torch.equal(images[0, 1], expected)
    network, seen = stand_in_model(), []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    monkeypatch.setattr("dinat.commands.predict.load", lambda *_: network)
    assert dinat("predict", tmp_path / "train", *["--exif-transpose"] * upright)[0] == 0
    assert torch.equal(((seen[0][0, 1] / 2 + 0.5) * 255).round(), expected.float())


DAMAGED = (3, 20)  # of 37 images


@pytest.fixture(scope="module")
def damaged(digits_folder, tmp_path_factory):
    """The digits with two validation and two training images that are none, in three kinds of store."""
    webdataset = pytest.importorskip("webdataset")
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("damaged")
    (root / "wds").mkdir()
    (root / "hf").mkdir()
    for split in ("train", "validation"):
        rows = [
            {"image": {"bytes": b"damaged" if index in DAMAGED else path.read_bytes(), "path": None}, "label": label}
            for index, path in enumerate(sorted((digits_folder / split).rglob("*.png")))
            for label in [int(path.parent.name)]
        ]
        for shard in range(2):
            with webdataset.TarWriter(str(root / "wds" / f"{split}-{shard}.tar")) as writer:
                for index, row in list(enumerate(rows))[shard::2]:
                    key, label = f"{index:04d}", str(row["label"]).encode()
                    writer.write({"__key__": key, "png": row["image"]["bytes"], "cls": label})
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
        datasets.Dataset.from_list(rows, features=features).to_parquet(root / "hf" / f"{split}.parquet")
    datasets.disable_progress_bars()
    hugging_face = [f"data.root={root}/cache", "data.num_classes=10"]
    return {
        "webdataset": [
            "data=webdataset", f"data.root={root}/wds", "data.num_classes=10",
            "data.train_split='train-{0..1}.tar|120'", "data.val_split='validation-{0..1}.tar|37'",
        ],
        "hf": ["data=hf", f"data.name=hfds/{root}/hf", *hugging_face],
        "hf_stream": [
            "data=hf_stream", f"data.name=hfids/{root}/hf", *hugging_face, "data.train_samples=120",
            "data.val_samples=37",
        ],
    }  # fmt: skip


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["webdataset", "hf", "hf_stream"])
def test_damaged_images_are_named_and_counted_by_every_reader(damaged, compose, kind):
    data = compose(*damaged[kind]).data
    options = {"rank": 0, "ranks": 1, "workers": 1, "pin_memory": False}
    batches = list(eval_loader(open_split(data, "validation"), pixels, SIZE, batch_size=8, **options))
    targets = torch.cat([targets for _, targets, _ in batches])
    problems = sorted(line for *_, lines in batches for line in lines)
    names = {"webdataset": ("validation-0.tar: 0020", "validation-1.tar: 0003")}.get(kind, ("image 20", "image 3"))
    assert [line.split("/")[-1] for line in problems] == [f"{name}: cannot identify image file" for name in names]
    assert (len(targets), int((targets != IGNORE).sum())) == (37, 35)
    loader = TrainLoader(
        open_split(data, "train", batch_size=40), pixels, SIZE, batch_size=40, parts=1, seed=0, **options
    )
    batches = list(loader.batches(0))
    assert [len(targets) for _, targets, _ in batches] == [40, 40, 40]  # others in their place
    assert all((targets != IGNORE).all() for _, targets, _ in batches)
    assert len({line for *_, lines in batches for line in lines}) == 2


@pytest.mark.parametrize("kind", ["webdataset", "hf_stream"])
def test_the_policy_holds_for_streams(damaged, tiny, evaluate_stand_in, kind):
    skipped = evaluate_stand_in(*damaged[kind])
    assert (skipped["count"], skipped["skipped"]) == (35, 2)
    with pytest.raises(UserError, match=r"unreadable image .*: cannot identify image file\. Repair it, or set"):
        evaluate_stand_in(*damaged[kind], "data.on_bad_image=fail")


@pytest.mark.parametrize("cut", [4700, 7000])  # in a header, in an image
def test_a_shard_cut_short_is_named_and_a_label_must_be_a_number(evaluate_stand_in, tmp_path, cut):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x-0.tar")) as writer:
        for index in range(4):
            picture = io.BytesIO()
            GREY.resize((8, 8)).save(picture, "PNG")
            writer.write({"__key__": f"{index}", "png": picture.getvalue(), "cls": b"cat" if index == 3 else b"1"})
    whole = (tmp_path / "x-0.tar").read_bytes()
    (tmp_path / "x-1.tar").write_bytes(whole[:cut])
    shards = ("data=webdataset", f"data.root={tmp_path}", "data.num_classes=10", "data.val_split='x-{0..1}.tar|8'")
    result = evaluate_stand_in(*shards)
    assert result["count"] == 4
    assert result["skipped"] >= 2
    with pytest.raises(UserError, match=r"x-0\.tar: 3: its label is no number"):
        evaluate_stand_in(*shards, "data.on_bad_image=fail")
    with pytest.raises(UserError, match=r"x-1\.tar: the shard cannot be read to its end"):
        evaluate_stand_in(*shards, "data.val_split='x-{1..1}.tar|4'", "data.on_bad_image=fail")


@pytest.fixture
def evaluate_stand_in(evaluation, tmp_path):
    """Evaluates the stand-in on a data set."""
    torch.save(stand_in_model().state_dict(), tmp_path / "weights.pth")

    def run(*overrides):
        options = (f"checkpoint={tmp_path}/weights.pth", "model.name=stand_in", f"output={tmp_path}", "batch_size=8")
        return evaluate(evaluation(*options, "runtime.workers=1", *overrides))

    return run


def test_names_sort_naturally_and_none_is_refused(put, opened, compose, tmp_path):
    names = ["5²", "10", "9", "²", "٣", "x"]
    put(*(f"train/{name}/1.png" for name in names))
    assert set(opened().values()) == set(names)
    assert sorted(["b10", "b9", "B1", "b²"], key=natural_key) == ["B1", "b9", "b10", "b²"]


def test_names_that_look_alike_are_told_apart(put, opened, tmp_path):
    composed, decomposed = "caf\xe9", "cafe\u0301"
    put(f"train/{composed}/1.png", f"validation/{decomposed}/1.png")
    with pytest.raises(UserError, match=r"looks like another class.*'cafe\\u0301' here, 'caf\\xe9' there"):
        opened("validation", {composed: 0})
    put(f"train/{decomposed}/1.png")
    with pytest.raises(UserError, match=r"looks like another class.*Rename one"):
        opened()


def test_long_images_and_bombs_are_bad_images(put, opened, compose, tmp_path, monkeypatch):
    put("train/cat/good.png")
    Image.new("L", (1201, 12)).save(tmp_path / "train" / "cat" / "long.png")
    Image.new("L", (12, 1201)).save(tmp_path / "train" / "cat" / "tall.png")
    Image.new("L", (1200, 12)).save(tmp_path / "train" / "cat" / "fits.png")
    Image.new("L", (200, 100)).save(tmp_path / "train" / "cat" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)  # Pillow warns above, and refuses twice as many
    source = open_split(compose("data=folder", f"data.root={tmp_path}").data, "train")
    options = {"rank": 0, "ranks": 1, "workers": 0, "pin_memory": False}

    def small(image):
        return pixels(image.resize((8, 8)))

    with pytest.warns(Image.DecompressionBombWarning):
        ((_, targets, problems),) = eval_loader(source, small, SIZE, batch_size=8, **options)
    assert int((targets != IGNORE).sum()) == 2
    assert any("long.png: 1201 x 12 pixels; one side may be 100 times the other" in line for line in problems)
    assert any("tall.png: 12 x 1201 pixels" in line for line in problems)
    assert any("bomb.png: Image size (20000 pixels) exceeds limit" in line for line in problems)


def test_a_models_channels_decide_how_images_are_opened(tiny, evaluation, tmp_path):
    cfg = tiny("+model.kwargs.in_chans=1", "scheduler.epochs=1", "scheduler.warmup_epochs=0", "augment=imagenet")
    top1 = train(cfg, tmp_path / "run")
    assert evaluate(evaluation(f"checkpoint={tmp_path}/run", f"output={tmp_path}"))["top1"] == round(top1, 4)
    exported = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True)
    preprocessing = resolve_preprocessing({}, exported)
    assert preprocessing["input_size"] == (1, 16, 16)
    assert preprocessing["mean"] == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    with pytest.raises(UserError, match=r"model\.kwargs\.in_chans=2: images have 1 channel \(grey\) or 3"):
        train(tiny("+model.kwargs.in_chans=2"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_predict_gives_what_can_be_read(put, tmp_path, dinat, monkeypatch):
    network = stand_in_model()
    monkeypatch.setattr("dinat.commands.predict.load", lambda *_: network)
    put("a.png", "b.png", "d.png")
    cut = (tmp_path / "b.png").read_bytes()[:40]
    put("b.png", content=cut)
    Image.new("L", (200, 100)).save(tmp_path / "c.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    for batch_size in (1, 2, 16):
        command = ("predict", tmp_path, "--format", "csv", "--top", 1, "--batch-size", batch_size)
        status, out, err = dinat(*command)
        assert status == 2
        assert [line.split(",")[0] for line in out.splitlines()[1:]] == [f"{tmp_path}/a.png", f"{tmp_path}/d.png"]
        assert f"{tmp_path}/b.png: " in err
        assert f"{tmp_path}/c.png: Image size (20000 pixels) exceeds limit" in err
        assert "error: 2 of 4 images cannot be read and have no results." in err


def test_a_model_that_cannot_take_the_images_is_named(tiny, digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "3" / "notes.txt").write_text("a line in the log")
    cfg = tiny("model.name=halonet26t", "model.kwargs=null", "data.img_size=64", f"data.root={tmp_path}/data")
    with pytest.raises(
        UserError, match=r"data\.img_size=64: halonet26t cannot take it: .*block_size.* It was made for 256 pixels"
    ):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["convnext_atto", "focalnet_tiny_srf", "maxvit_rmlp_pico_rw_256"])
def test_other_families_are_built_by_the_same_command(compose, name):
    """The default job's model.kwargs.img_size, which is for our models, is no obstacle."""
    cfg = compose(f"model.name={name}", "data.img_size=64", "runtime.device=cpu")
    assert "img_size" in cfg.model.kwargs
    task = Classification(cfg.data, cfg.model, cfg.runtime, World(torch.device("cpu")))
    task.open(seed=0, batch_size=2)
    model = task.build_model()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert model.training


def test_a_model_of_one_image_size_is_built_for_that_of_the_data(compose, evaluation, digits_folder, tmp_path):
    cfg = compose(
        "data=folder", f"data.root={digits_folder}", "data.img_size=64", "augment=light", "batch_size=120",
        "model.name=swin_tiny_patch4_window7_224", "scheduler.epochs=1", "scheduler.warmup_epochs=0",
        "+model.kwargs={embed_dim: 8, depths: [1, 1], num_heads: [1, 1]}", "runtime.device=cpu",
    )  # fmt: skip
    top1 = train(cfg, tmp_path)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True)(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    for weights in ("last.pt", "model.safetensors"):
        again = evaluate(evaluation(f"checkpoint={tmp_path}/{weights}", f"output={tmp_path}"))
        assert again["top1"] == round(top1, 4)
