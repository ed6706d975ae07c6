"""The entry points in this process: what they return, print and exit with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinat import cli, engine
from dinat.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def called(monkeypatch, capsys):
    """Runs an entry point on a command line: (exit status, stdout, stderr)."""

    def called(entry, *arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            entry()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return called


@pytest.fixture
def trains(monkeypatch):
    """Stands in for engine.train: keeps the configuration and the run folder, and does what it is told."""
    seen = []
    outcome = {}

    def train(cfg, run_dir):
        seen.append((cfg, run_dir))
        if "raises" in outcome:
            raise outcome["raises"]
        return 12.5

    monkeypatch.setattr(engine, "train", train)
    return seen, outcome


def test_overrides_and_the_run_folder_reach_the_engine(called, trains, tmp_path):
    status, out, err = called(cli.train, "optimizer.lr=0.25", "data=folder", "data.root=/d", f"dir={tmp_path}/run")
    assert (status, out, err) == (0, "", "")
    ((cfg, run_dir),) = trains[0]
    assert (cfg.optimizer.lr, cfg.data.name, cfg.data.root) == (0.25, "folder", "/d")
    assert run_dir == f"{tmp_path}/run"


@pytest.mark.parametrize("name", ["", "mine"])
def test_run_folders_are_by_name_and_time(called, trains, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    called(cli.train, *([f"name={name}"] if name else []))
    ((_, run_dir),) = trains[0]
    folder = tmp_path / "runs" / (name or "digits")
    assert run_dir.startswith(str(folder))
    assert len(run_dir.removeprefix(f"{folder}/")) == len("2026-01-31_12-00-00")


def test_what_training_returns_is_for_a_sweeper(monkeypatch):
    monkeypatch.setattr(engine, "train", lambda cfg, run_dir: 12.5)
    runtime = type("Runtime", (), {"output_dir": "run"})
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: type("Config", (), {"runtime": runtime}))
    assert cli.train_job(OmegaConf.create({})) == 12.5


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped\n"),
        (OSError(28, "No space left on device", "/runs/x.pt"), 2, "error: /runs/x.pt: No space left on device.\n"),
        (ConnectionError("the hub is down"), 2, "error: the hub is down\n"),
    ],
)
def test_what_is_not_our_mistake_is_one_line(called, trains, tmp_path, raised, status, message):
    trains[1]["raises"] = raised
    assert called(cli.train, f"dir={tmp_path}/x") == (status, "", message)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_says_how_to_continue(called, trains, tmp_path, signum):
    trains[1]["raises"] = engine.Interrupted(signum, tmp_path / "a run", 7)
    status, _, err = called(cli.train, "seed=3", f"dir={tmp_path}/x", "resume=auto", "name='two words'")
    assert status == 128 + signum
    assert f"stopped by {signum.name} after 7 updates; saved {tmp_path}/a run/last.pt" in err
    assert err.splitlines()[-1] == (
        f"""continue with: train.py seed=3 'name='"'"'two words'"'"'' 'dir={tmp_path}/a run' resume=auto"""
    )


@pytest.mark.parametrize(("rank", "begins"), [(0, "error: x is wrong\n"), (3, "error (rank 3): x is wrong\n")])
def test_a_mistake_is_one_message(called, trains, monkeypatch, tmp_path, rank, begins):
    monkeypatch.setattr(cli, "RANK", rank)
    trains[1]["raises"] = UserError("x is wrong")
    monkeypatch.chdir(tmp_path)
    assert called(cli.train, f"dir={tmp_path}/run") == (2, "", begins)
    assert (tmp_path / "run").exists() == (rank == 0)  # only the first process makes a folder


def test_a_defect_is_not_hidden(called, trains, tmp_path):
    trains[1]["raises"] = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        called(cli.train, f"dir={tmp_path}/run")


@pytest.mark.parametrize("rank", [0, 1])
def test_evaluation_is_printed_once(called, monkeypatch, tmp_path, rank):
    monkeypatch.setattr(cli, "RANK", rank)
    result = {"top1": 50.0, "task": "classification", "headline": "top1"}
    monkeypatch.setattr(engine, "evaluate", lambda cfg: result | {"seen": [cfg.checkpoint, cfg.use_ema]})
    monkeypatch.chdir(tmp_path)
    status, out, _ = called(cli.evaluate, "checkpoint=here", "use_ema=false")
    assert status == 0
    assert out == (json.dumps(result | {"seen": ["here", False]}) + "\n" if rank == 0 else "")


def test_misspelt_key(called):
    status, out, err = called(cli.train, "optimizer.lrr=1")
    assert (status, out) == (2, "")
    assert err.startswith("error: optimizer.lrr: no such configuration key. Did you mean optimizer.lr")
    status, _, err = called(cli.evaluate, "use_emma=false")
    assert err.startswith("error: use_emma: no such configuration key. Did you mean use_ema")


def test_a_key_that_has_to_be_set(called, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "train", lambda cfg, run_dir: cfg.data.name)
    status, _, err = called(cli.train, "data=default", f"dir={tmp_path}/run")
    assert status == 2
    assert "data.name" in err
    assert "Traceback" not in err


def test_names_of_nested_keys():
    assert list(cli.flatten({"a": {"b": {"c": 1}, "d": None}, "e": 2})) == ["a", "a.b", "a.b.c", "a.d", "e"]
    assert {"optimizer.kwargs.eps", "checkpoint.every_steps", "use_ema", "per_class"} <= set(cli.known_keys())


@pytest.mark.parametrize(
    ("start", "users", "expected"),
    [
        ("train.py", None, "PASSIVE"),
        ("eval.py", None, "PASSIVE"),
        ("dinat.cli.dinat_train", None, "PASSIVE"),
        ("dinat.cli.dinat_eval", None, "PASSIVE"),
        ("train.py", "ACTIVE", "ACTIVE"),
    ],
)
def test_threads_wait_passively_unless_the_user_says_otherwise(start, users, expected, tmp_path):
    """OpenMP reads the variable when PyTorch is loaded: a finder of modules tells what it is the last time."""
    script = tmp_path / "start.py"
    call = f"runpy.run_path({str(ROOT / start)!r}, run_name='other')"
    if not start.endswith(".py"):
        call = f"import dinat.cli; sys.argv[1:] = ['--version']; {start}()"
    script.write_text(
        "import os, runpy, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"{call}\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": users} if users else {}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    told = [line for line in run.stdout.splitlines() if line in ("None", "ACTIVE", "PASSIVE")]
    assert told[-1] == expected, run.stderr
