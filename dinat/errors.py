"""The errors a user can cause, and the one way they are worded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked for, not in this package.

    The message names the argument, the value it had and what would be right. The command line prints it alone, without
    a traceback, and exits with status 2.
    """


class CheckpointError(UserError, RuntimeError):
    """Weights that cannot be had, are not what they should be, or do not fit; a RuntimeError as in timm and PyTorch."""


def explain_os(error: OSError) -> str:
    """What the system refused, of which file: a full disk, a folder that one may not write to, a lost connection."""
    return f"{error.filename}: {error.strerror}." if error.filename else str(error)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Ends a message about an unknown `name`: " Did you mean a, b?" with up to `count` close matches, or ""."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(matches)}?" if matches else ""
