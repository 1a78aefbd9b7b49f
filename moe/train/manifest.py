"""What a checkpoint folder must hold: MANIFEST.json with the size and xxh3 of each file. Imports no torch, unpickles nothing.

MANIFEST.json   files {name: {bytes, xxh3}}, census {layer_NN: [a hash per expert]} (moe/train/census.py)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe.train.folder import file_hash

NAME = "MANIFEST.json"


def describe(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, which is on the disk itself when this returns."""
    found = {}
    for path in sorted(files):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
    return found


def write(folder: Path, files: dict[str, dict[str, Any]], census: dict[str, list[str]]) -> None:
    """The manifest, whole or not at all."""
    replace(folder / NAME, json.dumps({"files": dict(sorted(files.items())), "census": census}, indent=1))


def verify(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        files = json.loads((checkpoint / NAME).read_text())["files"]
        for name, expected in files.items():
            _ = f"{name}{expected['bytes']}{expected['xxh3']}"
        read_census(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is missing or damaged"
    present = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {NAME}
    if present != set(files):
        return f"files differ from the manifest: {', '.join(sorted(present ^ set(files)))}"
    for name, expected in files.items():
        size = (checkpoint / name).stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, the manifest says {expected['bytes']}"
        if file_hash(checkpoint / name) != expected["xxh3"]:
            return f"the hash of {name} differs from the manifest"
    return None


def read_census(checkpoint: Path) -> dict[str, list[str]]:
    """The census of the experts when the checkpoint was written; KeyError from a manifest that has none."""
    return json.loads((checkpoint / NAME).read_text())["census"]


def steps(folder: Path) -> list[str]:
    """Names of the checkpoints of a folder, oldest first; whole or not."""
    return sorted((p.name for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=step_of)


def step_of(name: str) -> int:
    """step-00001200 -> 1200."""
    return int(name.removeprefix("step-"))


def outdated(names: list[str], keep: int, keep_every: int) -> list[str]:
    """Those of `steps` to delete: neither among the newest `keep` nor at a multiple of `keep_every` steps (0: no such)."""
    return [name for name in names[:-keep] if not keep_every or step_of(name) % keep_every]


def sync_folder(folder: Path) -> None:
    """The names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
