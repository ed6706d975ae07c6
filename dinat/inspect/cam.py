"""Grad-CAM, Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391: where an image speaks for a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinat.errors import UserError

from .extraction import blocks, has_classifier


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """How much each place of the last map, after the final norm, raises the logit of a class.

    Args:
        model: a classifier of this package, in evaluation mode.
        images: (batch, channels, height, width), as the model takes them.
        classes: one index per image, (batch,); by default the likeliest class of each.

    Returns:
        (batch, height, width) in the size of the images, bilinear, from 0 to 1; 0 everywhere where nothing raises it.

    Raises:
        UserError: the model has no classifier, or not this class, or is for volumes.
        ValueError: the model is in training mode.
    """
    if not has_classifier(model):
        raise UserError(f"model={type(model).__name__}: has no classifier; Grad-CAM is for classes.")
    blocks(model)  # refuses volumes
    if model.training:
        raise ValueError("grad_cam() works in evaluation mode: call model.eval() first")
    with torch.enable_grad():
        features = model.forward_features(images).detach().requires_grad_()
        logits = model.forward_head(features)
        classes = logits.argmax(1) if classes is None else torch.as_tensor(classes, device=logits.device)
        for index in classes.tolist():
            if not 0 <= index < model.num_classes:
                raise UserError(f"class={index}: the model has classes 0 to {model.num_classes - 1}.")
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    maps = (features * gradient.mean((2, 3), keepdim=True)).sum(1).relu().detach()
    maps = F.interpolate(maps[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
