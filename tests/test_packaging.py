"""The package from outside: what the wheel holds, what imports cost, that nothing gets in another package's way."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(script: str, cwd: Path = ROOT, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def source_files() -> list[str]:
    """Paths of what git tracks, or would if it were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves its build folder beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in source_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    return next((copy / "dist").glob("*.whl"))


def test_wheel_is_pure_and_holds_exactly_two_packages(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dinat", "dinat_kernels"}


def test_wheel_holds_every_source_and_configuration(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for name in source_files():
        if name.startswith("dinat/"):
            expected.add(name)
        elif name.startswith("kernels/dinat_kernels/"):
            expected.add(name.removeprefix("kernels/"))
        elif name.startswith("configs/"):
            expected.add(f"dinat/{name}")
    assert expected
    assert expected == {name for name in names if ".dist-info/" not in name}


def test_import_pulls_in_neither_triton_nor_hydra():
    loaded = run_python(
        "import sys, timm; before = set(sys.modules); import dinat; print(*(set(sys.modules) - before))"
    )
    assert not {name.split(".")[0] for name in loaded.split()} & {"triton", "hydra", "omegaconf", "transformers"}


def test_import_adds_few_modules():
    """A cheap import, counted rather than timed: nothing but our own modules and what they need of timm and torch."""
    loaded = run_python(
        "import sys, timm; before = set(sys.modules); import dinat; print(*(set(sys.modules) - before))"
    )
    assert {name.split(".")[0] for name in loaded.split()} <= {"dinat", "dinat_kernels", "torch"}
    assert len(loaded.split()) < 60


def test_import_warns_of_nothing():
    run_python("import warnings, timm; warnings.simplefilter('error'); import dinat")


def test_operator_stands_alone():
    script = "import sys, dinat_kernels; print([m for m in ('timm', 'dinat', 'triton', 'hydra') if m in sys.modules])"
    assert run_python(script, PYTHONPATH=str(ROOT / "kernels")) == "[]"


def test_transformers_imports_from_the_repository_root(tmp_path):
    """Hugging Face has a package named `kernels`, as is our source folder: theirs must win."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    run_python("import kernels, transformers; assert kernels.theirs", PYTHONPATH=str(tmp_path))
