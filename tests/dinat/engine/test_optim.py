"""Parameter groups, and schedules as timm defines them."""

import math

import pytest
import timm
import torch

from dinat.engine.optim import create_optimizer, create_schedule


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
