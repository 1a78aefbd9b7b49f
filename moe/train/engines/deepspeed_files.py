"""DeepSpeed's own checkpoint files: written beside the state that every engine reads, and read where a run starts from them.

    deepspeed/  about.json (who wrote it, for which ranks)   latest   zero_to_fp32.py (DeepSpeed's converter)
                engine/ layer_<moe>_expert_<global>_… (a file an expert), mp_rank_…, zero_pp_rank_…   stages 0 to 2
                engine/ zero_pp_rank_…                                                                stage 3

DeepSpeed unpickles what it reads. A checkpoint of ours is read after its hashes agree; anything else only with a warning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe.parallel import Ranks
from moe.train import manifest
from moe.train.checkpoint import OWN_FILES, CheckpointError

TAG = "engine"


def write(engine: Any, folder: Path, about: dict[str, Any], balancer: dict[str, Any], ranks: Ranks) -> None:
    """All experts, parameters, moments and buffers (the expert bias) of a DeepSpeedEngine, and the balancer's state. A
    collective."""
    engine.save_checkpoint(str(folder), tag=TAG, client_state={"balancer": balancer})
    if ranks.is_main:
        (folder / "about.json").write_text(json.dumps(about, indent=1))


def read(engine: Any, path: Path, about: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    """Load into a DeepSpeedEngine; the balancer's state, None where there is none. A collective.

    path: a checkpoint with DeepSpeed's files, or a folder that `save_checkpoint` wrote. Raises CheckpointError on all ranks.
    """
    problem, warning, folder = ranks.broadcast_object(_look(path, about) if ranks.is_main else None)  # type: ignore[misc]
    if problem is not None:
        raise CheckpointError(f"deepspeed.start_from = '{path}' {problem}")
    if warning is not None and ranks.is_main:
        print(f"warning: deepspeed.start_from = '{path}' {warning}", flush=True)
    try:
        found, client = engine.load_checkpoint(folder, tag=TAG if (Path(folder) / TAG).is_dir() else None)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"deepspeed.start_from = '{path}' does not fit this configuration ({reason}): use the settings that it was written with"
        ) from error
    if found is None:
        raise CheckpointError(f"deepspeed.start_from = '{path}' holds no checkpoint of DeepSpeed: name another folder")
    return client.get("balancer")


def _look(path: Path, about: dict[str, Any]) -> tuple[str | None, str | None, str]:
    """(why it is refused, what to warn of, DeepSpeed's folder)."""
    if not path.is_dir():
        return "is not a folder: name a checkpoint, for example runs/tiny/checkpoints/step-00001200", None, ""
    folder = path / OWN_FILES if (path / OWN_FILES).is_dir() else path
    if (folder / "about.json").is_file():
        saved = json.loads((folder / "about.json").read_text())
        for name in about:
            if saved.get(name) != about[name]:
                return (
                    f"was written with {name} = {saved.get(name)!r}, and here it is {about[name]!r}: set it so",
                    None,
                    "",
                )
    if (path / manifest.NAME).is_file() and folder != path:
        problem = manifest.verify(path)
        return (f"is damaged ({problem}): name another checkpoint" if problem else None), None, str(folder)
    if (path / "state").is_dir():
        return "has no files of DeepSpeed (deepspeed.own_files was false): resume it with --resume", None, ""
    return (
        None,
        "is no checkpoint of alf-moe: DeepSpeed unpickles it, which runs any code that was put there",
        str(folder),
    )
