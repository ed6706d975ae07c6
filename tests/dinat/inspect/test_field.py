"""Receptive fields equal those of the real modules, and numbers worked out before."""

import numpy as np
import pytest
import timm
import torch

from dinat.errors import UserError
from dinat.inspect import blocks, receptive_fields

SMALL = dict(num_classes=0, embed_dim=8, num_heads=(1, 1, 1), mlp_ratio=1.0)


def gradient_fields(model, size):
    """By backpropagation from the tokens of the diagonal, which has every row and every column, after every block."""
    model = model.double().eval()
    outputs = {}
    for block in blocks(model):
        level, index = map(int, block.name.split("."))
        module = model.levels[level].blocks[index]
        module.register_forward_hook(lambda _, __, out, name=block.name: outputs.update({name: out}))
    images = torch.randn(1, 3, *size, dtype=torch.float64).expand(max(size), -1, -1, -1).clone().requires_grad_()
    model(images)
    for name, out in outputs.items():
        height, width = out.shape[1:3]
        tokens = range(max(height, width))
        total = sum(out[i, min(i, height - 1), min(i, width - 1)].sum() for i in tokens)
        (grad,) = torch.autograd.grad(total, images, retain_graph=True)
        yield name, height, width, (grad != 0).any(1)[: len(tokens)].numpy()


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("dinat_pico", dict(depths=(2, 2, 1), kernel_size=3, dilations=[[1, 2], [2, 1], [2]]), (27, 32)),
        ("dinat_s_tiny", dict(depths=(1, 2, 1), kernel_size=3, dilations=[[2], [1, 3], [1]]), (34, 46)),  # odd maps
        ("dinat_isotropic_small", dict(depths=(1, 1, 1), kernel_size=2, dilations=[1, 3, 2], stem_stride=4), (30, 28)),
        ("nat_mini", dict(depths=(1, 1, 1), kernel_size=(5, 3, 7), stem_stride=2), (21, 16)),  # padded at the end
    ],
    ids=["dinat", "dinat_s", "isotropic", "padded"],
)
def test_fields_are_those_of_the_modules(name, options, size):
    model = timm.create_model(name, **SMALL | options)
    fields = {field.block: field for field in receptive_fields(model, size)}
    found = list(gradient_fields(model, size))
    assert [block for block, *_ in found] == list(fields)
    for block, height, width, reached in found:
        field = fields[block]
        assert field.size == (height, width)
        for i, mask in enumerate(reached):
            rows, columns = field.of(min(i, height - 1), min(i, width - 1))
            assert np.array_equal(mask, np.outer(rows, columns)), (block, i)


def test_published_models():
    """docs/inspect.md's numbers, counted by hand for NAT: a stem of 7 pixels, 24 more per block."""
    nat, dinat = (
        receptive_fields(timm.create_model(name, device="meta"), (224, 224)) for name in ("nat_mini", "dinat_mini")
    )
    assert [field.extent()[0] for field in nat[:6]] == [31, 55, 79, 135, 183, 224]
    assert [field.touched() for field in nat[:2]] == [(31, 31), (55, 55)]
    assert [round(100 * field.area(), 1) for field in nat[:6]] == [1.9, 6.0, 12.4, 36.3, 66.7, 100]
    assert [(field.extent()[0], field.touched()[0]) for field in dinat[:3]] == [(31, 31), (223, 217), (224, 224)]
    assert [round(100 * field.area(), 1) for field in dinat[:4]] == [1.9, 93.8, 100, 100]
    assert dinat[0].extent(0, 55) == (28, 31)  # tokens 0 to 6 and 49 to 55, each 4 i - 3 to 4 i + 3
    assert not any(field.exceeds for field in dinat)


def test_holes_and_windows_that_exceed_the_map():
    """Dilated windows alone leave holes: 3 tokens of 4 pixels, 12 pixels apart."""
    options = dict(SMALL, depths=(1, 1, 1), kernel_size=3, stem_stride=4, dilations=[[3], [1], [9]])
    fields = receptive_fields(timm.create_model("dinat_s_tiny", **options), (64, 64))
    assert (fields[0].extent(), fields[0].touched()) == ((28, 28), (12, 12))
    assert [field.exceeds for field in fields] == [False, False, True]
    assert fields[0].least_area() == (12 / 64) ** 2


def test_bad_input():
    with pytest.raises(UserError, match="has no neighborhood attention"):
        receptive_fields(torch.nn.Identity(), (32, 32))
    with pytest.raises(UserError, match="give it without features_only=True"):
        receptive_fields(timm.create_model("dinat_pico", features_only=True), (32, 32))

    class Stem(torch.nn.Conv2d):
        def __init__(self, in_chans, dim, stride, **kwargs):
            super().__init__(in_chans, dim, stride, stride, **kwargs)

    with pytest.raises(UserError, match="the receptive field of a Stem is not known"):
        receptive_fields(timm.create_model("dinat_pico", stem_layer=Stem), (32, 32))
