"""`alf-moe import PATH`: check a Hugging Face checkpoint and write the configuration that trains on from it.

alf-moe import PATH --out from.toml && alf-moe train --config from.toml --config training.toml

Nothing is converted: `run.start_from` names the folder, and a new run reads its safetensors, every rank its part. A dense
Llama becomes a sparse model with --experts and --top-k: every expert a copy of its MLP (upcycling, arXiv:2212.05055).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe.config import ConfigError

if TYPE_CHECKING:
    from moe.interop.hf import Checkpoint

REFUSED = 5


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="alf-moe import", description=(__doc__ or "").split("\n")[0])
    p.add_argument("path", metavar="PATH", help="folder with config.json and safetensors")
    p.add_argument("--out", metavar="FILE", help="configuration to write, [run] and [model]; default: only check")
    p.add_argument("--experts", type=int, metavar="E", help="upcycle a dense model: its number of experts")
    p.add_argument("--top-k", type=int, metavar="K", help="upcycle a dense model: experts for a token")
    return p


def main(argv: list[str]) -> int:
    """0, 2 (usage, or sizes that the model cannot have) or 5 (the checkpoint is refused)."""
    options = parser().parse_args(argv)
    try:
        checkpoint = checked(options)
        if options.out:
            write(checkpoint, Path(options.out))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # HfError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def checked(options: argparse.Namespace) -> Checkpoint:
    """The opened checkpoint, described on the console. Raises ConfigError and HfError."""
    if (options.experts is None) != (options.top_k is None):
        raise ConfigError("--experts and --top-k belong together: give both, for example --experts 8 --top-k 2")
    if options.out and Path(options.out).exists():
        raise ConfigError(f"--out {options.out} exists: name another file, or remove it")
    if options.out and not Path(options.out).parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {Path(options.out).parent}: create it")
    from moe.interop.hf import Checkpoint

    experts = None if options.experts is None else {"num_experts": options.experts, "top_k": options.top_k}
    checkpoint = Checkpoint(Path(options.path), experts)
    if checkpoint.sparse and experts:
        raise ConfigError(
            f"--experts {options.experts} is for a dense model, and {options.path} is a sparse one "
            f"({checkpoint.config['model_type']}): leave out --experts and --top-k"
        )
    counts = checkpoint.counts()
    how = "" if checkpoint.sparse else f", upcycled to {options.experts} experts, {options.top_k} for a token"
    print(
        f"{options.path}: {checkpoint.config['model_type']}{how}; {counts.total:,} parameters, {counts.active:,} for one token"
    )
    return checkpoint


def write(checkpoint: Checkpoint, out: Path) -> None:
    """[run] start_from and [model]."""
    import tomli_w

    tree = {
        "run": {"start_from": str(checkpoint.folder.resolve())},
        "model": checkpoint.model.model_dump(exclude_none=True),
    }
    text = (
        f"# {checkpoint.config['model_type']} of {checkpoint.folder.name}; lay [data], [optim] and [train] over it.\n\n"
    )
    out.write_text(text + tomli_w.dumps(tree), encoding="utf-8")
    print(f"alf-moe train --config {out} --config YOURS.toml   # YOURS: [data] [optim] [train], without [model]")
