"""`alf-moe ckpt ls | verify | diff`: what is in a run's checkpoints, whether they are whole, how two of them differ."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from moe.config import ConfigError

DAMAGED = 5
USAGE = """usage: alf-moe ckpt ls RUN            step, date, size, tokens, held-out loss, whole or not
       alf-moe ckpt verify RUN        every file by its hash, every expert by the census; exit 5 when one is damaged
       alf-moe ckpt diff A B          settings, position and tensors of two checkpoints; exit 1 when they differ

RUN is a run folder or its checkpoints folder, A and B are checkpoints (runs/tiny/checkpoints/step-00001200); verify takes
one checkpoint as well."""


class Damaged(Exception):
    """A checkpoint that cannot be compared, in one sentence. Exit code 5."""


def main(argv: list[str]) -> int:
    """0, 1 (different), 2 (wrong words) or 5 (damaged)."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE)
        return 0 if argv else 2
    command, *words = argv
    arity = {"ls": 1, "verify": 1, "diff": 2}
    try:
        if command not in arity:
            raise ConfigError(f"ckpt {command} is not known: choose one of {', '.join(arity)}")
        if len(words) != arity[command]:
            folders = "two checkpoints" if command == "diff" else "one folder"
            raise ConfigError(f"ckpt {command} takes {folders} and got {len(words)}: see alf-moe ckpt --help")
        paths = [Path(word) for word in words]
        return {"ls": ls, "verify": verify, "diff": diff}[command](*paths)
    except (ConfigError, Damaged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else DAMAGED


def found(path: Path) -> list[Path]:
    """The checkpoints that a path names, oldest first. Raises ConfigError when there is none."""
    from moe.train import manifest

    if path.name.startswith("step-") and path.is_dir():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    names = manifest.steps(folder) if folder.is_dir() else []
    if not names:
        raise ConfigError(f"{path} holds no checkpoint: name a run folder, for example runs/tiny")
    return [folder / name for name in names]


# -- ls ----------------------------------------------------------------------------------------------------------------


def ls(path: Path) -> int:
    """One line a checkpoint; 5 when one is damaged."""
    from moe.observe.console import short
    from moe.train import manifest

    rows, damaged = [("step", "date", "size", "tokens", "val/ce", "")], False
    checkpoints = found(path)
    losses = val_losses(checkpoints[0].parent.parent / "metrics.jsonl")
    for checkpoint in checkpoints:
        problem = manifest.verify(checkpoint)
        damaged = damaged or problem is not None
        step = manifest.step_of(checkpoint.name)
        trainer = trainer_of(checkpoint)
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(trainer["time"])) if "time" in trainer else "?"
        tokens = trainer.get("progress", {}).get("tokens")
        rows.append(
            (
                f"{step:,}",
                date,
                short(size) + "B",
                "?" if tokens is None else short(tokens),
                f"{losses[step]:.4f}" if step in losses else "–",
                "whole" if problem is None else f"damaged: {problem}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip())
    return DAMAGED if damaged else 0


def trainer_of(checkpoint: Path) -> dict[str, Any]:
    """trainer.json, or nothing where it cannot be read."""
    try:
        read = json.loads((checkpoint / "trainer.json").read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def val_losses(metrics: Path) -> dict[int, float]:
    """Held-out loss by step, where it was measured."""
    from moe.observe.sinks import read_metrics

    rows = read_metrics(metrics) if metrics.exists() else []
    return {int(row["train/step"]): row["val/ce"] for row in rows if row.get("val/ce") is not None}


# -- verify ------------------------------------------------------------------------------------------------------------


def verify(path: Path) -> int:
    """One line a checkpoint; 5 when one is damaged."""
    from moe.train.contents import verify_all

    code = 0
    for checkpoint in found(path):
        problem = verify_all(checkpoint)
        print(f"{checkpoint.name}  {'whole' if problem is None else 'damaged: ' + problem}", flush=True)
        code = code if problem is None else DAMAGED
    return code


# -- diff --------------------------------------------------------------------------------------------------------------


def diff(first: Path, second: Path) -> int:
    """Settings, position and tensors; 1 when anything differs. Nothing unverified is unpickled."""
    from moe.train import manifest
    from moe.train.contents import read_tensors

    for path in (first, second):
        if len(found(path)) != 1 or found(path)[0] != path:
            raise ConfigError(f"{path} is no checkpoint: name a folder such as runs/tiny/checkpoints/step-00001200")
        if problem := manifest.verify(path):
            raise Damaged(f"{path} is damaged ({problem}): compare whole checkpoints")
    one, other = trainer_of(first), trainer_of(second)
    lines = [
        f"{name}: {a!r} | {b!r}"
        for part in ("config", "progress", "identity", "world_size", "next_samples", "init_hash")
        for name, a, b in changes(one.get(part), other.get(part), part)
    ]
    lines += tensor_changes(read_tensors(first), read_tensors(second))
    print("\n".join(lines) if lines else "no difference")
    return 1 if lines else 0


def changes(a: Any, b: Any, path: str) -> list[tuple[str, Any, Any]]:
    """(dotted path, before, after) of every leaf that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [change for key in {**a, **b} for change in changes(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and a != b:
        a, b = f"{len(a)} values", f"{len(b)} others"
    return [] if a == b else [(path.removeprefix("config."), a, b)]


def tensor_changes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """One line a tensor that differs in shape, dtype or any bit."""
    from moe.train.contents import same_bits

    lines = []
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            lines.append(f"{name}: only in {'A' if name in a else 'B'}")
            continue
        x, y = a[name], b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            lines.append(f"{name}: {list(x.shape)} {x.dtype} | {list(y.shape)} {y.dtype}")
        elif not same_bits(x, y):
            apart = (x.double() - y.double()).abs()
            lines.append(
                f"{name}: {int((x != y).sum()):,} of {x.numel():,} values differ, by at most {float(apart.max()):.3g}"
            )
    return lines
