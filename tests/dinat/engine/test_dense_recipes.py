"""The recipes of the published dense models, against tables of the numbers that their authors' configurations have."""

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dinat import dense
from dinat.data.dense_transforms import dense_train_transform
from dinat.engine.optim import create_optimizer, create_schedule
from dinat.engine.settings import check_settings
from dinat.tasks import find_task
from dinat.tasks.models import to_dict

EXPERIMENTS = Path(__file__).parents[3] / "configs" / "experiment"


class Recipe(NamedTuple):
    model: str
    task: str
    data: str
    drop_path: float
    lr: float
    dtype: str
    augment: str  # of AUGMENT
    schedule: str  # of SCHEDULES
    eval_every: int = 1
    keep_empty: bool = True
    pretrained: str = "backbone"


def recipes():
    """Recipe by the name of its experiment."""
    found = {}
    for backbone, drop_path in {
        "nat_mini": 0.2, "nat_tiny": 0.2, "nat_small": 0.35, "dinat_mini": 0.2, "dinat_tiny": 0.2, "dinat_small": 0.35,
        "dinat_s_tiny": 0.2, "dinat_s_small": 0.35,
    }.items():  # fmt: skip
        name = f"mask_rcnn_{backbone}"
        found[name] = Recipe(
            f"{name}.coco", "detection", "coco", drop_path, 1e-4, "bfloat16", "detector", "36 epochs", keep_empty=False
        )
    for backbone, (drop_path, lr) in {
        "nat_mini": (0.2, 1e-4), "nat_tiny": (0.3, 1e-4), "nat_small": (0.3, 1e-4), "nat_base": (0.5, 1e-4),
        "dinat_mini": (0.2, 1e-4), "dinat_tiny": (0.3, 1e-4), "dinat_small": (0.5, 1e-4), "dinat_base": (0.6, 7.5e-5),
        "dinat_large": (0.6, 7.5e-5), "dinat_s_tiny": (0.3, 1e-4), "dinat_s_small": (0.5, 1e-4),
        "dinat_s_base": (0.6, 7.5e-5), "dinat_s_large": (0.6, 5e-5),
    }.items():  # fmt: skip
        name, dtype = f"cascade_mask_rcnn_{backbone}", "float32" if backbone == "dinat_large" else "bfloat16"
        found[name] = Recipe(
            f"{name}.coco", "detection", "coco", drop_path, lr, dtype, "detector", "36 epochs", keep_empty=False
        )
    for backbone, drop_path in {
        "nat_mini": 0.2, "nat_tiny": 0.3, "nat_small": 0.5, "nat_base": 0.5, "dinat_mini": 0.2, "dinat_tiny": 0.3,
        "dinat_small": 0.5, "dinat_base": 0.5, "dinat_large": 0.3, "dinat_s_tiny": 0.3, "dinat_s_small": 0.3,
        "dinat_s_base": 0.3, "dinat_s_large": 0.3,
    }.items():  # fmt: skip
        name, dtype = f"upernet_{backbone}", "float32" if backbone == "dinat_large" else "bfloat16"
        size = 640 if backbone.endswith("large") else 512
        found[name] = Recipe(
            f"{name}.ade20k", "semantic", "ade20k", drop_path, 6e-5, dtype, f"upernet {size}", "160k linear", 12
        )
    coco, ade20k, cityscapes = ("jitter", "100 epochs", 1), ("crops 640", "160k", 4), ("crops cityscapes", "90k", 27)
    for name, task, data, recipe in (
        ("mask2former_dinat_large.coco_instance", "detection", "coco", coco),
        ("mask2former_dinat_large.coco_panoptic", "panoptic", "coco_panoptic", coco),
        ("mask2former_dinat_large.ade20k_instance", "detection", "ade20k", ade20k),
        ("mask2former_dinat_large.ade20k_panoptic", "panoptic", "ade20k", ade20k),
        ("mask2former_dinat_large.ade20k_semantic", "semantic", "ade20k", ade20k),
        ("mask2former_dinat_large.cityscapes_instance", "detection", "cityscapes", cityscapes),
        ("mask2former_dinat_large.cityscapes_panoptic", "panoptic", "cityscapes", cityscapes),
        ("mask2former_dinat_large.cityscapes_semantic", "semantic", "cityscapes", cityscapes),
        ("oneformer_dinat_large.ade20k", "panoptic", "ade20k", ade20k),
        ("oneformer_dinat_large_896.ade20k", "panoptic", "ade20k", ("crops 896", "160k", 4)),
        ("oneformer_dinat_large_1280.ade20k", "panoptic", "ade20k", ("crops 1280", "160k", 4)),
        ("oneformer_dinat_large_1280.coco_ft_ade20k", "panoptic", "ade20k", ("crops 1280", "160k", 4)),
        ("oneformer_dinat_large.cityscapes", "panoptic", "cityscapes", cityscapes),
        ("oneformer_dinat_large.coco", "panoptic", "coco_panoptic", coco),
        ("oneformer_dinat_large.mapillary", "panoptic", "mapillary", ("crops mapillary", "300k", 27)),
    ):
        found[name.replace(".", "_")] = Recipe(
            name, task, data, 0.3, 1e-4, "float32", *recipe,
            keep_empty=task != "detection" or data == "cityscapes",
            pretrained="oneformer_dinat_large.coco" if "coco_ft" in name else "backbone",
        )  # fmt: skip
    return found


RECIPES = recipes()
MM = ("mask_rcnn", "cascade_mask_rcnn", "upernet")

WIDE = {"shortest": [*range(480, 801, 32)], "longest": 1333, "resample": "bilinear"}


def upernet(size):
    return [
        {"resize": {"shortest": size, "longest": 4 * size, "scale": [0.5, 2.0], "resample": "bilinear"}},
        {"crop": {"size": size, "max_class_share": 0.75}},
        {"flip": {"p": 0.5}},
        {"photometric": {}},
        {"pad": {"size": size, "fill": [124, 116, 104]}},  # the mean, 123.675, 116.28, 103.53
    ]


def crops(base, longest, crop, padded=True):
    """What detectron2's configurations say as int(x * 0.1 * base) for x from 5 to 20."""
    steps = [
        {"resize": {"shortest": [int(x * 0.1 * base) for x in range(5, 21)], "longest": longest}},
        {"crop": {"size": crop}},
        {"photometric": {}},
        {"flip": {"p": 0.5}},
    ]
    return steps + [{"pad": {"size": crop, "fill": 128}}] * padded


AUGMENT = {
    "detector": [
        {"flip": {"p": 0.5}},
        {"one_of": [
            [{"resize": WIDE}],
            [{"resize": {**WIDE, "shortest": [400, 500, 600]}}, {"crop": {"range": [384, 600]}}, {"resize": WIDE}],
        ]},
    ],
    "upernet 512": upernet(512),
    "upernet 640": upernet(640),
    "jitter": [
        {"flip": {"p": 0.5}},
        {"resize": {"shortest": 1024, "longest": 1024, "scale": [0.1, 2.0]}},
        {"crop": {"size": 1024}},
        {"pad": {"size": 1024, "fill": 128}},
    ],
    "crops 640": crops(640, 2560, 640),
    "crops 896": crops(896, 3584, 896),
    "crops 1280": crops(1280, 5120, 1280),
    "crops cityscapes": crops(1024, 4096, [512, 1024], padded=False),
    "crops mapillary": crops(2048, 8192, 1024),
}  # fmt: skip

EPOCH = 1000  # updates of an epoch, here
# updates, and the learning rate at some of them as a share of the full one
SCHEDULES = {
    "36 epochs": (36 * EPOCH, {
        0: 0.001, 250: 0.001 + 0.999 / 2, 500: 1, 27 * EPOCH - 2: 1, 27 * EPOCH: 0.1, 33 * EPOCH - 2: 0.1,
        33 * EPOCH: 0.01, 36 * EPOCH - 1: 0.01,
    }),
    "160k linear": (160_000, {0: 1e-6, 750: 0.5, 1500: 1 - 1500 / 160e3, 80_000: 0.5, 159_999: 1 / 160e3}),
    "100 epochs": (737_500, {0: 1, 655_554: 1, 655_556: 0.1, 710_182: 0.1, 710_184: 0.01, 737_499: 0.01}),
    "160k": (160_000, {0: 1, 80_000: 0.5**0.9, 159_999: (1 / 160e3) ** 0.9}),
    "90k": (90_000, {0: 1, 45_000: 0.5**0.9, 89_999: (1 / 90e3) ** 0.9}),
    "300k": (300_000, {0: 1, 150_000: 0.5**0.9, 299_999: (1 / 300e3) ** 0.9}),
}  # fmt: skip


@cache
def build(method, backbone):
    """A published model with that backbone, without memory: names and modules are those of the others too."""
    name, row = next((n, r) for n, r in dense.PUBLISHED.items() if (r.method, r.backbone) == (method, backbone))
    texts = {"tokenizer": "clip", "class_names": row.classes.names} if method == "oneformer" else {}
    with torch.device("meta"):
        return dense.create_model(name, **texts)


def test_every_published_model_has_one():
    assert {recipe.model for recipe in RECIPES.values()} == set(dense.PUBLISHED)
    files = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
    assert {name for name in files if name.startswith(tuple(dense.METHODS))} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(compose, name):
    cfg, recipe = compose(f"experiment={name}", "data.root=/data"), RECIPES[name]
    check_settings(cfg)
    row = dense.PUBLISHED[recipe.model]
    assert set(cfg) == set(compose_defaults(compose))  # no misspelt section
    found = Recipe(
        cfg.model.name, cfg.task, cfg.data.name, cfg.model.drop_path_rate, cfg.optimizer.lr, cfg.runtime.dtype,
        recipe.augment, recipe.schedule, cfg.eval_every, cfg.data.kwargs.get("keep_empty", True), cfg.model.pretrained,
    )  # fmt: skip
    assert found == recipe
    assert (cfg.batch_size, cfg.ema.decay, cfg.seed, row.task) == (16, None, 0, recipe.task)
    assert recipe.data in find_task(recipe.task).readers
    steps = OmegaConf.to_container(cfg.augment.transform)
    assert steps == AUGMENT[recipe.augment]
    dense_train_transform(steps)
    assert cfg.data.eval_transform is None  # the published model's own

    optimizer = create_optimizer(cfg.optimizer, build(row.method, row.backbone))
    groups_are_as_published(optimizer, build(row.method, row.backbone), row.method, recipe.lr)
    last, rates = SCHEDULES[recipe.schedule]
    plain = create_optimizer({**cfg.optimizer, "no_decay": None, "lr_scale": {}}, nn.Linear(1, 1))
    schedule, epochs = create_schedule(cfg.scheduler, plain, EPOCH)
    assert round(epochs * EPOCH) == last
    for update, share in rates.items():
        schedule.step_update(update)
        # timm's warm-up leads to the full rate, mmsegmentation's to that of the falling line
        near = 0.01 if (recipe.schedule, update) == ("160k linear", 750) else 1e-6
        assert plain.param_groups[0]["lr"] == pytest.approx(recipe.lr * share, rel=near), update


@cache
def compose_defaults(compose):
    return compose()


def groups_are_as_published(optimizer, model, method, lr):
    """mm*: what has rpb or norm in its original name is not decayed. detectron2: norms and embeddings are not."""
    group = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    of_backbone = {id(parameter) for parameter in model.backbone.parameters()}
    modules = dict(model.named_modules())
    spared = 0
    for name, parameter in model.named_parameters():
        module, scale = modules[name.rpartition(".")[0]], 1.0
        if method in MM:  # heads have no such names there: tests/golden/dense/keys.json
            decayed = not (id(parameter) in of_backbone and re.search("rpb|norm", name))
            decay = 0.01 if method == "upernet" else 0.05
        else:
            decayed = not isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Embedding)
            decay, scale = 0.05, 0.1 if id(parameter) in of_backbone else 1.0
        own = group[id(parameter)]
        assert (own["weight_decay"], own["lr_scale"]) == (decay * decayed, scale), name
        spared += not decayed
    assert spared > 10
    defaults = optimizer.defaults
    assert type(optimizer).__name__ == "AdamW"
    assert (defaults["lr"], tuple(defaults["betas"]), defaults["eps"]) == (lr, (0.9, 0.999), 1e-8)


def test_names_of_the_original_heads_have_neither_rpb_nor_norm():
    keys = json.loads((Path(__file__).parents[2] / "golden" / "dense" / "keys.json").read_text())
    assert not [key for method in MM for key in keys[method] if re.search("rpb|norm", key)]


@pytest.mark.parametrize(
    ("name", "clip", "synchronized"),
    [
        ("mask_rcnn_nat_mini", None, True),
        ("upernet_dinat_mini", None, True),
        ("oneformer_dinat_large_coco", 0.01, False),
    ],
)
def test_clipping_and_batch_norm(compose, name, clip, synchronized):
    cfg = compose(f"experiment={name}", "data.root=/data")
    assert (cfg.optimizer.clip_grad, cfg.optimizer.clip_mode) == (clip, "norm")
    assert (cfg.runtime.sync_batchnorm, cfg.runtime.compile) == (synchronized, False)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("oneformer")])
def test_tasks_and_texts_of_oneformer(compose, name):
    """Texts are CLIP's, and tasks are drawn by TASK_PROB, cumulated: never the panoptic one of Mapillary Vistas."""
    cfg = compose(f"experiment={name}", "data.root=/data")
    model = build("oneformer", dense.PUBLISHED[RECIPES[name].model].backbone)
    kwargs = to_dict(cfg.model.kwargs)
    semantic, instance = (0.5, 1.0) if name.endswith("mapillary") else (0.33, 0.66)
    shares = kwargs.pop("task_shares", model.task_shares)
    assert torch.tensor(shares).cumsum(0).tolist() == pytest.approx([semantic, instance, 1])
    assert kwargs == {"tokenizer": "clip"}
    config = model.network.config
    assert (config.text_encoder_width, config.text_encoder_num_layers, config.text_encoder_n_ctx) == (256, 6, 16)
    assert (config.contrastive_weight, config.contrastive_temperature) == (0.5, 0.07)


@pytest.mark.parametrize(
    "experiment", ["mask_rcnn_dinat_tiny", "upernet_dinat_mini", "mask2former_dinat_large_coco_instance"]
)
def test_ones_own_data_in_the_place_of_the_published(compose, experiment):
    """One command: data=... leaves nothing of the published data behind."""
    data = {"semantic": "masks", "detection": "coco"}[RECIPES[experiment].task]
    cfg = compose(f"experiment={experiment}", "model.pretrained=true", f"data={data}", "data.root=mine")
    assert (cfg.data.name, cfg.data.root, cfg.data.num_classes) == (data, "mine", None)
    assert (cfg.model.name, cfg.model.pretrained) == (RECIPES[experiment].model, True)
