"""`alf-moe report`: run folders in, one HTML file out that opens anywhere without a network.

alf-moe report runs/sign runs/coordinate -o report.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="alf-moe report", description=(__doc__ or "").split("\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are compared")
    p.add_argument("-o", "--out", help="the file to write; default: report.html in RUN, or here for several")
    return p


def check(options: argparse.Namespace) -> tuple[list[Path], Path]:
    """Folders and the file to write. Raises ConfigError."""
    from moe.observe.runs import check_folder

    paths = [Path(run) for run in options.runs]
    for index, path in enumerate(paths):
        check_folder(path)
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise ConfigError(f"{path} is named twice: name each run once")
    out = Path(options.out) if options.out else (paths[0] if len(paths) == 1 else Path()) / "report.html"
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file, for example {out / 'report.html'}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}: create it, or name another file")
    return paths, out


def main(argv: list[str]) -> int:
    """Read, write, say what could not be read."""
    options = parser().parse_args(argv)
    try:
        paths, out = check(options)
        from moe.observe.report import build
        from moe.observe.runs import read_run, unique_names

        runs = [read_run(path) for path in paths]
        unique_names(runs)
        out.write_text(build(runs))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for problem in run.problems:
            print(f"note: {run.name}: {problem}", file=sys.stderr)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
