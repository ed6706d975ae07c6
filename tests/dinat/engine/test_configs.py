"""Every YAML file composes, says what it should, and lies in a package."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinat import dense

CONFIGS = Path(__file__).parents[3] / "configs"
EXPERIMENTS = sorted(  # those of dense models: test_dense_recipes.py
    path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if not path.stem.startswith(tuple(dense.METHODS))
)
GROUPS = ("model", "data", "optimizer", "scheduler", "augment", "runtime", "logger")
OPTIONS = sorted(f"{group}={path.stem}" for group in GROUPS for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(compose, option):
    cfg = compose(option)
    group, name = option.split("=")
    default = compose()
    if group != "scheduler" and (group, name) != ("logger", "wandb"):  # whose options have arguments of their own
        assert cfg[group].keys() == default[group].keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(compose, name):
    cfg = compose(f"experiment={name}", "data.root=/data")
    resolved = OmegaConf.to_container(cfg, resolve=False)
    assert resolved["model"]["name"]
    assert set(resolved) == set(OmegaConf.to_container(compose(), resolve=False))  # no misspelt section


def test_evaluation_composes_with_every_data_set(evaluation):
    for path in (CONFIGS / "data").glob("*.yaml"):
        cfg = evaluation(f"data={path.stem}")
        assert set(cfg.data) == set(evaluation().data)


def test_a_group_chosen_on_the_command_line_wins(compose):
    cfg = compose("experiment=dinat_tiny", "data=digits", "optimizer.lr=1")
    assert (cfg.data.name, cfg.optimizer.lr, cfg.batch_size) == ("digits", 1, 1024)


@pytest.mark.parametrize(
    ("task", "model", "data"),
    [
        ("detection", "mask_rcnn", "coco"),
        ("detection", "cascade_mask_rcnn", "coco"),
        ("semantic", "upernet", "masks"),
        ("panoptic", "mask2former", "coco_panoptic"),
        ("panoptic", "oneformer", "coco_panoptic"),
    ],
)
def test_data_and_models_of_ones_own_inherit_nothing_from_the_scenes(compose, task, model, data):
    cfg = compose(f"task={task}", f"model={model}", f"data={data}")
    published = {"tokenizer": "clip"} if model == "oneformer" else {}
    assert (cfg.model.name, cfg.model.kwargs, cfg.model.drop_path_rate) == (model, published, None)
    assert (cfg.data.kwargs, cfg.data.img_size) == ({}, None)


def test_every_folder_is_a_package():
    folders = {path.parent for path in CONFIGS.rglob("*.yaml")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
