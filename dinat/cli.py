"""The command line: Hydra around the engine, and mistakes told in one message instead of a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinat import engine
from dinat.errors import UserError, explain_os, nearest

USER_ERROR = 2  # exit status
RANK = int(os.environ.get("RANK", 0))  # of this process, where torchrun started it


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Tells a user's mistake in one message, with exit status 2, and an interruption with how to continue.

    Around the jobs themselves too, because Hydra announces what passes through it.
    """
    try:
        yield
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except OSError as error:
        fail(explain_os(error))
    except KeyboardInterrupt:  # before training can be continued, or of an evaluation
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except engine.Interrupted as stopped:
        kept = [arg for arg in sys.argv[1:] if not arg.startswith(("dir=", "resume=", "hydra.run.dir="))]
        command = shlex.join([Path(sys.argv[0]).name, *kept, f"dir={stopped.run_dir}", "resume=auto"])
        if RANK == 0:
            print(f"{stopped}\ncontinue with: {command}", file=sys.stderr)
        sys.exit(128 + stopped.signum)


def fail(message: str) -> NoReturn:
    """Prints an error and exits."""
    print(f"error{f' (rank {RANK})' if RANK else ''}: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


@plainly()
def train_job(cfg: DictConfig) -> float:
    """Hydra's job for training: the returned figure (%) is what a sweeper maximises."""
    return engine.train(cfg, HydraConfig.get().runtime.output_dir)


@plainly()
def eval_job(cfg: DictConfig) -> float:
    """Hydra's job for evaluation: prints the result as one line of JSON and returns the headline figure (%)."""
    result = engine.evaluate(cfg)
    if RANK == 0:
        print(json.dumps(result), flush=True)
    return result[result["headline"]]


def train() -> None:
    """Trains as the command line (`sys.argv`) says, in this process."""
    run(hydra.main(version_base="1.3", config_path="pkg://dinat.configs", config_name="train")(train_job))


def evaluate() -> None:
    """Evaluates as the command line (`sys.argv`) says, in this process."""
    run(hydra.main(version_base="1.3", config_path="pkg://dinat.configs", config_name="eval")(eval_job))


def dinat_train() -> None:
    """Console script `dinat-train`."""
    wait_passively()
    train()


def dinat_eval() -> None:
    """Console script `dinat-eval`."""
    wait_passively()
    evaluate()


def wait_passively() -> None:
    """Starts the process anew where OpenMP's threads would spin while they wait for one another.

    That slows small operations down, up to ten times where something else runs on the machine. OpenMP takes its setting
    when PyTorch is loaded, which has been by now: train.py and eval.py are there before.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@plainly()
def run(main: Callable[[], Any]) -> None:
    """Calls a function made by `hydra.main`."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # leave exceptions to us
    if RANK > 0:
        sys.argv.append("hydra.run.dir=.")  # rank 0 makes the run folder, and tells the others in engine.train
    main()


def explain(error: Exception) -> str:
    """Hydra's message about a command line: the nearest name where one does not exist, the quotes where they lack."""
    message = str(error).split("\nConfig search path")[0]
    if missing := re.match(r"Could not override '([^']+)'", message):
        key, known = missing[1], known_keys()
        if inner := re.search(rf"full_key: ({re.escape(key)}\.\S+)", str(error.__cause__)):
            return f"{inner[1]}: new in {key}. Write ++{key}=... to add it."
        if key in known:
            return f"{key}: not a setting of this command; the other of train.py and eval.py has it."
        return (
            f"{key}: no such configuration key.{nearest(key, known)} "
            f"To add one to a free-form section such as model.kwargs, write +{key}=..."
        )
    if isinstance(error, MissingConfigException) and error.options and "/" in (error.missing_cfg_file or ""):
        group, _, name = error.missing_cfg_file.rpartition("/")
        known = f" Known: {', '.join(error.options)}."
        return f"{group}={name}: no such choice.{nearest(name, error.options) or known}"
    if isinstance(error, OverrideParseException) and (right := quoted(error.override)):
        return f"{error.override}: the value has characters that need quotes. Write {shlex.quote(right)}"
    return message


def quoted(override: str) -> str | None:
    """An override that Hydra cannot parse, with its value in quotes; None where they are not what it lacks."""
    key, _, value = override.partition("=")
    if not value:
        return None
    escaped = re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + match[2].replace('"', r"\""), value)
    try:
        meant = OverridesParser.create().parse_override(f'{key}="{escaped}"').value()
    except OverrideParseException:
        return None
    return f'{key}="{escaped}"' if meant == value else None


def known_keys() -> list[str]:
    """All keys of both commands' configurations."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("dinat.configs", version_base="1.3"):
        configs = [OmegaConf.to_container(hydra.compose(name)) for name in ("train", "eval")]
    return sorted({key for config in configs for key in flatten(config)})


def flatten(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all entries of a nested dict."""
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
