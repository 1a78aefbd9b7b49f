"""`alf-moe train --help`: every setting with its default and description, rendered from the schema."""

from __future__ import annotations

import sys
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe.config import Config


def show_help(flags: dict[str, str], exit_codes: dict[int, str]) -> None:
    """The flags, the exit codes and every setting with its default, from the schema."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print("usage: alf-moe train --config FILE [--nproc N] [--resume | --clean] [--SECTION.SETTING VALUE ...]\n")

    def table(title: str, rows: list[tuple[str, ...]]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        for row in rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(Text(title, style="bold"))
        console.print(grid, "")

    table("options", list(flags.items()))
    for name, section in Config.model_fields.items():
        fields = section.annotation.model_fields  # type: ignore[union-attr]
        rows = [
            (f"--{name}.{key}", kind(info.annotation), default(info), info.description or "")
            for key, info in fields.items()
        ]
        table(name, rows)
    table("exit codes", [(str(code), meaning) for code, meaning in exit_codes.items()])


def kind(annotation: Any) -> str:
    """A type in a user's words: `int`, `none|sign`, `true|false`."""
    if annotation is bool:
        return "true|false"
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return {"str": "text"}.get(annotation.__name__, annotation.__name__)
    if get_origin(annotation) is dict:
        return "table"
    return "|".join(
        kind(part)
        for part in get_args(annotation)
        if part is not NoneType and (isinstance(part, type) or get_origin(part))
    )


def default(info: Any) -> str:
    """The default of a setting; settings without one are required."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "–" if value is None or value == {} else str(value).lower() if isinstance(value, bool) else str(value)
