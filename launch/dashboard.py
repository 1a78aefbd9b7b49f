"""`alf-moe dashboard`: the W&B view of a project as code.

alf-moe dashboard show                       # what would be pushed
alf-moe dashboard push --project alf-moe     # as a new saved view; views that are there stay as they are
"""

from __future__ import annotations

import argparse
import sys

import moe
from moe.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="alf-moe dashboard", description=(__doc__ or "").split("\n")[0])
    p.add_argument("action", choices=["show", "push"], help="print the panels, or save them as a new view")
    p.add_argument("--project", default="alf-moe", help="W&B project; default: that of observe.wandb_project, alf-moe")
    p.add_argument("--entity", help="W&B user or team; default: yours")
    p.add_argument("--name", default=f"alf-moe {moe.__version__}", help="name of the view")
    return p


def main(argv: list[str]) -> int:
    """Show or push."""
    from moe.observe.dashboard import describe, push

    options = parser().parse_args(argv)
    if options.action == "show":
        print(describe())
        return 0
    try:
        print(f"saved as a new view: {push(options.entity, options.project, options.name)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # whatever W&B and the network raise
        said = (str(error).splitlines() or [""])[0]
        print(
            f"error: W&B did not take the view ({type(error).__name__}: {said}): no view of yours was changed",
            file=sys.stderr,
        )
        return 1
    return 0
