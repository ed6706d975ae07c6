"""What heads do, against numbers worked out by hand and gates written out."""

import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from dinat.errors import UserError
from dinat.inspect import attention, blocks, describe_heads

# Sums of the distances from a token of 3 x 3 to all of them, in tokens.
MIDDLE = 4 + 4 * math.sqrt(2)
EDGE = 3 * 1 + 2 * math.sqrt(2) + 2 + 2 * math.sqrt(5)
CORNER = 2 * 1 + math.sqrt(2) + 2 * 2 + 2 * math.sqrt(5) + math.sqrt(8)


@pytest.fixture
def model():
    """Two levels; at 6 x 6 pixels, the first map is 3 x 3, the second 2 x 2, padded to 3 x 3."""
    options = dict(num_classes=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), kernel_size=3)
    model = timm.create_model("dinat_pico", **options).eval()
    for block in blocks(model):
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.rpb)
    torch.nn.init.normal_(model.head.fc.weight)
    return model


def test_even_weights_of_3_x_3_tokens(model):
    """Each query sees all nine tokens: distances in tokens are 1 and sqrt 2 of the middle one, and so on by hand."""
    first, _, second, _ = describe_heads(model, [torch.randn(2, 3, 6, 6)], "none")
    expected = (MIDDLE + 4 * EDGE + 4 * CORNER) / 9 / 9  # mean over nine queries of nine keys each
    assert first.distance == pytest.approx(2 * expected)  # tokens are 2 pixels apart
    assert second.distance == pytest.approx(4 * (CORNER + 2 * EDGE + MIDDLE) / 4 / 9)  # padding is seen
    assert first.entropy == pytest.approx(math.log(9))
    assert first.divergence == pytest.approx(0, abs=1e-6)
    assert first.rings == pytest.approx([1 / 9, 40 / 81, 32 / 81])  # 9, 8 + 4 * 5 + 4 * 3 and 4 * 3 + 4 * 5 of 81
    assert first.pattern == pytest.approx(np.full((3, 3), 1 / 9))


def test_a_static_head_and_one_that_goes_by_content(model):
    attn = blocks(model)[0].attn
    attn.rpb.data[1, 2, 3] = 50  # the token to the right, where it is in the window
    images = torch.randn(2, 3, 20, 14)
    even, static = describe_heads(model, [images], "none")[:2]
    expected = np.zeros((3, 3))
    expected[1, 2] = 1
    assert static.pattern == pytest.approx(expected, abs=1e-6)
    assert static.bias == pytest.approx(expected, abs=1e-6)
    assert static.divergence == pytest.approx(0, abs=1e-6)
    # the last column of 7 is even: in 8 rows of 10, 1, 5 and 3 of 9 keys, in the others 1, 3 and 5
    assert static.rings == pytest.approx([10 / 630, 6 / 7 + 46 / 630, 34 / 630], abs=1e-6)
    assert even.distance > 0
    torch.nn.init.normal_(attn.qkv.weight, std=2)
    layer = attention(model, images)[0]
    head = describe_heads(model, [images[:1], images[1:]], "none")[0]  # its bias is even
    assert head.divergence == pytest.approx(math.log(9) - head.entropy, abs=1e-5)
    interior = layer.weights[:, 0, 1:-1, 1:-1].unflatten(-1, (3, 3)).mean((0, 1, 2))
    assert head.pattern == pytest.approx(interior.numpy(), abs=1e-6)


def test_a_dilated_head(model):
    """Four dilation groups of 3 x 3: two columns look one step of 2 tokens to the right, the third one everywhere."""
    model.set_input_size(dilations=[[2], [1]])
    blocks(model)[0].attn.rpb.data[:, 2, 3] = 50
    head = describe_heads(model, [torch.randn(1, 3, 12, 12)], "none")[0]
    assert head.distance == pytest.approx(4 * (2 / 3 + (EDGE + 2 * CORNER) / 27 / 3))
    assert head.rings == pytest.approx([1 / 27, 2 / 3 + 11 / 81, 13 / 81])


@pytest.mark.parametrize("importance", ["gradient", "ablation"])
def test_importance(model, importance):
    """Gates are the columns of the projection that a head fills."""
    for block in blocks(model):
        torch.nn.init.normal_(block.attn.qkv.weight)
    images, step = torch.randn(3, 3, 12, 14), 1e-3
    model.double()
    images = images.double()
    classes = model(images).argmax(1)

    def losses(attn, head, gate):
        weight = attn.proj.weight.data.clone()
        attn.proj.weight.data[:, head * attn.head_dim : (head + 1) * attn.head_dim] *= gate
        with torch.no_grad():
            result = F.cross_entropy(model(images), classes, reduction="none")
        attn.proj.weight.data = weight
        return result

    expected = []
    for block in blocks(model):
        for head in range(2):
            if importance == "ablation":
                change = losses(block.attn, head, 0) - losses(block.attn, head, 1)
            else:
                change = (losses(block.attn, head, 1 + step) - losses(block.attn, head, 1 - step)) / (2 * step)
                change = change.abs()
            expected.append(change.mean().item())
    for batches in ([images], images.split(2)):
        heads = describe_heads(model, batches, importance)
        assert [head.importance for head in heads] == pytest.approx(expected, rel=1e-4)
        assert [(head.block, head.head) for head in heads] == [("0.0", 0), ("0.0", 1), ("1.0", 0), ("1.0", 1)]


def test_rows_of_a_table(model):
    row = describe_heads(model, [torch.randn(1, 3, 8, 8)])[0].row()
    assert list(row) == ["block", "head", "distance", "entropy", "divergence", "importance", "ring0", "ring1", "ring2"]
    assert sum(row[f"ring{i}"] for i in range(3)) == pytest.approx(1)


def test_bad_input(model):
    with pytest.raises(UserError, match=r"importance=gradient: NAT has no classifier. Use importance=none"):
        describe_heads(timm.create_model("dinat_pico", num_classes=0), [])
    with pytest.raises(ValueError, match="images: there are none"):
        describe_heads(model, [])
