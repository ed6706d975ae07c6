"""docs/command_line.md and docs/inspect.md are true: every command on them is run, and prints what stands there.

`RENEW_PAGE=1 pytest tests/dinat/commands/test_page.py` writes the pages anew, to be read before they are committed.
"""

import os
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image

from dinat.commands import weights
from dinat.commands.weights import known_image_logits

PAGE_S_TYPER = Version(version("typer")) >= Version("0.29")  # whose words for usage the page has
PAGES = [Path(__file__).parents[3] / "docs" / name for name in ("command_line.md", "inspect.md")]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def sessions(page):
    """(command, output) of every command on a page, in order."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for session in block.removeprefix("$ ").split("\n$ "):
            command, _, output = session.partition("\n")
            yield command, output.rstrip("\n")


@pytest.fixture
def workplace(hub, published_weights, tmp_path, monkeypatch, close_session):
    """What the pages assume: a hub with the weights of dinat_mini, a published file, photographs."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # the publisher is out of reach
    close_session()  # a session keeps the proxies it began with
    monkeypatch.chdir(tmp_path)
    torch.save(published_weights("dinat_mini"), "dinat_mini_in1k_224.pth")
    hub.files = {
        "/shi-labs/dinat-mini-in1k-224/resolve/main/pytorch_model.bin": Path("dinat_mini_in1k_224.pth").read_bytes()
    }
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("photo.png", "cats.jpg", "photos/a.png", "photos/b.png")):
        ramp = np.indices((240, 320)).sum(0)[..., None] * [1, 2, 3] + 50 * i
        Image.fromarray((ramp % 256).astype("uint8")).save(name)
    overlay = dict(file="dinat_mini_in1k_224.pth")
    model = timm.create_model("dinat_mini", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    known = tuple(known_image_logits(model, Path("cats.jpg"))[:3].tolist())
    monkeypatch.setattr(weights, "LOGITS", {"dinat_mini.shi_in1k": known})
    yield tmp_path
    close_session()


def general(output: str, workplace: Path) -> str:
    """Without what differs from one machine or version to the next."""
    output = output.replace(str(workplace / "hub"), "~/.cache/huggingface/hub")
    output = output.replace(str(workplace / "torch"), "~/.cache/torch/hub")
    output = re.sub(r"\(MaxRetryError.*(\[Errno \d+\] Connection refused).*", r"\1", output)  # of huggingface_hub 0.x
    output = re.sub(r"\b(?!0{64})[0-9a-f]{40,64}\b", "…", output)
    output = re.sub(r"within \S+ of", "within … of", output)
    output = re.sub(r"\S+ MB, largest difference \S+", "… MB, largest difference …", output)
    output = re.sub(r"\[Errno \d+\]", "[Errno …]", output)
    return "\n".join(line.rstrip() for line in output.splitlines())


def run(page, dinat, workplace):
    for command, expected in sessions(page):
        status, out, err = dinat(*shlex.split(command)[1:])
        yield command, expected, status, general(out + err, workplace)


@each_page
def test_page(page, dinat, workplace):
    for command, expected, status, printed in run(page, dinat, workplace):
        if PAGE_S_TYPER or not expected.lstrip().startswith("Usage: "):
            assert printed == expected, command
        assert status == (2 if re.search("^(error|Error): ", expected, re.MULTILINE) else 0), command


@pytest.mark.skipif(not os.environ.get("RENEW_PAGE"), reason="only to renew the page")
@each_page
def test_renew(page, dinat, workplace):
    text = page.read_text()
    for command, expected, _, printed in run(page, dinat, workplace):
        old = f"$ {command}\n{expected}\n" if expected else f"$ {command}\n"
        text = text.replace(old, f"$ {command}\n{printed}\n", 1)
    page.write_text(text)
