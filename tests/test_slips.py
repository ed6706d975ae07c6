"""The slips of .ci/mutants.py are about the code and the tests as they are."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("mutants", ROOT / ".ci" / "mutants.py")
mutants = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)
SLIPS = mutants.all_slips()


def test_no_slip_is_stale():
    assert not [str(slip) for slip in SLIPS if slip.planted((ROOT / slip.file).read_text()) is None]


def test_slips_have_names_of_their_own():
    assert len({str(slip) for slip in SLIPS}) == len(SLIPS)


def test_tests_of_slips_exist():
    nodes = {node.partition("[")[0] for slip in SLIPS for node in slip.tests.split()}
    for path, _, name in (node.partition("::") for node in nodes):
        assert f"def {name}" in (ROOT / path).read_text(), f"{path}::{name}"
