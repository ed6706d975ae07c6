"""The command line `dinat`: models and their weights. Training and evaluation are Hydra's, in `dinat.cli`."""

from __future__ import annotations

import sys

import typer

from dinat import export
from dinat.commands import catalogue, inspect, predict, weights
from dinat.errors import UserError, explain_os

app = typer.Typer(
    help="Neighborhood-attention vision models: what there is, their weights, and what they see.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    catalogue.list_models,
    catalogue.info,
    weights.download,
    weights.verify,
    weights.convert,
    weights.push,
    predict.predict,
):
    app.command("list" if command is catalogue.list_models else None)(command)
app.command("export")(export.command)
app.add_typer(inspect.app, name="inspect")


def main() -> None:
    """Console script `dinat`. A mistake is told in one message, with exit status 2."""
    try:
        app(prog_name="dinat")
    except (UserError, OSError) as error:
        print(f"error: {explain_os(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(2)
