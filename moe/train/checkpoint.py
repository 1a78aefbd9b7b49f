"""Checkpoints: written beside, verified by hash, published by a rename; read only after the manifest agrees.

    checkpoints/step-00001200/  state/ (torch.distributed.checkpoint)   trainer.json   MANIFEST.json   deepspeed/ (if asked for)
    checkpoints/LATEST          name of the newest one

A checkpoint is trusted input: the manifest proves that it is whole, not where it comes from (SECURITY.md).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp

from moe.parallel import Ranks
from moe.train import manifest
from moe.train.census import expert_census
from moe.train.manifest import verify

FORMAT_VERSION = 2
OWN_FILES = "deepspeed"  # files of an engine, beside the state that every engine reads
DCP_FAILURES = (Exception, dcp.api.CheckpointException)  # the latter is a BaseException


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; its text is one sentence for the user. Exit code 5."""


class Found(NamedTuple):
    """A checkpoint whose files agree with its manifest."""

    path: Path
    trainer: dict[str, Any]
    census: dict[str, list[str]]


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    trainer: dict[str, Any],
    ranks: Ranks,
    keep: int,
    keep_every: int = 0,
    own: Path | None = None,
) -> Path:
    """Write `state` (tensors, sharded or equal on all ranks) and `trainer` (JSON), publish, delete the outdated ones.

    own: a folder of the same file system that becomes part of the checkpoint.

    Called by all ranks; raises CheckpointError on all of them when one fails, with the older checkpoints untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-step-{step:08d}"
    what = f"checkpoint of step {step}"

    def prepare() -> None:
        for left in [*folder.glob(".partial-step-*"), *folder.glob(".own-step-*")]:  # of a save that was killed
            if left != own:
                shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        needed, free = state_bytes(state), shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"it takes {needed:,} bytes and {free:,} are free")

    def publish() -> None:
        trainer_file = partial / "trainer.json"
        about = {"format_version": FORMAT_VERSION, "step": step, "time": time.time(), **trainer}
        trainer_file.write_text(json.dumps(about, indent=1))
        plain = [trainer_file, partial / "state" / ".metadata"]
        if own is not None:
            own.rename(partial / OWN_FILES)
            plain += [path for path in (partial / OWN_FILES).rglob("*") if path.is_file()]
        files = manifest.describe(partial, plain)
        manifest.write(partial, files | {k: v for part in parts for k, v in part.items()}, census)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there: whole ones are resumed from
        partial.rename(final)
        manifest.sync_folder(folder)  # the new name survives a power cut before older checkpoints go
        manifest.replace(folder / "LATEST", final.name)
        for old in manifest.outdated(manifest.steps(folder), keep, keep_every):
            shutil.rmtree(folder / old)

    _on_main(ranks, prepare, what)
    try:
        dcp.save(state, checkpoint_id=partial / "state", process_group=ranks.dp_group, no_dist=ranks.dp_group is None)
    except DCP_FAILURES as error:  # DCP raises on all ranks together
        raise CheckpointError(
            f"the {what} could not be written ({_first_line(error)}): free disk space under {folder}"
        ) from error
    mine = (partial / "state").glob(f"__{ranks.rank}_*")
    parts = _on_all(ranks, lambda: manifest.describe(partial, mine), what)
    census = expert_census(_model(state), ranks)
    _on_main(ranks, publish, what)
    return final


def whole(folder: Path, ranks: Ranks, warn: Callable[[str], None]) -> Iterator[Found]:
    """The checkpoints whose files are whole, newest first; damaged ones are named through `warn` (on rank 0).

    A collective in every step. Raises CheckpointError for one that another version wrote.
    """
    names = manifest.steps(folder)

    def search() -> Found | None:
        while names:
            name = names.pop()
            problem = verify(folder / name)
            if problem is None:
                trainer = json.loads((folder / name / "trainer.json").read_text())
                return Found(folder / name, trainer, manifest.read_census(folder / name))
            warn(f"checkpoint {name} is refused: {problem}")
        return None

    while (found := _on_main(ranks, search, f"search for checkpoints in {folder}")) is not None:
        if found.trainer["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {found.path.name} has format_version {found.trainer['format_version']} and this version reads "
                f"{FORMAT_VERSION}: use the alf-moe version that wrote it"
            )
        yield found


def none_whole(folder: Path) -> CheckpointError:
    """When `whole` has nothing (left) to offer."""
    return CheckpointError(f"{folder} has no whole checkpoint: start again with --clean, or restore one from a copy")


def load(found: Found, state: dict[str, Any], ranks: Ranks) -> None:
    """Fill the tensors of `state` in place from a verified checkpoint; any (dp, ep) layout may read any other's.

    Raises CheckpointError on all ranks, with the tensors in any state, when it does not fit, or when an expert is not the
    one that was saved.
    """
    name = found.path.name
    try:
        dcp.load(state, checkpoint_id=found.path / "state", no_dist=ranks.dp_group is None)
    except DCP_FAILURES as error:
        raise CheckpointError(
            f"checkpoint {name} does not fit this configuration ({_first_line(error)}): use the config.toml of its run folder"
        ) from error
    if wrong := census_difference(found.census, expert_census(_model(state), ranks)):
        raise CheckpointError(f"checkpoint {name} does not hold the experts that were saved: {wrong}")


def census_difference(saved: dict[str, list[str]], loaded: dict[str, list[str]]) -> str | None:
    """The first expert that differs and how many do, in words, or None."""
    if saved.keys() != loaded.keys() or any(len(saved[layer]) != len(loaded[layer]) for layer in saved):
        return "the census in its manifest is of other layers or another number of experts"
    wrong = [
        f"{layer}, expert {k}"
        for layer in saved
        for k, (was, now) in enumerate(zip(saved[layer], loaded[layer], strict=True))
        if was != now
    ]
    return f"{len(wrong)} differ from the census in its manifest, the first is {wrong[0]}" if wrong else None


def has_checkpoint(folder: Path) -> bool:
    """Is there anything to resume from? (Not yet verified.)"""
    return bool(manifest.steps(folder))


def state_bytes(tree: Any) -> int:
    """Bytes of all tensors of a state, over all ranks, each counted once."""
    if isinstance(tree, dict):
        return sum(state_bytes(value) for value in tree.values())
    return tree.numel() * tree.element_size() if isinstance(tree, torch.Tensor) else 0


def _model(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return state["engine"]["model"] if "engine" in state else {}


def _on_main(ranks: Ranks, work: Callable[[], Any], what: str) -> Any:
    """Run `work` on rank 0; every rank gets its result, or its failure."""
    result, problem = ranks.broadcast_object(_attempt(work) if ranks.is_main else None)  # type: ignore[misc]
    if problem is not None:
        raise CheckpointError(f"the {what} failed ({problem}): check the disk's space and permissions")
    return result


def _on_all(ranks: Ranks, work: Callable[[], Any], what: str) -> list[Any]:
    """Run `work` on every rank; every rank gets all results, or the first failure."""
    outcomes = ranks.gather_objects(_attempt(work))
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise CheckpointError(
                f"the {what} failed on rank {rank} ({problem}): check the disk's space and permissions"
            )
    return [result for result, _ in outcomes]


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return work(), None
    except OSError as error:
        return None, _first_line(error)


def _first_line(error: BaseException) -> str:
    cause = error
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
    return f"{type(cause).__name__}: {(str(cause).strip() or repr(cause)).splitlines()[0]}"
