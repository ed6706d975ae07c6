"""UPerNet for semantic segmentation: the head of transformers on any timm backbone.

Paper: Unified Perceptual Parsing for Scene Understanding - https://arxiv.org/abs/1807.10221. The defaults are those of
the published models, which were trained with mmsegmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from dinat.errors import UserError

from .backbone import TimmConfig, load_pretrained
from .model import DenseModel, Target, pad_to, resize

IGNORED = 255


class UPerNet(DenseModel):
    """Pyramid pooling on the last feature map, a feature pyramid, and a classifier of pixels at the finest one.

    `network` is transformers' `UperNetForSemanticSegmentation`, with its `save_pretrained`.

    Args:
        num_classes: of pixels.
        backbone: name of a timm model; `backbone_kwargs` are its arguments, see `dinat.dense.features.Features`.
        pretrained_backbone: start from the backbone's pretrained weights.
        channels: of the head.
        pool_scales: sides of the pooled maps, in cells.
        auxiliary_channels: of the auxiliary head on the third map, for training only; 0 for none.
        auxiliary_weight: of its loss.
        dropout: before the classifiers, of whole channels.
        class_weights: of the classes in the loss, one each.
    """

    method = "upernet"
    tasks = ("semantic",)

    def __init__(
        self,
        num_classes: int = 150,
        backbone: str = "dinat_mini",
        backbone_kwargs: dict[str, Any] | None = None,
        pretrained_backbone: bool = False,
        task: str | None = None,
        size_divisor: int = 32,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
        dropout: float = 0.1,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        config = UperNetConfig(
            backbone_config=TimmConfig(backbone, backbone_kwargs),
            num_labels=num_classes,
            hidden_size=channels,
            pool_scales=list(pool_scales),
            use_auxiliary_head=auxiliary_channels > 0,
            auxiliary_channels=auxiliary_channels,
            auxiliary_loss_weight=auxiliary_weight,
            loss_ignore_index=IGNORED,
        )
        try:
            network = UperNetForSemanticSegmentation(config)
        except IndexError as error:
            raise UserError(
                f"auxiliary_channels={auxiliary_channels}: the auxiliary head takes the third feature map, which "
                f"backbone={backbone} has not; 0 is for none."
            ) from error
        super().__init__(num_classes, task, network.backbone.features.pretrained_cfg, size_divisor)
        if class_weights is not None and len(class_weights) != num_classes:
            raise UserError(f"class_weights has {len(class_weights)} entries: must be one per class, {num_classes}.")
        self.network = network
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        for head in self._heads():
            init_head(head)
            head.classifier.register_forward_pre_hook(partial(_drop_channels, dropout))
        if pretrained_backbone:
            load_pretrained(network.backbone)

    @property
    def backbone(self) -> nn.Module:
        return self.network.backbone

    def _heads(self) -> list[nn.Module]:
        return [head for head in (self.network.decode_head, self.network.auxiliary_head) if head is not None]

    def losses(self, batch: Tensor, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        if len(batch) == 1 and 1 in self.network.config.pool_scales:
            raise UserError(
                "upernet is trained on two images or more at a time, for batch norm of maps of one cell: batch_size "
                "must be at least twice the number of processes times runtime.grad_accum."
            )
        size = batch.shape[-2:]
        truth = torch.stack([pad_to(target["semantic"].long(), *size, value=IGNORED) for target in targets])
        maps = self.network.backbone(batch).feature_maps
        weights = (1.0, self.network.config.auxiliary_loss_weight)
        return {
            name: weight * self._loss(resize(head(maps), size), truth)
            for name, weight, head in zip(("loss_semantic", "loss_auxiliary"), weights, self._heads(), strict=False)
        }

    def _loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Mean over all pixels, ignored ones included (as zero), as in mmsegmentation: never the mean of nothing."""
        loss = F.cross_entropy(logits.float(), truth, self.class_weights, ignore_index=IGNORED, reduction="none")
        return loss.mean()

    def outputs(self, batch: Tensor) -> Tensor:
        """Logits (batch, num_classes, height, width)."""
        maps = self.network.backbone(batch).feature_maps
        return resize(self.network.decode_head(maps), batch.shape[-2:])

    def predictions(self, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple], **kwargs: Any) -> list[dict]:
        if kwargs.get("task", self.task) != self.task or kwargs.keys() - {"task"}:
            raise TypeError(f"predict() of {self.method} takes no {', '.join(kwargs)}")
        return [{"semantic": logits.argmax(0)} for logits in self.fitted_maps(batch, frames, sizes)]

    def maps(self, batch: Tensor) -> Tensor:
        return self.outputs(batch).float()

    def activate(self, maps: Tensor) -> Tensor:
        """Probabilities."""
        return maps.softmax(0)


def init_head(head: nn.Module) -> None:
    """mmsegmentation's initialization: He for convolutions before a ReLU, normal 0.01 for the classifier."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.normal_(head.classifier.weight, std=0.01)
    nn.init.zeros_(head.classifier.bias)


def _drop_channels(rate: float, classifier: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return F.dropout2d(inputs[0], rate, classifier.training)
