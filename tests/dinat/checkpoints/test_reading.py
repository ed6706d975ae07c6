"""Files as people have them: nested, wrapped, misnamed, or nothing that can be read; the same answer to everyone."""

import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import dinat  # noqa: F401  registers the models
from dinat.checkpoints import read_checkpoint
from dinat.errors import CheckpointError, UserError
from dinat.tasks.models import load_weights

ARCHITECTURE = dict(img_size=16, embed_dim=8, depths=(1, 2), num_heads=(1, 2), stem_stride=2, num_classes=5)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Random weights of a model of a few thousand parameters."""
    model = timm.create_model("dinat_pico", **ARCHITECTURE)
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


def read_by_all(path):
    """What each way to give a file makes of it, as state dicts."""
    yield read_checkpoint(path)
    model = timm.create_model("dinat_pico", **ARCHITECTURE)
    load_weights(model, path)
    yield model.state_dict()
    overlay = dict(file=str(path))
    yield timm.create_model("dinat_pico", pretrained=True, pretrained_cfg_overlay=overlay, **ARCHITECTURE).state_dict()


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "optimizer_state_dict": OPTIMIZER},
        lambda state: {"module": state, "epoch": 3},
        lambda state: {"net": state, "acc": 93.1},
        lambda state: {"weights_of_mine": state, "optimizer": OPTIMIZER, "step": 7},
        lambda state: {"checkpoint": {"model": {f"module.{key}": value for key, value in state.items()}}},
        lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {"model": {"stray": torch.ones(1)}, "state_dict_ema": state},
        lambda state: {"model": "dinat_pico", "state_dict": state},
    ],
)
def test_nested_state_dicts(state, wrap, tmp_path):
    torch.save(wrap(state), tmp_path / "nested.pth")
    for read in read_by_all(tmp_path / "nested.pth"):
        assert_equal(read, state)


def test_averaged_weights_are_a_choice(state, tmp_path):
    torch.save({"model": state, "model_ema": {key: value + 1 for key, value in state.items()}}, tmp_path / "both.pth")
    assert_equal(read_checkpoint(tmp_path / "both.pth", use_ema=False), state)
    assert_equal(read_checkpoint(tmp_path / "both.pth"), {key: value + 1 for key, value in state.items()})


@pytest.mark.parametrize("header", ["", "x" * 600])
def test_safetensors_under_another_ending(state, header, tmp_path):
    save_file(state, tmp_path / "weights.pth", metadata={"note": header})
    for read in read_by_all(tmp_path / "weights.pth"):
        assert_equal(read, state)


def test_pytorch_file_that_is_called_safetensors(state, tmp_path):
    torch.save(state, tmp_path / "weights.safetensors")
    for read in read_by_all(tmp_path / "weights.safetensors"):
        assert_equal(read, state)


def refusals(path):
    """The messages with which each way to give a file refuses it."""
    model = timm.create_model("dinat_pico", **ARCHITECTURE)
    overlay = dict(file=str(path))
    for read in (
        lambda: read_checkpoint(path),
        lambda: load_weights(model, path, key="model.checkpoint"),
        lambda: timm.create_model("dinat_pico", pretrained=True, pretrained_cfg_overlay=overlay, **ARCHITECTURE),
    ):
        with pytest.raises((CheckpointError, UserError)) as caught:
            read()
        yield str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gen": {"w": torch.ones(2)}, "disc": {"w": torch.ones(2)}}, "2 state dicts, .*top-level keys: gen, disc"),
        ({"epoch": 3, "opt": OPTIMIZER}, "holds no tensors; its top-level keys: epoch, opt"),
        ({}, "holds no tensors; its top-level keys: none"),
        ([torch.ones(2)], "holds a list, not a state dict"),
    ],
)
def test_no_state_dict_lists_what_there_is(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    for refusal in refusals(tmp_path / "other.pth"):
        assert re.search(rf"other\.pth: .*{message}", refusal)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_pickle_is_called_so(protocol, tmp_path):
    """The files of detectron2's model zoo: pickled NumPy arrays with a note about their origin."""
    content = {"model": {"stem.weight": torch.ones(2, 3).numpy()}, "__author__": "third_party"}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol))
    for refusal in refusals(tmp_path / "model.pkl"):
        assert "model.pkl: a plain pickle, as the .pkl files of detectron2 are" in refusal
        assert "Start from the .pth or .safetensors file that it was made from" in refusal
