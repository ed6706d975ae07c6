"""D-Former's encoder from the block on docs/volumes.md, against outputs of the original code."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch
from dinat_kernels import na3d
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "golden" / "families"
PAGE = (ROOT / "docs" / "volumes.md").read_text()
GOLDEN = load_file(FOLDER / "dformer.safetensors")
spec = importlib.util.spec_from_file_location("family_fill", FOLDER / "fill.py")
fill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill)


@pytest.fixture(scope="module")
def page() -> dict:
    """The names that the page defines."""
    (code,) = re.findall(r"```python\n(import torch\nfrom dinat_kernels import na3d\n.*?)```", PAGE, re.DOTALL)
    exec(code, names := {})
    return names


def by_parts(q, k, v):
    """Local attention as the original has it where groups do not divide an axis: whole groups, and what is left."""
    parts = []
    for length, group in zip(q.shape[1:4], (2, 8, 8), strict=True):
        whole = length // group * group
        parts.append([(slice(0, whole), group)] + [(slice(whole, None), length - whole)] * (whole < length))
    out = torch.empty_like(q)
    for corner in itertools.product(*parts):
        place = (slice(None), *(part for part, _ in corner))
        window = [group for _, group in corner]
        out[place] = na3d(q[place], k[place], v[place], window, stride=window)
    return out


class Stage(nn.Module):
    """Position by a depthwise convolution, blocks, and the concatenation of 2 x 2 x 2 neighbors but in the last."""

    def __init__(self, block: type[nn.Module], dim: int, depth: int, last: bool) -> None:
        super().__init__()
        self.pos_block = nn.ModuleDict({"proj": nn.Sequential(nn.Conv3d(dim, dim, 3, padding=1, groups=dim))})
        self.blocks = nn.ModuleList(block(dim, index) for index in range(depth))
        if not last:
            self.downsample = nn.ModuleDict(
                {"norm": nn.LayerNorm(8 * dim), "reduction": nn.Linear(8 * dim, 2 * dim, bias=False)}
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.pos_block["proj"](x.movedim(-1, 1)).movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        if not hasattr(self, "downsample"):
            return x, x
        neighbors = [x[:, d::2, h::2, w::2] for d, h, w in itertools.product((0, 1), repeat=3)]
        return x, self.downsample["reduction"](self.downsample["norm"](torch.cat(neighbors, -1)))


def matches(x: torch.Tensor, name: str) -> None:
    tokens = x.flatten(1, 3)
    step = max(1, tokens.shape[1] // 512)
    assert tuple(x.shape) == tuple(GOLDEN[f"{name}/shape"].tolist())
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.mean(1), GOLDEN[f"{name}/channel_mean"], **close)
    torch.testing.assert_close(tokens.std(-1, unbiased=False)[:, ::step], GOLDEN[f"{name}/token_std"], **close)


@pytest.mark.parametrize("size", [(32, 64, 64), (32, 96, 96)])
@torch.inference_mode()
def test_encoder(size, page):
    """Level 1 of the larger volume is 8 x 12 x 12: groups of (2, 8, 8) leave a rest, and global ones are 12 wide."""
    case = f"dformer@1x{'x'.join(map(str, size))}"
    depths = (2, 2, 6, 2)
    model = nn.ModuleDict(
        {
            "patch_embed": nn.ModuleDict({"proj": nn.Conv3d(1, 96, (2, 4, 4), (2, 4, 4)), "norm": nn.LayerNorm(96)}),
            "layers": nn.ModuleList(Stage(page["Block"], 96 * 2**i, depth, i == 3) for i, depth in enumerate(depths)),
        }
    )
    fill.fill_(model, lambda key: f"model_down.{key}")
    image = fill.tensor_for_input(f"image/1x1x{'x'.join(map(str, size))}", (1, 1, *size))
    embed = model["patch_embed"]
    x = embed["norm"](embed["proj"](image).movedim(1, -1))
    matches(x, f"{case}/patch_embed")
    for i, stage in enumerate(model["layers"]):
        if x.shape[2] % 8 and x.shape[2] > 8:
            stage.blocks[0].attention = by_parts
        last, x = stage(x)
        matches(last, f"{case}/layers.{i}.blocks.{depths[i] - 1}")
        matches(x, f"{case}/layers.{i}")


def test_the_groups_of_the_page(page):
    """In full: which tokens attend to each other, by the definition."""
    q, k, v = torch.randn(3, 1, 4, 16, 24, 1, 4)
    place = torch.cartesian_prod(*map(torch.arange, (4, 16, 24)))
    group = torch.tensor(page["GROUP"])
    steps = torch.tensor([4, 16, 24]) // group
    for name, label in (("local_attention", place // group), ("global_attention", place % steps)):
        mask = (label[:, None] == label).all(-1)
        expected = F.scaled_dot_product_attention(*(x.flatten(1, 3).transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        torch.testing.assert_close(page[name](q, k, v).flatten(1, 3), expected.transpose(1, 2))
