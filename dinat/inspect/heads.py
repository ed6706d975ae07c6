"""What heads do: how far they look, how sharply, whether by content or by position, and how much they matter.

The views are those of Li et al. 2023, https://arxiv.org/abs/2303.13731, for windows: every head has the same offsets,
so its mean pattern is a picture of k x k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinat.errors import UserError

from .extraction import Attention, Block, attention, blocks, has_classifier

Importance = Literal["gradient", "ablation", "none"]


@dataclass
class Head:
    """Means over queries and images.

    Attributes:
        block, head: LEVEL.BLOCK and the number of the head.
        distance: from a query to its keys, in pixels of the image: stride x dilation x offset, Euclidean.
        entropy: of the weights, in nats; log(k_h * k_w) for even ones.
        rings: share of the weights at each Chebyshev offset, in steps of the dilation. In the interior they go up to
            k // 2; at borders, where windows shift, up to k - 1.
        divergence: Kullback-Leibler divergence from what the bias alone would give, in nats: 0 for a static head, large
            for one that goes by content.
        pattern: weights (k_h, k_w) of the queries in the middle of their window; NaN if there are none.
        bias: what the bias alone would give them.
        importance: see `describe_heads`; None if it was not asked for.
    """

    block: str
    head: int
    distance: float
    entropy: float
    rings: list[float]
    divergence: float
    pattern: np.ndarray
    bias: np.ndarray
    importance: float | None = None

    def row(self) -> dict[str, Any]:
        """The numbers, for a table."""
        row = {key: value for key, value in asdict(self).items() if key not in ("rings", "pattern", "bias")}
        return row | {f"ring{i}": share for i, share in enumerate(self.rings)}


def describe_heads(model: nn.Module, images: Iterable[Tensor], importance: Importance = "gradient") -> list[Head]:
    """Every head of every block, in order.

    Args:
        model: of this package or one that holds one, in evaluation mode.
        images: batches (batch, channels, height, width) of one size, as the model takes them.
        importance: "gradient": absolute derivative of the loss by a gate of the head (Michel et al. 2019,
            https://arxiv.org/abs/1905.10650, section 4.1), in one backward pass. "ablation": by how much the loss rises
            without the head, in one forward pass per head. The loss is the cross-entropy of the class that the model
            finds likeliest; both are means over images.

    Raises:
        UserError: the model has no neighborhood attention, or importance is asked of one that has no classifier.
        ValueError: the model is in training mode, or there are no images.
    """
    if importance != "none" and not has_classifier(model):
        raise UserError(f"importance={importance}: {type(model).__name__} has no classifier. Use importance=none.")
    measure = {"gradient": _gradients, "ablation": _ablations, "none": lambda model, images: None}[importance]
    total: list[dict[str, np.ndarray]] = []
    count = 0
    for batch in images:
        figures = [_figures(layer) for layer in attention(model, batch)]
        if (weights := measure(model, batch)) is not None:
            figures = [figure | {"importance": weight} for figure, weight in zip(figures, weights, strict=True)]
        scaled = [{key: len(batch) * value for key, value in figure.items()} for figure in figures]
        total = [{key: a[key] + b[key] for key in a} for a, b in zip(total, scaled, strict=True)] if total else scaled
        count += len(batch)
    if not count:
        raise ValueError("images: there are none")
    heads = []
    for block, figures in zip(blocks(model), total, strict=True):
        for head in range(block.attn.num_heads):
            values = {key: (value[head] / count).tolist() for key, value in figures.items()}
            pattern, bias = (np.array(values.pop(key)) for key in ("pattern", "bias"))
            heads.append(Head(block.name, head, pattern=pattern, bias=bias, **values))
    return heads


def _figures(layer: Attention) -> dict[str, np.ndarray]:
    """The means of a batch, (heads, ...) each."""
    weights = layer.weights.double()
    axes = zip((layer.rows, layer.columns), layer.dilation, layer.strides, layer.kernel_size, strict=True)
    steps, pixels, centred, entries = [], [], [], []
    for keys, dilation, stride, k in axes:
        offset = torch.as_tensor(keys - np.arange(len(keys))[:, None], device=weights.device)
        steps.append(offset // dilation)
        pixels.append(offset * stride)
        centred.append(offset[:, k // 2] == 0)
        entries.append(offset // dilation + k - 1)

    def on_map(vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        """Of every query and slot, (height, width, k_h, k_w) when combined."""
        return vertical[:, None, :, None], horizontal[None, :, None, :]

    distance = torch.hypot(*map(Tensor.double, on_map(*pixels))).flatten(2)
    ring = torch.maximum(*(x.abs() for x in on_map(*steps))).flatten(2)
    rows, columns = on_map(*entries)
    bias = layer.rpb.double()[:, rows, columns].flatten(3).log_softmax(-1)  # (heads, height, width, slots)
    logs = weights.clamp(min=1e-300).log()
    middle = centred[0][:, None] & centred[1]
    over_queries = (0, 2, 3)
    rings = [(weights * (ring == r)).sum(-1).mean(over_queries) for r in range(max(layer.kernel_size))]
    return {
        "distance": (weights * distance).sum(-1).mean(over_queries).cpu().numpy(),
        "entropy": -(weights * logs).sum(-1).mean(over_queries).cpu().numpy(),
        "rings": torch.stack(rings, -1).cpu().numpy(),
        "divergence": (weights * (logs - bias)).sum(-1).mean(over_queries).cpu().numpy(),
        "pattern": weights[:, :, middle].mean((0, 2)).unflatten(-1, layer.kernel_size).cpu().numpy(),
        "bias": bias[:, middle].exp().mean(1).unflatten(-1, layer.kernel_size).cpu().numpy(),
    }


@contextmanager
def _gated(found: Sequence[Block], gates: Sequence[Tensor]):
    """In this context, what each head hands to the projection is multiplied by its gate, (batch or 1, heads)."""

    def gate(block: Block, weight: Tensor):
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            heads = inputs[0].unflatten(-1, (block.attn.num_heads, -1))
            return (heads * weight[:, None, None, :, None]).flatten(-2)

        return block.attn.proj.register_forward_pre_hook(hook)

    with ExitStack() as stack:
        for block, weight in zip(found, gates, strict=True):
            stack.callback(gate(block, weight).remove)
        yield


def _gradients(model: nn.Module, images: Tensor) -> list[np.ndarray]:
    found = blocks(model)
    with torch.enable_grad():
        gates = [images.new_ones(len(images), block.attn.num_heads, requires_grad=True) for block in found]
        with _gated(found, gates):
            logits = model(images)
        loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")
        return [grad.abs().mean(0).cpu().numpy() for grad in torch.autograd.grad(loss, gates)]


@torch.no_grad()
def _ablations(model: nn.Module, images: Tensor) -> list[np.ndarray]:
    logits = model(images)
    classes = logits.argmax(1)
    before = F.cross_entropy(logits, classes)
    rises = []
    for block in blocks(model):
        heads = block.attn.num_heads
        rises.append(np.empty(heads))
        for head in range(heads):
            gate = images.new_ones(1, heads)
            gate[0, head] = 0
            with _gated([block], [gate]):
                rises[-1][head] = (F.cross_entropy(model(images), classes) - before).item()
    return rises
