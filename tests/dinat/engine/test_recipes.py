"""The published recipes: which models they cover, and that they are what the papers say."""

import json
from pathlib import Path

import pytest
import timm
import torch

from dinat import dense
from dinat.engine.optim import create_optimizer, create_schedule
from dinat.engine.settings import check_settings
from dinat.tasks.models import to_dict

EXPERIMENTS = Path(__file__).parents[3] / "configs" / "experiment"
OURS = {"digits", "folder", "finetune", "detection", "semantic", "panoptic", "medmnist", "medmnist_3d"}
RECIPES = sorted({p.stem for p in EXPERIMENTS.glob("*.yaml") if not p.stem.startswith(tuple(dense.METHODS))} - OURS)
FROM_SCRATCH = [name for name in RECIPES if "large" not in name]
FINE_TUNED = [name for name in RECIPES if "large" in name and not name.endswith("in22k")]
PRETRAINED = [name for name in RECIPES if name.endswith("in22k")]
UPDATES = 10  # per epoch
DROP_PATH = {
    "nat_mini": 0.2, "nat_tiny": 0.2, "nat_small": 0.3, "nat_base": 0.5,
    "dinat_mini": 0.2, "dinat_tiny": 0.2, "dinat_small": 0.3, "dinat_base": 0.5,
    "dinat_large": 0.35, "dinat_large_384": 0.35, "dinat_large_384_11x11": 0.35,
    "dinat_s_tiny": 0.2, "dinat_s_small": 0.3, "dinat_s_base": 0.5, "dinat_s_large": 0.35, "dinat_s_large_384": 0.35,
    "nat_isotropic_small": 0.1, "dinat_isotropic_small": 0.1, "vitrpb_small": 0.1,
    "nat_isotropic_base": 0.4, "dinat_isotropic_base": 0.4, "vitrpb_base": 0.4,
    "dinat_large_in22k": 0.2, "dinat_large_384_11x11_in22k": 0.2, "dinat_s_large_in22k": 0.2,
}  # fmt: skip


def schedule_of(cfg):
    """`(learning rate after so many updates, epochs)` of a recipe."""
    optimizer = create_optimizer(cfg.optimizer, torch.nn.Linear(1, 1))
    schedule, epochs = create_schedule(cfg.scheduler, optimizer, UPDATES)

    def rate(update):
        schedule.step_update(update)
        return optimizer.param_groups[0]["lr"]

    return rate, epochs


def test_all_25_variants_have_one():
    assert set(RECIPES) == set(DROP_PATH)
    assert len(RECIPES) == 25


@pytest.mark.parametrize("name", RECIPES)
def test_model_and_optimizer(compose, name):
    """The model is built without memory; matrices and bias tables are decayed, as they were, and nothing else is."""
    cfg = compose(f"experiment={name}", "data.root=/data")
    check_settings(cfg)
    with torch.device("meta"):
        model = timm.create_model(
            cfg.model.name, num_classes=cfg.data.num_classes, drop_path_rate=cfg.model.drop_path_rate,
            **to_dict(cfg.model.kwargs),
        )  # fmt: skip
    assert cfg.model.drop_path_rate == DROP_PATH[name]
    if cfg.model.pretrained:
        assert timm.models.get_pretrained_cfg(cfg.model.pretrained) is not None
    optimizer = create_optimizer(cfg.optimizer, model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = 0.05 if name in FROM_SCRATCH else 1e-4 if name in FINE_TUNED else 0.01
    for parameter_name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (expected if parameter.ndim > 1 else 0.0), parameter_name
    tables = [p for n, p in model.named_parameters() if n.endswith("rpb")]
    assert tables
    assert all(decay[id(table)] == expected for table in tables)
    defaults = optimizer.param_groups[0]
    assert (type(optimizer).__name__, defaults["eps"], tuple(defaults["betas"])) == ("AdamW", 1e-8, (0.9, 0.999))
    assert (cfg.optimizer.clip_grad, cfg.optimizer.clip_mode) == (5.0, "norm")


def test_bias_tables_are_spared_unless_asked(compose):
    model = timm.create_model("dinat_pico")
    optimizer = create_optimizer(compose().optimizer, model)
    spared = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert all(id(p) in spared for name, p in model.named_parameters() if name.endswith("rpb"))


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_from_scratch(compose, name):
    cfg = compose(f"experiment={name}", "data.root=/data")
    warmup = 50 if name.endswith("isotropic_base") or name == "vitrpb_base" else 20
    rate, epochs = schedule_of(cfg)
    assert (cfg.batch_size, epochs) == (1024, 310)
    assert rate(0) == 1e-6
    assert rate(warmup * UPDATES // 2) == pytest.approx((1e-6 + 1e-3) / 2)
    one_update = (1e-3 - 1e-6) / (warmup * UPDATES)
    assert rate(warmup * UPDATES - 1) == pytest.approx(1e-3 - one_update)
    assert rate(150 * UPDATES) == pytest.approx((1e-3 + 5e-6) / 2)  # half of the cosine
    assert rate(150 * UPDATES + 1) < rate(150 * UPDATES)  # it moves at every update
    assert rate(300 * UPDATES) == rate(310 * UPDATES - 1) == 5e-6
    average = cfg.ema.decay, cfg.ema.warmup
    assert average == ((0.9998, False) if warmup == 50 else (None, False))
    assert cfg.augment.smoothing == 0.1
    assert (cfg.augment.mixup.mixup_alpha, cfg.augment.mixup.cutmix_alpha, cfg.augment.mixup.switch_prob) == (
        0.8,
        1,
        0.5,
    )
    assert (cfg.augment.erasing.prob, cfg.augment.erasing.mode) == (0.25, "pixel")
    transform = cfg.augment.transform
    assert (transform.auto_augment, transform.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (list(transform.scale), transform.interpolation) == ([0.08, 1.0], "random")


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretraining(compose, name):
    cfg = compose(f"experiment={name}", "data.root=/data")
    rate, epochs = schedule_of(cfg)
    assert (cfg.batch_size, epochs, cfg.data.num_classes) == (4096, 90, 21841)
    assert rate(0) == 1e-6
    assert rate(5 * UPDATES) == pytest.approx(1e-3 * 85 / 90)
    assert rate(45 * UPDATES) == pytest.approx(0.5e-3)
    assert rate(90 * UPDATES - 1) == pytest.approx(1e-3 / (90 * UPDATES))


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning(compose, name):
    cfg = compose(f"experiment={name}", "data.root=/data")
    rate, epochs = schedule_of(cfg)
    assert (cfg.batch_size, epochs, cfg.data.num_classes, cfg.runtime.dtype) == (512, 30, 1000, "bfloat16")
    assert rate(0) == 5e-5
    assert rate(15 * UPDATES) == pytest.approx(2.5e-5)
    assert rate(30 * UPDATES - 1) == pytest.approx(5e-5 / (30 * UPDATES))
    assert (cfg.augment.mixup.mixup_alpha, cfg.augment.mixup.cutmix_alpha) == (0, 0)
    assert cfg.model.pretrained.endswith(".shi_in22k")


def test_drop_path_rates_are_those_of_the_published_models():
    published = Path("/work/shared/spec/models.json")
    if not published.exists():
        pytest.skip("the table of published models is not here")
    for name, model in json.loads(published.read_text())["models"].items():
        recipe = name.replace("large_21k_11x11", "large_384_11x11_in22k").replace("_21k", "_in22k")
        assert DROP_PATH[recipe] == model["arch"]["drop_path_rate"]
