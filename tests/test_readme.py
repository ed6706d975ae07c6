"""README and docs/ are true: their Python runs, their commands compose, the table holds published facts."""

import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dinat.data.digits import Digits
from dinat.engine.settings import check_settings

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}


def blocks(language: str) -> list:
    """The blocks of code of a language on all pages, each with its page and place as the name of its test."""
    found = []
    for page, text in PAGES.items():
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{page}:{line}"))
    return found


COMMANDS = [
    pytest.param(shlex.split(line, comments=True), id=f"{block.id} {line.split('#')[0].strip()[-40:]}")
    for block in blocks("bash")
    for line in block.values[0].splitlines()
    if re.search(r"\b(train|eval)\.py\b", line) and not line.startswith("#")
]


@pytest.mark.parametrize("block", blocks("python"))
def test_python(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Later blocks of a page use the imports of its first one.
    exec("import dinat, timm, torch\n" + block, {})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_line_composes(command):
    script = next(i for i, word in enumerate(command) if word in ("train.py", "eval.py"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = [word for word in command[script + 1 :] if "=" in word]
        overrides = [word.split(",")[0] for word in words] if "-m" in command else words  # a sweep's first job
        cfg = compose(name := Path(command[script]).stem, overrides=overrides)
    check_settings(cfg, null=name == "eval")


def test_model_table(published):
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PAGES["docs/models.md"], re.MULTILINE
    )
    facts = {
        name: (
            str(model["input_size"][1]),
            f"{model['params'] / 1e6:.1f}",
            f"{model['gmacs']:.1f}",
            str(model["published"]["imagenet1k_top1"]),
        )
        for name, model in published["models"].items()
        if model["published"]["imagenet1k_top1"] is not None
    }
    assert {name: tuple(row) for name, *row in rows} == facts


def test_table_of_dense_models():
    """As their authors say; the names of published models on all pages are in it."""
    words = {"box_ap": "box AP", "mask_ap": "mask AP", "pq": "PQ", "pq_things": "things", "pq_stuff": "stuff"}
    words |= {"miou": "mIoU", "miou_multi_scale": "at several scales"}
    expected = {}
    for name, facts in json.loads((ROOT / "tests" / "golden" / "dense" / "published.json").read_text()).items():
        millions = f"{facts['params'] / 1e6:.1f}" if facts["params"] > 1000 else str(facts["params"])
        figures = ", ".join(f"{word} {facts['figures'][key]}" for key, word in words.items() if key in facts["figures"])
        expected[name] = (millions, "{} / {}".format(*facts["resize"]), figures)
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d.]+) \| (\d+ / \d+) \| (.*) \|$", PAGES["docs/dense.md"], re.MULTILINE)
    assert {name: tuple(row) for name, *row in rows} == expected
    pattern = (
        r"\b(?:mask_rcnn|cascade_mask_rcnn|upernet|mask2former|oneformer)_d?i?nat_\w+\.[a-z]+(?:20k)?_?\w*(?![\w…])"
    )
    named = {
        name for page in PAGES.values() for name in re.findall(pattern, page) if not name.endswith((".pth", ".DATA"))
    }
    assert named <= expected.keys()


def test_accuracy_of_the_default_job():
    """README and configuration say the same, and the percentages are those of the numbers of images."""
    comment = (ROOT / "configs" / "experiment" / "digits.yaml").read_text().replace("\n#", "")
    least, most, images = map(int, re.search(r"(\d+) to (\d+) of the (\d+) images", comment).groups())
    assert images == len(Digits("validation"))
    claim = f"{100 * least / images:.1f} to {100 * most / images:.1f} % top-1, depending on seed and machine"
    assert claim in comment
    assert claim in PAGES["README.md"]
    assert claim in PAGES["docs/start.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert ((ROOT / page).parent / target).exists(), target
