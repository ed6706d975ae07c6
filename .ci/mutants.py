"""Plants slips into the code, one at a time, and sees whether its tests notice: `python .ci/mutants.py [PATTERN ...]`.

A slip is an entry of .ci/slips/*.yaml: in `file`, `old` text that occurs once becomes `new`; `what` says what that is,
`tests` (paths or node ids, by spaces) should fail then. No test can see one that has an argument, `equivalent`, why
it changes nothing. A PATTERN selects the slips whose "file: what" contains it. All of them take an hour or two.
"""

import argparse
import collections
import itertools
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CAUGHT, EQUIVALENT = "caught", "equivalent"  # verdicts that are as they should be


@dataclass(frozen=True)
class Slip:
    file: str
    what: str
    old: str
    new: str
    tests: str
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    def planted(self, text: str) -> str | None:
        """The file's text with the slip; None if it is stale."""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 and self.old != self.new else None


def all_slips() -> list[Slip]:
    """Every slip of every list."""
    lists = sorted((ROOT / ".ci" / "slips").glob("*.yaml"))
    return [Slip(**entry) for path in lists for entry in yaml.safe_load(path.read_text())]


def clone(folder: Path) -> Path:
    """A copy of the working tree in `folder`, whose code is what runs there."""
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "dinat" / "configs").symlink_to("../configs")  # where an installed package has them
    imports = "import dinat.configs, dinat_kernels; print(dinat.configs.__file__, dinat_kernels.__file__)"
    found = run([sys.executable, "-c", imports], folder).stdout.split()
    if not (found and all(Path(path).is_relative_to(folder) for path in found)):
        raise RuntimeError(f"another dinat than that in {folder} is imported: {found}")
    return folder


def run(command: list[str], root: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in a clone; without bytecode, which two slips within a second would share."""
    paths = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=os.environ | paths | environment, capture_output=True, text=True)


def test(tests: list[str], root: Path) -> tuple[int, list[str]]:
    """pytest's exit status, and what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
    done = run(command, root, TRITON_INTERPRET=str(int(any(map(interpreted, tests)))))
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return done.returncode, [line.split(" ", 1)[1].split(" - ")[0] for line in failed]


def interpreted(test: str) -> bool:
    """Whether a test runs kernels in Triton's interpreter, which takes a process of its own."""
    return "interpreter_suite" in test


def examine(slip: Slip, root: Path) -> tuple[str, str]:
    """Verdict on a slip, and the test that led to it."""
    file = root / slip.file
    text = file.read_text()
    planted = slip.planted(text)
    if planted is None:
        return "STALE", ""
    file.write_text(planted)
    try:
        status, failed = test(["-x", *slip.tests.split()], root)
    finally:
        file.write_text(text)
    if status == 0:
        return (EQUIVALENT if slip.equivalent else "SURVIVED"), slip.equivalent
    if status != 1 and not failed:
        return f"PYTEST FAILED ({status})", slip.tests
    return ("NOT EQUIVALENT" if slip.equivalent else CAUGHT), failed[0]


def main(patterns: list[str], jobs: int) -> int:
    slips = [slip for slip in all_slips() if not patterns or any(pattern in str(slip) for pattern in patterns)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        clones: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            clones.put(clone(Path(folder).resolve() / str(job)))

        def judge(slip: Slip) -> tuple[str, str]:
            root = clones.get()
            try:
                verdict, by = examine(slip, root)
            finally:
                clones.put(root)
            print(f"{verdict:10} {slip}   [{by}]", flush=True)
            return verdict, by

        verdicts = list(pool.map(judge, slips))
        seeing = sorted({by for verdict, by in verdicts if verdict == CAUGHT}, key=interpreted)
        untouched = clones.get()
        failing = {by for _, group in itertools.groupby(seeing, interpreted) for by in test(list(group), untouched)[1]}
    table = collections.defaultdict(collections.Counter)
    for slip, (verdict, by) in zip(slips, verdicts, strict=True):
        table[slip.file]["FAILS WITHOUT IT" if by in failing else verdict] += 1
    for file, counts in [*sorted(table.items()), ("all", sum(table.values(), collections.Counter()))]:
        print(f"{file:45} {counts.total():4} slips: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}")
    for by in failing:
        print(f"fails without any slip: {by}")
    return int(any(set(counts) - {CAUGHT, EQUIVALENT} for counts in table.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="*")
    parser.add_argument("--jobs", type=int, default=1, help="slips at a time, each in a copy of its own")
    arguments = parser.parse_args()
    sys.exit(main(arguments.pattern, arguments.jobs))
