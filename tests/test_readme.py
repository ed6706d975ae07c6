"""The README is true: its Python runs, its command lines compose, its table holds the published facts."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if re.search(r"\b(train|eval)\.py\b", line) and not line.startswith("#")
]


@pytest.mark.parametrize("block", PYTHON, ids=[str(i) for i in range(len(PYTHON))])
def test_python(block, capsys):
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


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
