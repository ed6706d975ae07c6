"""The page in a browser: the cells it shows are those of the definition, with the weights of the model."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dinat.errors import UserError
from dinat.inspect import attention, blocks, write_page

PIXELS = np.indices((224, 224)).sum(0)[..., None] * [1, 2, 3] % 256
PICTURE = Image.fromarray(PIXELS.astype(np.uint8))
# What the page shows: block, query, and the (row, column, weight) of every key, by rows and columns.
SHOWN = """(cells => ({
    block: document.body.dataset.block,
    head: Number(document.body.dataset.head),
    query: [Number(document.body.dataset.row), Number(document.body.dataset.column)],
    keys: cells.map(key => [key.dataset.row, key.dataset.column, key.dataset.weight].map(Number)),
    drawn: cells.map(key => [key.getAttribute("y"), key.getAttribute("x")].map(Number)),
}))([...document.querySelectorAll(".key")])"""


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    model = timm.create_model("dinat_mini").eval()
    for block in blocks(model):
        torch.nn.init.normal_(block.attn.rpb)
    return attention(model, torch.randn(1, 3, 224, 224))


@pytest.fixture(scope="module")
def file(layers, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "attention.html"
    write_page(path, PICTURE, layers, title="A <b>title</b> & %DATA%", at=(0, 0))
    return path


@pytest.fixture(scope="module")
def page(chromium, file):
    chromium.open(file)
    return chromium


def click_at(page, x, y):
    """Clicks at a pixel of the image."""
    corner = "(x, y) => { const p = new DOMPoint(x, y).matrixTransform(document.getElementById('photo').getScreenCTM())"
    page.click(*page.evaluate(f"({corner}; return [p.x, p.y]; }})({x + 0.5}, {y + 0.5})"))


def visible(query, side, k, d):
    """Tokens of an axis that a query sees, in words: of every d-th one, the k nearest, as far as the border lets."""
    group = list(range(query % d, side, d))
    return sorted(sorted(group, key=lambda key: (abs(key - query), key))[:k])


def check(shown, layers, block, head, pixel):
    layer = next(layer for layer in layers if layer.block == block)
    row, column = (at // stride for at, stride in zip(pixel[::-1], layer.strides, strict=True))
    assert (shown["block"], shown["head"], shown["query"]) == (block, head, [row, column])
    axes = zip((row, column), layer.size, layer.dilation, strict=True)
    rows, columns = (visible(query, side, 7, d) for query, side, d in axes)
    assert [key[:2] for key in shown["keys"]] == [[r, c] for r in rows for c in columns]
    assert shown["drawn"] == [[layer.strides[0] * r, layer.strides[1] * c] for r in rows for c in columns]
    weights = layer.weights[0, :, row, column]
    expected = weights.mean(0) if head < 0 else weights[head]
    np.testing.assert_allclose([key[2] for key in shown["keys"]], expected, atol=weights.max() / 255)


def test_clicks_show_the_window_of_the_query(page, layers):
    for pixel in ((1, 222), (113, 90)):  # at the border, and inside
        click_at(page, *pixel)
        check(page.evaluate(SHOWN), layers, "0.0", -1, pixel)
    for block in ("0.1", "0.2"):  # dilated, and not
        page.press("]")
        check(page.evaluate(SHOWN), layers, block, -1, (113, 90))
    page.evaluate("document.querySelectorAll('#heads button')[2].click()")
    check(page.evaluate(SHOWN), layers, "0.2", 1, (113, 90))
    page.evaluate("(s => { s.value = 17; s.dispatchEvent(new Event('input')); })(document.getElementById('slider'))")
    click_at(page, 222, 3)
    check(page.evaluate(SHOWN), layers, "3.4", 1, (222, 3))
    for key in ("ArrowLeft", "ArrowDown", "[", ".", "."):
        page.press(key)
    check(page.evaluate(SHOWN), layers, "3.3", 3, (222 - 32, 3 + 32))
    for key in ("m", "["):
        page.press(key)
    check(page.evaluate(SHOWN), layers, "3.2", -1, (222 - 32, 3 + 32))


def test_a_moving_mouse_shows_until_a_click_holds(page, layers):
    def move(x, y):
        point = f"new DOMPoint({x}, {y}).matrixTransform(document.getElementById('photo').getScreenCTM())"
        at = page.evaluate(f"(p => [p.x, p.y])({point})")
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
        return page.evaluate("[document.body.dataset.row, document.body.dataset.column]")

    page.press("Escape")
    assert move(40.5, 100.5) != move(200.5, 30.5)
    click_at(page, 100, 100)
    assert move(40.5, 100.5) == move(200.5, 30.5)


def test_nothing_goes_wrong_and_nothing_is_fetched(page, file):
    page.evaluate("document.getElementById('save').click()")
    page.evaluate("0")
    bad = [event for event in page.events if event[0] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    bad += [event for event in page.events if event[0] == "Runtime.consoleAPICalled"]
    assert bad == []
    addresses = [params["request"]["url"] for method, params in page.events if method == "Network.requestWillBeSent"]
    assert [address for address in addresses if not address.startswith(("data:", "blob:"))] == [file.as_uri()]
    assert page.evaluate("document.title") == "A <b>title</b> & %DATA%"
    assert page.evaluate("document.querySelector('h1').textContent") == "A <b>title</b> & %DATA%"


def test_size_of_the_file(file):
    text = file.read_text()
    assert file.stat().st_size < 4e6
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_bad_input(layers, tmp_path):
    path = tmp_path / "page.html"
    for options, message in (
        (dict(block="4.0"), r"block=4\.0: no such block\. There are 0\.0, 0\.1"),
        (dict(block="3.0", head=16), r"head=16: block 3\.0 has heads 0 to 15"),
        (dict(at=(10, 224)), "at=10,224: outside of the image"),
        (dict(picture=PICTURE.resize((320, 224))), r"picture: is 320 x 224 pixels, the maps are of an image of"),
    ):
        with pytest.raises(UserError, match=message):
            write_page(path, options.pop("picture", PICTURE), layers, **options)
    assert not path.exists()
