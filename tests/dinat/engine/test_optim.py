"""Parameter groups, and schedules as timm defines them."""

import math

import pytest
import timm
import torch

from dinat import dense
from dinat.engine.optim import create_optimizer, create_schedule
from dinat.errors import UserError


def groups(model, optimizer):
    """Weight decay and learning-rate scale of each parameter, by name."""
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {
        name: (found[id(p)]["weight_decay"], found[id(p)].get("lr_scale", 1.0)) for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def model():
    return timm.create_model("dinat_pico", depths=(1, 2, 1), embed_dim=8, num_heads=(1, 1, 1))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("layer_decay", ["null", "0.5"])
def test_weight_decay_groups(compose, model, listed, layer_decay):
    """Matrices are decayed, vectors never, bias tables if asked; with layer decay too."""
    cfg = compose(
        "optimizer.weight_decay=0.3", f"optimizer.decay_listed={listed}", f"optimizer.layer_decay={layer_decay}"
    )
    decay = groups(model, create_optimizer(cfg.optimizer, model))
    tables = {name for name in decay if name.endswith("rpb")}
    assert len(tables) == 4
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and (listed or name not in tables)
        assert decay[name][0] == (0.3 if decayed else 0.0), name


def test_layer_decay(compose, model):
    """The head learns at the full rate, each level's blocks slower than those after them, the stem slowest."""
    cfg = compose("optimizer.layer_decay=0.5", "optimizer.lr=0.1")
    optimizer = create_optimizer(cfg.optimizer, model)
    scale = {name: scale for name, (_, scale) in groups(model, optimizer).items()}
    stem, *_, head = scale.values()
    layers = len(set(scale.values()))
    assert layers >= 6  # stem, four blocks, head
    assert (stem, head) == (0.5 ** (layers - 1), 1.0)
    assert set(scale.values()) == {0.5**depth for depth in range(layers)}
    create_schedule({"sched": "cosine", "epochs": 1, "warmup_epochs": 0}, optimizer, 10)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 * value for value in scale.values()}


@pytest.mark.parametrize(("opt", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizer_by_name(compose, opt, kind):
    optimizer = create_optimizer(compose(f"optimizer={opt}", "optimizer.lr=0.25").optimizer, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [0.05 + 0.95 * (1 + math.cos(math.pi * update / 20)) / 2 for update in range(20)]),
        (("scheduler=linear",), [1 - update / 20 for update in range(20)]),
        (("scheduler.sched=poly", "+scheduler.decay_rate=2.0"), [0.05 + 0.95 * (1 - u / 20) ** 2 for u in range(20)]),
        (("scheduler.sched=step", "+scheduler.decay_epochs=1", "+scheduler.decay_rate=0.5"), [1.0] * 10 + [0.5] * 10),
    ],
    ids=["cosine", "linear", "poly", "step"],
)
def test_schedules(compose, options, expected):
    """By update, not by epoch, from the first one on; without a warm-up."""
    cfg = compose("scheduler.epochs=2", "scheduler.warmup_epochs=0", "scheduler.min_lr=0.05", *options)
    if "scheduler=linear" in options:
        cfg.scheduler.min_lr = 0.0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, epochs = create_schedule(cfg.scheduler, optimizer, 10)
    assert epochs == 2
    rates = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 20):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("cooldown", "expected"), [(0, 3), (2, 5)])
def test_cooldown_comes_on_top(compose, cooldown, expected):
    cfg = compose("scheduler.epochs=3", f"scheduler.cooldown_epochs={cooldown}")
    assert create_schedule(cfg.scheduler, torch.optim.SGD([torch.zeros(1)], lr=1.0), 10)[1] == expected


def test_named_parts_are_spared_in_place_of_all_rules(compose, model):
    cfg = compose("optimizer.weight_decay=0.3", "optimizer.no_decay=[norm,rpb]")
    for name, (decay, scale) in groups(model, create_optimizer(cfg.optimizer, model)).items():
        assert decay == (0.0 if "norm" in name or "rpb" in name else 0.3), name  # biases are decayed, then
        assert scale == 1.0


def test_factors_of_named_parts(compose, model):
    """They multiply where a name has both parts, and with layer decay; weight decay stays by its own rules."""
    scales = "+optimizer.lr_scale={levels: 0.1, rpb: 0.5}"
    plain = compose("optimizer.layer_decay=0.5")
    both = compose("optimizer.layer_decay=0.5", scales)
    before = groups(model, create_optimizer(plain.optimizer, model))
    for name, (decay, scale) in groups(model, create_optimizer(both.optimizer, model)).items():
        factor = (0.1 if "levels" in name else 1.0) * (0.5 if "rpb" in name else 1.0)
        assert scale == pytest.approx(before[name][1] * factor), name
        assert decay == before[name][0]


def test_classes_of_modules_and_the_backbone_have_names(compose):
    """What torchvision and transformers number instead of naming: a group norm, a batch norm, an embedding."""
    options = dict(width=32, heads=2, encoder_layers=1, encoder_mlp=16, decoder_layers=2, decoder_mlp=16, queries=4)
    model = dense.create_model("mask2former_test_convnext", num_classes=3, **options)
    cfg = compose("optimizer.weight_decay=0.3", "optimizer.no_decay=[GroupNorm,Embedding]",
                  "+optimizer.lr_scale={backbone: 0.1}")  # fmt: skip
    modules, inside = dict(model.named_modules()), {name for name, _ in model.backbone.named_parameters()}
    spared = set()
    for name, (decay, scale) in groups(model, create_optimizer(cfg.optimizer, model)).items():
        kind = modules[name.rpartition(".")[0]]
        assert decay == (0.0 if isinstance(kind, torch.nn.GroupNorm | torch.nn.Embedding) else 0.3), name
        assert scale == (0.1 if name.removeprefix("network.model.pixel_level_module.encoder.") in inside else 1.0), name
        spared |= {type(kind).__name__} if not decay else set()
    assert spared == {"GroupNorm", "Embedding"}


@pytest.mark.parametrize("option", ["optimizer.no_decay=[nrom]", "+optimizer.lr_scale={nrom: 0.1}"])
def test_a_part_that_no_name_has(compose, model, option):
    key = option.strip("+").partition("=")[0]
    with pytest.raises(UserError, match=rf"{key}: no parameter of \w+ has nrom in its name"):
        create_optimizer(compose(option).optimizer, model)


def rates(cfg, updates_per_epoch):
    """Learning rates of all updates, for a rate of 1, and the number of epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, epochs = create_schedule(cfg.scheduler, optimizer, updates_per_epoch)
    found = []
    for update in range(round(epochs * updates_per_epoch)):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found, epochs


def test_length_in_updates(compose):
    """Seven and a half epochs; the warm-up, in epochs or in updates, is part of it."""
    options = ("scheduler=linear", "scheduler.updates=15", "scheduler.warmup_lr=0")
    for warmup, warm in (("scheduler.warmup_epochs=2", 4), ("scheduler.warmup_updates=3", 3)):
        found, epochs = rates(compose(*options, warmup), 2)
        assert epochs == 7.5
        assert found == pytest.approx([u / warm for u in range(warm)] + [1 - u / 15 for u in range(warm, 15)])


def test_milestones_in_epochs_and_in_updates(compose):
    """By timm's convention, the update before a milestone has the lower rate already."""
    options = ("scheduler=multistep", "scheduler.warmup_epochs=0", "scheduler.decay_rate=0.5")
    found, _ = rates(compose(*options, "scheduler.epochs=4", "scheduler.decay_milestones=[1,3]"), 2)
    assert found == [1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    found, _ = rates(compose(*options, "scheduler.updates=8", "scheduler.decay_milestones=[2,4]"), 2)
    assert found == [1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]
