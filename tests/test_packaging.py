"""The package from outside: what the wheel holds, what imports cost, that nothing gets in another package's way."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run_python(script: str, cwd: Path = ROOT, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def source_files(root: Path = ROOT) -> list[str]:
    """Paths of what git tracks: not what else a checkout holds, such as virtual environments under any name."""
    command = ["git", "ls-files", "--cached"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()


def copy_sources(root: Path, copy: Path) -> None:
    for name in source_files(root):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves its build folder beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    copy_sources(ROOT, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    return next((copy / "dist").glob("*.whl"))


def test_an_environment_in_the_checkout_is_no_source(tmp_path):
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    (root / "package" / "module.py").touch()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    for name in ("venv", "env", "my environment"):
        (root / name / "lib").mkdir(parents=True)
        (root / name / "lib64").symlink_to("lib")
        (root / name / "pyvenv.cfg").touch()
    copy_sources(root, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()] == ["module.py"]


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


def test_every_dependency_has_a_lower_bound(wheel):
    """So that the lowest versions that an installer may choose are those that `.ci/matrix` tests."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    requirements = [Requirement(line) for line in lines]
    assert len(requirements) > 20
    unbounded = [r.name for r in requirements if r.name != "dinat" and ">=" not in {s.operator for s in r.specifier}]
    assert unbounded == []


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
