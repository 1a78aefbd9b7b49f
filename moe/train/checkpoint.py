"""Checkpoints: written beside, verified by hash, published by a rename; read only after the manifest agrees.

    checkpoints/step-00001200/  state/ (torch.distributed.checkpoint)   trainer.json   MANIFEST.json
    checkpoints/LATEST          name of the newest one

A checkpoint is trusted input: the manifest proves that it is whole, not where it comes from (SECURITY.md).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from moe.parallel import Ranks
from moe.train.folder import file_hash

FORMAT_VERSION = 1
DCP_FAILURES = (Exception, dcp.api.CheckpointException)  # the latter is a BaseException


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; its text is one sentence for the user. Exit code 5."""


def save(folder: Path, step: int, state: dict[str, Any], trainer: dict[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write `state` (tensors, sharded or equal on all ranks) and `trainer` (JSON), publish, delete all but `keep`.

    Called by all ranks; raises CheckpointError on all of them when one fails, with the older checkpoints untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-step-{step:08d}"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def publish() -> None:
        trainer_file = partial / "trainer.json"
        trainer_file.write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, **trainer}, indent=1))
        _write_manifest(partial)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there: whole ones are resumed from
        partial.rename(final)
        _sync_folder(folder)  # the new name survives a power cut before older checkpoints go
        _replace(folder / "LATEST", final.name)
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(folder / old)

    _on_main(ranks, prepare, f"checkpoint of step {step}")
    try:
        dcp.save(state, checkpoint_id=partial / "state", no_dist=ranks.dp_group is None)
    except DCP_FAILURES as error:  # DCP raises on all ranks together
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written ({_first_line(error)}): free disk space under {folder}"
        ) from error
    _on_main(ranks, publish, f"checkpoint of step {step}")
    return final


def find(folder: Path, ranks: Ranks, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint and its trainer.json; damaged ones are named through `warn` and passed over.

    Raises CheckpointError, on all ranks, when there is none.
    """

    def search() -> tuple[str, dict[str, Any]] | None:
        for name in reversed(_steps(folder)):
            problem = verify(folder / name)
            if problem is None:
                return name, json.loads((folder / name / "trainer.json").read_text())
            warn(f"checkpoint {name} is refused: {problem}")
        return None

    found = _on_main(ranks, search, f"checkpoints of {folder}")
    if found is None:
        raise CheckpointError(f"{folder} has no whole checkpoint: start again with --clean, or restore one from a copy")
    name, trainer = found
    if trainer["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {name} has format_version {trainer['format_version']} and this version reads {FORMAT_VERSION}: "
            "use the alf-moe version that wrote it"
        )
    return folder / name, trainer


def load(checkpoint: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Fill the tensors of `state` in place from a verified checkpoint; any (dp, ep) layout may read any other's."""
    try:
        dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=ranks.dp_group is None)
    except DCP_FAILURES as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.name} does not fit this configuration ({_first_line(error)}): "
            "use the config.toml of its run folder"
        ) from error


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Nothing of it is unpickled."""
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "MANIFEST.json is missing or damaged"
    present = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    if present != set(files):
        return f"files differ from the manifest: {', '.join(sorted(present ^ set(files)))}"
    for name, expected in files.items():
        if (checkpoint / name).stat().st_size != expected["bytes"]:
            return f"{name} has {(checkpoint / name).stat().st_size} bytes, the manifest says {expected['bytes']}"
        if file_hash(checkpoint / name) != expected["xxh3"]:
            return f"the hash of {name} differs from the manifest"
    return None


def has_checkpoint(folder: Path) -> bool:
    """Is there anything to resume from? (Not yet verified.)"""
    return bool(_steps(folder))


def _steps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
    _replace(folder / "MANIFEST.json", json.dumps({"files": files}, indent=1))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _on_main(ranks: Ranks, work: Callable[[], Any], what: str) -> Any:
    """Run `work` on rank 0; every rank gets its result, or its failure."""
    outcome: tuple[Any, str | None] = (None, None)
    if ranks.is_main:
        try:
            outcome = (work(), None)
        except OSError as error:
            outcome = (None, _first_line(error))
    result, problem = ranks.broadcast_object(outcome)  # type: ignore[misc]
    if problem is not None:
        raise CheckpointError(f"the {what} failed ({problem}): check the disk's space and permissions")
    return result


def _first_line(error: BaseException) -> str:
    cause = error
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
    return f"{type(cause).__name__}: {(str(cause).strip() or repr(cause)).splitlines()[0]}"
