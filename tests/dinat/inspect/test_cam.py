"""Grad-CAM against its formula and, where it is installed, against pytorch-grad-cam."""

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from dinat.errors import UserError
from dinat.inspect import grad_cam


@pytest.fixture
def model():
    model = timm.create_model("dinat_pico", num_classes=5, depths=(1, 1, 2)).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    return model


def test_the_formula(model):
    """Of average pooling and a linear classifier, the weight of a channel is that of the classifier."""
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        features, logits = model.forward_features(images), model(images)
        for classes in (None, torch.tensor([4, 0, 2])):
            weights = model.head.fc.weight[logits.argmax(1) if classes is None else classes]
            maps = torch.einsum("nc,nchw->nhw", weights, features).relu()
            expected = F.interpolate(maps[:, None], scale_factor=8, mode="bilinear")[:, 0]
            expected /= expected.amax((1, 2), keepdim=True)
            torch.testing.assert_close(grad_cam(model, images, classes), expected)


def test_nothing_raises_the_class(model):
    torch.nn.init.zeros_(model.head.fc.weight)
    assert grad_cam(model, torch.randn(1, 3, 32, 32)).eq(0).all()


def test_bad_input(model):
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(UserError, match="class=5: the model has classes 0 to 4"):
        grad_cam(model, images, [5])
    with pytest.raises(UserError, match="has no classifier"):
        grad_cam(timm.create_model("dinat_pico", num_classes=0), images)
    with pytest.raises(UserError, match="model=Linear: has no classifier"):
        grad_cam(torch.nn.Linear(1, 1), images)
    with pytest.raises(ValueError, match="call model"):
        grad_cam(model.train(), images)


def test_recipe_for_pytorch_grad_cam(model):
    """docs/inspect.md's: the final norm gives maps as it expects them; blocks are channels last."""
    package = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    images = torch.randn(1, 3, 64, 96)
    targets = [ClassifierOutputTarget(3)]
    found = package.GradCAM(model=model, target_layers=[model.norm])(input_tensor=images, targets=targets)
    ours = grad_cam(model, images, [3]).numpy()
    assert np.corrcoef(found.ravel(), ours.ravel())[0, 1] > 0.99  # it interpolates as OpenCV does
    blocks = dict(target_layers=[model.levels[-1].blocks[-1].norm2], reshape_transform=lambda x: x.permute(0, 3, 1, 2))
    assert package.GradCAM(model=model, **blocks)(input_tensor=images, targets=targets).shape == (1, 64, 96)


def test_recipe_for_captum(model):
    """Integrated gradients sum up to the difference of the logits (completeness)."""
    attr = pytest.importorskip("captum.attr", reason="pip install captum")
    images = torch.randn(1, 3, 32, 32)
    found = attr.IntegratedGradients(model).attribute(images, target=2, n_steps=100)
    with torch.no_grad():
        difference = model(images)[0, 2] - model(torch.zeros_like(images))[0, 2]
    assert found.sum().item() == pytest.approx(difference.item(), abs=0.05 * max(1, abs(difference.item())))
