"""What the `data` and `augment` sections do to an image and to a batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import Mixup

from dinat.data import Augment, Normalize, eval_transform, resolve_preprocessing, train_transform

CPU = torch.device("cpu")
SIZE = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture(scope="module")
def picture():
    """32x48 pixels, red rising to the right and green downwards, so that a colour tells where it was."""
    rows, columns = np.mgrid[0:32, 0:48]
    return Image.fromarray(np.stack([columns * 5, rows * 7, np.full_like(rows, 40)], axis=2).astype(np.uint8))


@pytest.fixture(scope="module")
def section(request):
    """A section of a composed training configuration."""
    from hydra import compose, initialize_config_module

    def section(name, *overrides):
        with initialize_config_module("dinat.configs", version_base="1.3"):
            return compose("train", [*overrides])[name]

    return section


def array(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


# ---- evaluation ----


class Sized(torch.nn.Module):
    pretrained_cfg = {  # noqa: RUF012
        "input_size": (3, 20, 20), "mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic", "crop_pct": 0.8,
        "crop_mode": "center",
    }  # fmt: skip


def test_preprocessing_is_the_models_unless_set(section):
    found = resolve_preprocessing(section("data", "data=folder"), Sized())
    assert found == {**Sized.pretrained_cfg}
    options = ("data.img_size=[8,12]", "data.mean=[0,0.1,0.2]", "data.std=[1,2,3]", "data.interpolation=nearest")
    options += ("data.crop_pct=0.5", "data.crop_mode=squash")
    found = resolve_preprocessing(section("data", "data=folder", *options), Sized(), 99)
    assert {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in found.items()} == {
        "input_size": (3, 8, 12), "mean": (0, 0.1, 0.2), "std": (1, 2, 3), "interpolation": "nearest", "crop_pct": 0.5,
        "crop_mode": "squash",
    }  # fmt: skip
    assert resolve_preprocessing(section("data", "data.img_size=7"), Sized())["input_size"] == (3, 7, 7)
    assert resolve_preprocessing(section("data", "data=folder"), Sized(), 99)["input_size"] == (3, 99, 99)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_resized_by_its_shorter_side_and_cropped(section, picture, interpolation):
    """16 pixels are half of what the shorter side becomes at crop_pct 0.5: no resizing of 32 rows; at 1.0 by Pillow."""
    options = ("data=folder", "data.img_size=16", "data.mean=[0,0,0]", "data.std=[1,1,1]", "data.crop_mode=center")
    options += (f"data.interpolation={interpolation}",)
    half = eval_transform(resolve_preprocessing(section("data", *options, "data.crop_pct=0.5"), Sized()))
    assert torch.equal(torch.as_tensor(half(picture)), array(picture.crop((16, 8, 32, 24))))
    whole = eval_transform(resolve_preprocessing(section("data", *options, "data.crop_pct=1.0"), Sized()))
    small = picture.resize((24, 16), getattr(Image.Resampling, interpolation.upper()))
    assert torch.equal(torch.as_tensor(whole(picture)), array(small.crop((4, 0, 20, 16))))


def test_squashed(section, picture):
    options = ("data=folder", "data.img_size=16", "data.crop_pct=1.0", "data.crop_mode=squash")
    options += ("data.interpolation=bilinear",)
    squash = eval_transform(resolve_preprocessing(section("data", *options), Sized()))
    assert torch.equal(torch.as_tensor(squash(picture)), array(picture.resize((16, 16), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalised_per_channel(channels_last):
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)  # 0.2
    preprocessing = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 0.1)}
    found = Normalize(preprocessing, CPU, channels_last)(images)
    expected = torch.tensor([0.2, 0.0, -1.0])[:, None, None].expand(2, 3, 4, 4)
    torch.testing.assert_close(found, expected, check_stride=False)
    assert found.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert (images == 51).all()


# ---- training, an image ----


def transform(section, *overrides):
    return train_transform(SIZE, dict(section("augment", *overrides).transform))


def test_no_augmentation_is_the_whole_image(section, picture):
    plain = torch.as_tensor(transform(section, "augment=none", "augment.transform.no_aug=true")(picture))
    assert torch.equal(plain, torch.as_tensor(transform(section, "augment=none")(picture)))
    assert torch.equal(plain, array(picture.resize((16, 16), Image.Resampling.BILINEAR)))


LIGHT = ("augment=light", "augment.transform.ratio=[1,1]", "augment.transform.scale=[0.25,0.25]")


def test_scale_and_ratio_of_the_crop(section, picture):
    """A quarter of 32x48 pixels as a square has a side of 19.6, as one twice as wide 27.7 x 13.9."""
    for ratio, width, height in ((1, 19.6, 19.6), (2, 27.7, 13.9)):
        crop = transform(section, *LIGHT, f"augment.transform.ratio=[{ratio},{ratio}]")
        for _ in range(3):
            red, green, _ = torch.as_tensor(crop(picture)).float()
            assert (red.max() - red.min()) / 5 * 16 / 15 == pytest.approx(width, abs=1.8)
            assert (green.max() - green.min()) / 7 * 16 / 15 == pytest.approx(height, abs=1.8)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_mirrored(section, picture, flip):
    red = torch.as_tensor(transform(section, *LIGHT, f"augment.transform.hflip={flip}")(picture))[0].float()
    assert (red[:, -1].mean() < red[:, 0].mean()) == bool(flip)


def test_interpolation_of_the_crop(section):
    """A picture of two shades keeps them under `nearest` alone."""
    checkered = Image.fromarray((np.indices((40, 40)).sum(0) % 2 * 255).astype(np.uint8))
    checkered = checkered.convert("RGB")
    for interpolation, pure in (("nearest", True), ("bilinear", False)):
        crop = transform(section, *LIGHT, f"augment.transform.interpolation={interpolation}")
        assert (set(torch.as_tensor(crop(checkered)).unique().tolist()) <= {0, 255}) == pure


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (("augment.transform.color_jitter=null",), False),
        (("augment.transform.color_jitter=0.9",), True),
        (("augment.transform.color_jitter=null", "+augment.transform.auto_augment=rand-m9-n3-inc1"), True),
    ],
)
def test_colours(section, options, changed):
    """Crops of one grey are that grey, unless colours are changed (or, at worst, shifted out of the picture)."""
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    jitter = transform(section, *LIGHT, *options)
    found = {torch.as_tensor(jitter(grey)).float().mean().item() for _ in range(8)}
    assert (found != {100.0}) == changed


# ---- training, a batch ----


def augment(section, *overrides):
    return Augment(section("augment", "augment=none", *overrides), 4, CPU)


def batch():
    images = torch.arange(4.0).add(1)[:, None, None, None].expand(4, 3, 32, 32).contiguous()
    return images, torch.arange(4)


def test_nothing_is_done_by_default(section):
    images, targets = augment(section)(*batch())
    assert torch.equal(images, batch()[0])
    assert torch.equal(targets, batch()[1])


@pytest.mark.parametrize(("mode", "shades"), [("const", 1), ("rand", 3), ("pixel", 300)])
def test_erasing(section, mode, shades):
    """A rectangle of each image, filled with zeros, one colour or noise."""
    images, _ = augment(section, "augment.erasing.prob=1", f"augment.erasing.mode={mode}")(*batch())
    erased = images != batch()[0]
    for image, where in zip(images, erased.any(1), strict=True):
        rows, columns = where.nonzero(as_tuple=True)
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert where.sum() >= area - 3  # a rectangle; noise may by chance be what it replaces
        assert 0.02 * 1024 * 0.7 <= area <= 1024 / 3 * 1.2
        filled = image[:, where]
        assert (filled == 0).all() == (mode == "const")
        assert min(shades, filled.numel() - 3) <= max(len(filled.unique()), 1) <= (3 if shades < 10 else 1e9)


def test_erasing_probability_and_count(section, monkeypatch):
    import random

    asked = []
    monkeypatch.setattr(random, "randint", lambda low, high: asked.append((low, high)) or low)
    erase = augment(section, "augment.erasing.prob=0.5", "augment.erasing.count=3", "augment.erasing.mode=const")
    monkeypatch.setattr(random, "random", iter([0.4, 0.6, 0.49, 0.51]).__next__)
    images, _ = erase(*batch())
    assert [bool((image == 0).any()) for image in images] == [True, False, True, False]
    assert (1, 3) in asked


def test_mixup(section):
    """Each image with that at the other end of the batch, by one share that the targets state."""
    images, targets = augment(section, "augment.mixup.mixup_alpha=1", "augment.smoothing=0.2")(*batch())
    share = (targets[0, 0] - 0.05).item() / 0.8
    for index, image in enumerate(images):
        torch.testing.assert_close(image, torch.full_like(image, share * (index + 1) + (1 - share) * (4 - index)))
        expected = torch.full((4,), 0.05)
        expected[index] += 0.8 * share
        expected[3 - index] += 0.8 * (1 - share)
        torch.testing.assert_close(targets[index], expected)


def test_cutmix(section):
    images, targets = augment(section, "augment.mixup.cutmix_alpha=1")(*batch())
    for index, image in enumerate(images):
        assert set(image.unique().tolist()) <= {index + 1.0, 4.0 - index}
        torch.testing.assert_close(targets[index, index], (image == index + 1).float().mean())


def test_mixup_or_cutmix_by_probability(section):
    both = ("augment.mixup.mixup_alpha=1", "augment.mixup.cutmix_alpha=1")
    kinds = {
        probability: {
            bool((images == images.round()).all())
            for images, _ in (
                augment(section, *both, f"augment.mixup.switch_prob={probability}")(*batch()) for _ in range(4)
            )
        }
        for probability in (0.0, 1.0)
    }
    assert kinds == {0.0: {False}, 1.0: {True}}  # cutmix leaves whole numbers
    images, targets = augment(section, *both, "augment.mixup.prob=0", "augment.smoothing=0.2")(*batch())
    assert torch.equal(images, batch()[0])
    torch.testing.assert_close(targets, 0.8 * torch.eye(4) + 0.05)


@pytest.mark.parametrize(("mode", "shares"), [("batch", 1), ("elem", 2)])
def test_mixup_share_by_batch_or_image(section, mode, shares):
    _, targets = augment(section, "augment.mixup.mixup_alpha=1", f"augment.mixup.mode={mode}")(*batch())
    found = {round(targets[index, index].item(), 5) for index in range(4)}
    assert (len(found) == 1) == (shares == 1)


def test_labels_are_smoothed_once(section):
    """By mixup where it is on, by the loss elsewhere."""
    assert augment(section, "augment.smoothing=0.2").smoothing == 0.2
    for kind in ("mixup", "cutmix"):
        mixing = augment(section, "augment.smoothing=0.2", f"augment.mixup.{kind}_alpha=0.5")
        assert mixing.smoothing == 0.0
        assert isinstance(mixing.mixup, Mixup)
