"""`tinyllm pull`: bring a named model into the user's cache folder."""

from __future__ import annotations

import argparse
from typing import Any

from tinyllm.cli import console
from tinyllm.cli.console import UsageError

__all__ = ["add_parser"]

_EPILOG = """\
examples:
  tinyllm pull --list
  tinyllm pull smollm2-135m-instruct

The file's SHA-256 digest is pinned and checked, for a model that is here already too; an interrupted download leaves
nothing behind. TINYLLM_CACHE names another folder than the user's cache folder. Prints the path of the file; that of
tales-4m, which comes with tinyllm, is a folder inside the installation.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "pull",
        help="download a named model",
        description="Downloads a model by its name, or lists the names.",
        epilog=_EPILOG,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the model to download")
    parser.add_argument("--list", "-l", action="store_true", help="list the models, and which of them are here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tinyllm import hub

    if args.list == (args.name is not None):
        raise UsageError("give either a name or --list (see: tinyllm pull --help)")
    if args.name is not None:
        console.write(f"{hub.pull(args.name)}\n")
        return 0
    width = max(map(len, hub.MODELS))
    for name, model in hub.MODELS.items():
        size = console.format_bytes(model.nbytes)
        console.write(f"{name:<{width}}  {size:>9}  {model.license}  {model.description}  [{model.where}]\n")
    return 0
