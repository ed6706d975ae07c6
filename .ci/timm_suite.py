"""timm's own model tests on our models: `python .ci/timm_suite.py [pytest's -k expression]`.

Downloads the source distribution of the installed timm (its tests are not in the wheel) and runs its
tests/test_models.py, unedited.  Its two forward_intermediates tests only collect timm's own modules; they are collected
again here for ours.
"""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm

import dinat  # noqa: F401  registers the models

UP_TO_SMALL = "pico or nano or mini or tiny or small"  # the larger ones need up to 12 GB of memory

if "TIMM_TESTS" in os.environ:
    spec = importlib.util.spec_from_file_location("timm_test_models", os.environ["TIMM_TESTS"])
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)

    @pytest.mark.parametrize("name", timm.list_models(module=["nat", "dinat_s", "isotropic"]))
    @pytest.mark.parametrize("test", ["test_model_forward_intermediates", "test_model_forward_intermediates_features"])
    def test_collected_again(test, name):
        getattr(suite, test)(name, 1)


def main(expression: str = UP_TO_SMALL) -> int:
    with tempfile.TemporaryDirectory() as folder:
        release = f"timm=={timm.__version__}"
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "timm", "-d", folder]
        subprocess.run([*download, release], check=True)
        with tarfile.open(next(Path(folder).glob("timm-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        tests = next(Path(folder).glob("timm-*/tests/test_models.py"))
        # As in timm's own CI, which skips the tests that download weights.
        environment = os.environ | {"GITHUB_ACTIONS": "1", "TORCH_BACKEND": "dinat", "TIMM_TESTS": str(tests)}
        ours = " or ".join(timm.list_models(module=["nat", "dinat_s", "isotropic"]))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings"]
        theirs = [
            str(tests),
            "--rootdir",
            str(tests.parents[1]),
            "-c",
            os.devnull,
            "-k",
            f"({ours}) and ({expression})",
        ]
        again = [__file__, "-k", expression]
        return max(subprocess.run([*command, *arguments], env=environment).returncode for arguments in (theirs, again))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
