"""README and docs/volumes.md are true: their Python runs, their commands compose, the table holds published facts."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dinat.data.digits import Digits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
VOLUMES = (ROOT / "docs" / "volumes.md").read_text()
PYTHON = [block for page in (README, VOLUMES) for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", README + VOLUMES, re.DOTALL)
    for line in block.splitlines()
    if re.search(r"\b(train|eval)\.py\b", line) and not line.startswith("#")
]


@pytest.mark.parametrize("block", PYTHON, ids=[str(i) for i in range(len(PYTHON))])
def test_python(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Later blocks use the imports of the first one.
    exec("import dinat, timm, torch\n" + block, {})


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(c)[-40:] for c in COMMANDS])
def test_command_line_composes(command):
    script = next(i for i, word in enumerate(command) if word in ("train.py", "eval.py"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = [word for word in command[script + 1 :] if "=" in word]
        overrides = [word.split(",")[0] for word in words] if "-m" in command else words  # a sweep's first job
        compose(Path(command[script]).stem, overrides=overrides)


def test_model_table(published):
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
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


def test_accuracy_of_the_default_job():
    """README and configuration say the same, and the percentages are those of the numbers of images."""
    comment = (ROOT / "configs" / "experiment" / "digits.yaml").read_text().replace("\n#", "")
    least, most, images = map(int, re.search(r"(\d+) to (\d+) of the (\d+) images", comment).groups())
    assert images == len(Digits("validation"))
    claim = f"{100 * least / images:.1f} to {100 * most / images:.1f} % top-1, depending on seed and machine"
    assert claim in comment
    assert claim in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
