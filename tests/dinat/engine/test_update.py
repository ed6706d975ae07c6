"""One update of the weights, compared with what can be worked out by hand from the pixels and the weights before it."""

import math
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close

DINAT = (
    "model.name=dinat_pico",
    "model.kwargs={img_size: 16, embed_dim: 8, depths: [1, 1, 1], num_heads: [1, 1, 1]}",
    "data.img_size=16",
)
PRECISION = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of the gradient's numbers


def by_hand(weights, images, targets, smoothing=0.0):
    """Loss and gradients of the linear classifier, in float64."""
    weight, bias = (weights[name].double().requires_grad_() for name in ("head.weight", "head.bias"))
    loss = F.cross_entropy(F.linear(images, weight, bias), targets, label_smoothing=smoothing)
    loss.backward()
    return loss.item(), {"head.weight": weight.grad, "head.bias": bias.grad}


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name].double(), tensor.double(), rtol=rtol, atol=atol)


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


@pytest.fixture(scope="module")
def train_pixels(pixels, digits_folder):
    return pixels(digits_folder / "train")


@pytest.mark.parametrize(
    ("dtype", "smoothing", "parts"),
    [("float32", 0.0, 1), ("float32", 0.2, 3), ("float16", 0.2, 2), ("bfloat16", 0.0, 1)],
)
def test_loss_and_step(observe, train_pixels, dtype, smoothing, parts):
    observed = observe(
        f"runtime.dtype={dtype}", f"augment.smoothing={smoothing}", f"runtime.grad_accum={parts}", "optimizer.lr=0.5"
    )
    loss, gradients = by_hand(observed.before[0], *train_pixels, smoothing)
    tolerance = PRECISION[dtype]
    assert float(observed.rows[0]["train_loss"]) == pytest.approx(loss, rel=tolerance)
    logits = F.linear(train_pixels[0].float(), *observed.before[0].values())
    top1 = 100 * (logits.argmax(dim=1) == train_pixels[1]).double().mean().item()
    assert float(observed.rows[0]["train_top1"]) == pytest.approx(top1, abs=1e-3 if dtype == "float32" else 2)
    close(observed.step(), {name: 0.5 * tensor for name, tensor in gradients.items()}, atol=tolerance)
    calls = [(len(images), logits.dtype) for training, images, logits in observed.forward if training]
    assert calls == [(120 // parts, getattr(torch, dtype))] * parts


def test_loss_of_an_epoch_is_the_mean_over_its_images(observe, train_pixels):
    """At lr 0, five updates of two parts see what one sees."""
    (row,) = (observed := observe("batch_size=24", "runtime.grad_accum=2", "optimizer.lr=0")).rows
    loss, _ = by_hand(observed.before[0], *train_pixels)
    assert loss == pytest.approx(math.log(10), abs=0.4)
    assert (float(row["train_loss"]), row["step"]) == (pytest.approx(loss, rel=1e-5), "5")


def test_loss_of_an_epoch_does_not_add_to_the_next_one(observe, train_pixels):
    observed = observe("scheduler.epochs=2")
    losses = [by_hand(before, *train_pixels)[0] for before in observed.before]
    assert [float(row["train_loss"]) for row in observed.rows] == pytest.approx(losses, rel=1e-5)
    assert abs(losses[1] - losses[0]) > 0.1


def test_gradients_do_not_outlive_their_update(observe, train_pixels):
    """The images of both updates together are all images, so their gradients add up to the whole one's at lr 0."""
    observed = observe("batch_size=60", "optimizer.lr=0")
    _, whole = by_hand(observed.before[0], *train_pixels)
    close({name: (tensor + observed.gradients[1][name]) / 2 for name, tensor in observed.gradients[0].items()}, whole)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_clipped_step_is_as_long_as_the_bound(observe, dtype):
    """With SGD at lr 1; in float16 the gradient that is clipped must have lost its loss scale before."""
    observed = observe("optimizer.clip_grad=0.01", f"runtime.dtype={dtype}", "runtime.grad_accum=2")
    assert norm(observed.step()) == pytest.approx(0.01, rel=1e-3)


def test_short_gradients_and_null_are_not_clipped(observe, train_pixels):
    for bound in ("null", "1000"):
        observed = observe(f"optimizer.clip_grad={bound}")
        _, gradients = by_hand(observed.before[0], *train_pixels)
        close(observed.step(), gradients)


def test_clip_modes(observe, train_pixels):
    observed = observe("optimizer.clip_grad=0.02", "optimizer.clip_mode=value")
    _, gradients = by_hand(observed.before[0], *train_pixels)
    assert max(tensor.abs().max() for tensor in gradients.values()) > 0.03
    close(observed.step(), {name: tensor.clamp(-0.02, 0.02) for name, tensor in gradients.items()})

    observed = observe("optimizer.clip_grad=0.02", "optimizer.clip_mode=agc")
    rows, bound = gradients["head.weight"], 0.02 * observed.before[0]["head.weight"].norm(dim=1, keepdim=True)
    assert (rows.norm(dim=1, keepdim=True) > bound).any()
    expected = rows * (bound / rows.norm(dim=1, keepdim=True)).clamp(max=1)
    assert_close(observed.step()["head.weight"].double(), expected, rtol=1e-4, atol=1e-6)


def test_weight_decay_is_of_matrices_only(observe, train_pixels):
    observed = observe("optimizer.weight_decay=0.3", "optimizer.lr=0.5")
    _, gradients = by_hand(observed.before[0], *train_pixels)
    gradients["head.weight"] += 0.3 * observed.before[0]["head.weight"]
    close(observed.step(), {name: 0.5 * tensor for name, tensor in gradients.items()})


def test_arguments_of_the_optimizer(observe):
    """AdamW, worked out from the gradients of two updates."""
    observed = observe(
        "batch_size=60", "optimizer=adamw", "optimizer.opt=adamw", "optimizer.lr=0.01", "scheduler.min_lr=0.01",
        "optimizer.kwargs.eps=0.1", "optimizer.kwargs.betas=[0.6,0.8]",
    )  # fmt: skip
    for name, first in observed.gradients[0].items():
        second = observed.gradients[1][name]
        mean = (0.4 * 0.6 * first + 0.4 * second) / (1 - 0.6**2)
        square = (0.2 * 0.8 * first**2 + 0.2 * second**2) / (1 - 0.8**2)
        assert_close(observed.step(0)[name], 0.01 * first / (first.abs() + 0.1), rtol=1e-4, atol=1e-7)
        assert_close(observed.step(1)[name], 0.01 * mean / (square.sqrt() + 0.1), rtol=1e-4, atol=1e-7)


def test_learning_rate_of_each_update(observe):
    """A straight line, half a cosine over all updates, and a floor."""
    observed = observe(
        "batch_size=24", "scheduler.epochs=3", "scheduler.warmup_epochs=1", "scheduler.warmup_lr=0.1",
        "scheduler.min_lr=0.2", "scheduler.cooldown_epochs=1", "eval_every=9",
    )  # fmt: skip
    warmup = [0.1 + 0.9 * update / 5 for update in range(5)]
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * update / 15)) / 2 for update in range(5, 15)]
    assert [lr for (lr,) in observed.lr] == pytest.approx(warmup + cosine + [0.2] * 5)
    assert [float(row["lr"]) for row in observed.rows] == pytest.approx([warmup[4], cosine[4], cosine[9], 0.2])
    assert observed.last["lr"] == pytest.approx(0.2)


def test_learning_rate_under_layer_decay(observe):
    """Each layer's own in the optimizer, the head's in the summary."""
    observed = observe(*DINAT, "optimizer.layer_decay=0.5", "optimizer.lr=0.01", "scheduler.min_lr=0.01")
    assert set(observed.lr[0]) == {0.01 * 0.5**depth for depth in range(len(set(observed.lr[0])))}
    assert len(set(observed.lr[0])) >= 4
    assert float(observed.rows[0]["lr"]) == 0.01


@pytest.mark.parametrize("warmup", [False, True])
def test_average_of_the_weights(observe, pixels, digits_folder, warmup):
    """The recursion of timm's ModelEmaV3: the first update is taken as it is, then the decay holds or rises to it."""
    observed = observe("batch_size=24", "optimizer.lr=0.1", "ema.decay=0.6", f"ema.warmup={warmup}")
    average = observed.after[0]
    for done, weights in enumerate(observed.after[1:], start=1):
        decay = min(0.6, 1 - (1 + done) ** (-2 / 3)) if warmup else 0.6
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    saved = observed.last
    del saved["state_dict_ema"]["seen"], saved["state_dict"]["seen"]
    close(saved["state_dict_ema"], average)
    close(saved["state_dict"], observed.after[-1], rtol=0, atol=0)
    loss, _ = by_hand(average, *pixels(digits_folder / "validation"))
    assert float(observed.rows[0]["val_loss"]) == pytest.approx(loss, rel=1e-4)  # the average is what is evaluated


def test_validation_figures(observe, pixels, digits_folder):
    observed = observe("optimizer.lr=0.1")
    images, targets = pixels(digits_folder / "validation")
    weights = observed.after[-1]
    loss, _ = by_hand(weights, images, targets)
    ranked = F.linear(images.float(), weights["head.weight"], weights["head.bias"]).argsort(dim=1, descending=True)
    right = ranked == targets[:, None]
    expected = (100 * right[:, :top].any(dim=1).double().mean().item() for top in (1, 5))
    row = observed.rows[0]
    assert float(row["val_loss"]) == pytest.approx(loss, rel=1e-5)
    assert (float(row["val_top1"]), float(row["val_top5"])) == pytest.approx(tuple(expected))
    assert observed.top1 == float(row["val_top1"])


def test_batch_sizes(observe):
    observed = observe("batch_size=40", "eval_batch_size=30")
    sizes = [(training, len(images)) for training, images, _ in observed.forward]
    assert sizes == [(True, 40)] * 3 + [(False, 30), (False, 7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes(observe, workers):
    counts = []
    handle = register_optimizer_step_post_hook(lambda *_: counts.append(len(multiprocessing.active_children())))
    observe(f"runtime.workers={workers}")
    handle.remove()
    assert counts == [workers]


def test_model_by_name_and_arguments(observe):
    """The stand-in has 64 numbers per channel and class, and a bias; another name is another model."""
    observed = observe("model.kwargs={script: null}", "batch_size=100")
    assert sum(tensor.numel() for tensor in observed.before[0].values()) == 3 * 64 * 10 + 10
    widths = []
    for width in (8, 16):
        kwargs = f"model.kwargs={{img_size: 8, embed_dim: {width}, depths: [1, 1], num_heads: [1, 1]}}"
        observed = observe("model.name=dinat_pico", kwargs, "batch_size=100")
        widths.append(observed.before[0]["head.fc.weight"].shape)
    assert widths == [(10, 16), (10, 32)]


def test_seed(observe):
    """Of the initial weights and of the order of the images: the same twice, others with another."""
    first, again, other = (observe(f"seed={seed}", "batch_size=60", "optimizer.lr=0") for seed in (1, 1, 2))
    close(first.before[0], again.before[0], rtol=0, atol=0)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first.forward, again.forward, strict=True))
    assert not torch.equal(first.before[0]["head.weight"], other.before[0]["head.weight"])
    assert not torch.equal(first.forward[0][1], other.forward[0][1])


def test_layout_and_recomputation(observe):
    """`channels_last` is of images and weights; a checkpointed block runs twice, and comes to the same."""
    from dinat.models.nat import NATBlock

    calls = []
    options = (*DINAT, "runtime.channels_last=true", "runtime.grad_checkpointing=true")
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, *_: calls.append(module) if isinstance(module, NATBlock) and module.training else None
    )
    plain, frugal = observe(*DINAT), observe(*options)
    handle.remove()
    assert len(calls) == 3 + 2 * 3
    close(frugal.gradients[0], plain.gradients[0], rtol=1e-3, atol=1e-5)
    for observed, strides in ((plain, (768, 256, 16, 1)), (frugal, (768, 1, 48, 3))):
        assert {images.stride() for _, images, _ in observed.forward} == {strides}
        convolution = next(tensor for tensor in observed.before[0].values() if tensor.ndim == 4)
        assert (convolution.stride()[1] == 1) == (observed is frugal)
