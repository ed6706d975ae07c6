"""Effective receptive fields equal plain loops."""

import numpy as np
import pytest
import timm
import torch

from dinat.errors import UserError
from dinat.inspect import effective_fields, logarithm, squares


@pytest.fixture
def model():
    options = dict(img_size=16, in_chans=1, num_classes=0, embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3)
    return timm.create_model("dinat_pico", **options).double().eval()


def test_fields_are_those_of_a_loop_over_pixels(model):
    """Central differences: each pixel of each image is moved up and down a little."""
    images, step = torch.randn(2, 1, 14, 12, dtype=torch.float64), 1e-4

    def middle(batch):
        with torch.no_grad():
            for out in model.forward_intermediates(batch, intermediates_only=True):
                yield out[:, :, out.shape[2] // 2, out.shape[3] // 2].relu().sum(1)

    expected = np.zeros((2, 14, 12))
    for image in images:
        for y in range(14):
            for x in range(12):
                moved = torch.stack([image, image])
                moved[0, 0, y, x] += step
                moved[1, 0, y, x] -= step
                for level, (up, down) in enumerate(middle(moved)):
                    expected[level, y, x] += max(0, float(up - down) / (2 * step)) / 2
    for batches in ([images], images.split(1)):
        fields = effective_fields(model, batches)
        np.testing.assert_allclose(fields, expected, atol=1e-6 * expected.max())


def test_squares_are_those_of_a_loop():
    field = np.random.default_rng(0).random((15, 21)) ** 8
    for square in squares(field, (0.2, 0.5, 0.9, 1.0)):
        insides = [
            sum(field[y, x] for y in range(15) for x in range(21) if max(abs(y - 7), abs(x - 10)) <= radius)
            for radius in range(11)
        ]
        radius = next(r for r, inside in enumerate(insides) if inside >= (square.share - 1e-12) * field.sum())
        assert square.side == 2 * radius + 1
        assert square.area == pytest.approx(min(15, square.side) * min(21, square.side) / (15 * 21))


def test_the_convention():
    """By hand: log10 of 1 + 9 is half of that of 1 + 99."""
    field = np.zeros((5, 5))
    field[2, 2], field[0, 0] = 99, 9
    assert np.allclose(logarithm(field)[[2, 0, 1], [2, 0, 1]], [1, 0.5, 0])
    assert squares(logarithm(field), (0.5, 0.99)) == [(0.5, 1, 1 / 25), (0.99, 5, 1)]
    assert squares(field, (0.5, 0.9)) == [(0.5, 1, 1 / 25), (0.9, 1, 1 / 25)]


def test_bad_input(model):
    with pytest.raises(ValueError, match="images: there are none"):
        effective_fields(model, [])
    with pytest.raises(UserError, match=r"images: of \(16, 16\) and \(16, 20\) pixels"):
        effective_fields(model, [torch.randn(1, 1, 16, side, dtype=torch.float64) for side in (16, 20)])
    with pytest.raises(ValueError, match="call model"):
        effective_fields(model.train(), [])
    with pytest.raises(UserError, match="no neighborhood attention"):
        effective_fields(torch.nn.Identity(), [])
