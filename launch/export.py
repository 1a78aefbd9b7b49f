"""`alf-moe export RUN OUT`: a run's newest checkpoint as a Hugging Face folder, which transformers loads as a stock model.

OUT appears whole or not at all: everything is written beside it, and one rename makes it appear.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.ckpt import DAMAGED, Damaged, found, trainer_of
from moe.config import Config, ConfigError, validate
from moe.observe.cost import parameter_counts


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="alf-moe export", description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "run", metavar="RUN", help="run folder, or one of its checkpoints (runs/tiny/checkpoints/step-00001200)"
    )
    p.add_argument("out", metavar="OUT", help="the folder to write; must not exist")
    dtype = "of the weights: float32 (the default, bit by bit) or bfloat16; the expert bias is float32 in both"
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype)
    p.add_argument(
        "--data", metavar="FOLDER", help="the prepared folder with the tokenizer; default: the run's data.path"
    )
    return p


def main(argv: list[str]) -> int:
    """0, 2 (usage, or no architecture fits), 3 (data) or 5 (damaged checkpoint)."""
    options = parser().parse_args(argv)
    out = Path(options.out)
    try:
        if out.exists() or out.is_symlink():
            raise ConfigError(f"{out} exists: name a folder that does not, or remove it")
        checkpoint = found(Path(options.run))[-1]
        about = export(checkpoint, out, options.dtype, options.data)
    except Damaged as error:
        print(f"error: {error}", file=sys.stderr)
        return DAMAGED
    except OSError as error:
        print(f"error: {out} cannot be written ({error}): name another folder, or free disk space", file=sys.stderr)
        return 2
    except ValueError as error:  # ConfigError, HfError and DataError
        print(f"error: {error}", file=sys.stderr)
        return 3 if type(error).__name__ == "DataError" else 2
    print(f"{out}: {about}")
    return 0


def export(checkpoint: Path, out: Path, dtype: str, data: str | None) -> str:
    """Write OUT; one line about it. Raises ConfigError, HfError, DataError, Damaged, OSError, with nothing left behind."""
    import torch

    from moe.interop.hf import write_checkpoint, write_tokenizer
    from moe.train import manifest
    from moe.train.contents import MODEL, read_tensors
    from moe.train.folder import read_meta

    if problem := manifest.verify(checkpoint):
        raise Damaged(f"{checkpoint} is damaged ({problem}): name another checkpoint of the run")
    trainer = trainer_of(checkpoint)
    config = validate(trainer["config"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": data or config.data.path})})
    meta = read_meta(Path(config.data.path), verify=False, setting="--data" if data else "data.path")
    check_data(config, trainer)

    def read(names: list[str]) -> Mapping[str, torch.Tensor]:
        paths = {MODEL + name for name in names}
        return {name.removeprefix(MODEL): t for name, t in read_tensors(checkpoint, paths.__contains__).items()}

    bias = read_tensors(checkpoint, lambda name: name.startswith(MODEL) and name.endswith("expert_bias_E"))
    biased = any(bool(tensor.any()) for tensor in bias.values())
    needed = parameter_counts(config).total * (4 if dtype == "float32" else 2)
    partial = out.with_name(f".partial-{out.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < needed:
            raise ConfigError(
                f"{out} takes {needed:,} bytes and {free:,} are free: free disk space, or name another folder"
            )
        m, seq_len = config.model, config.data.seq_len
        model_type = write_checkpoint(partial, m, read, meta["eos_id"], seq_len, dtype, biased)
        tokenizer = Path(config.data.path) / meta["tokenizer"]["file"]
        write_tokenizer(partial, tokenizer, m.vocab_size, meta["eos_id"], seq_len)
        (partial / "README.md").write_text(
            card(config, trainer, last_row(checkpoint), model_type, dtype), encoding="utf-8"
        )
        files = [path for path in partial.iterdir() if path.is_file()]
        manifest.describe(partial, files)  # every file is on the disk when this returns
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"{model_type}, {dtype}, {size / 1e6:,.1f} MB, of {checkpoint.name}"


def check_data(config: Config, trainer: dict[str, Any]) -> None:
    """Raises ConfigError unless the folder holds what the run was trained on: its tokenizer goes along."""
    from moe.train.data import TokenData

    d = config.data
    there = TokenData.open(
        d.path, d.seq_len, dict(d.mix), config.run.seed, config.model.vocab_size, config.train.batch_size, verify=False
    )
    if there.fingerprint != trainer["identity"]["data"]:
        raise ConfigError(
            f"data.path = {d.path!r} is not what the run was trained on, and its tokenizer would not fit: name that folder "
            "with --data"
        )


def last_row(checkpoint: Path) -> dict[str, Any]:
    """The last validation of metrics.jsonl up to the checkpoint's step; empty where there is none."""
    from moe.observe.sinks import read_metrics
    from moe.train.manifest import step_of

    metrics = checkpoint.parent.parent / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    step = step_of(checkpoint.name)
    return next((row for row in reversed(rows) if row.get("val/ce") is not None and row["train/step"] <= step), {})


# -- the model card ----------------------------------------------------------------------------------------------------

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- alf-moe
---

# {name}

A sparse mixture-of-experts language model, pretrained with alf-moe. A base model: neither instructed nor aligned, and nothing
that it writes has been checked.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
{notes}
The licence of the weights is for whoever publishes them to state; the training text has licences of its own.
"""


def card(config: Config, trainer: dict[str, Any], row: dict[str, Any], model_type: str, dtype: str) -> str:
    """README.md: what it is, tokens, method, metrics; only what the run recorded."""
    from moe.interop.hf_config import ARCHITECTURES

    m, o, b, progress = config.model, config.optim, config.balance, trainer["progress"]
    counts = parameter_counts(config)
    rate = "" if b.rate is None else f", rate {b.rate}"
    losses = {
        n: getattr(b, n) for n in ("aux_loss", "group_loss", "phi_loss", "simbal_loss", "z_loss") if getattr(b, n)
    }
    table = {
        "architecture": f"`{ARCHITECTURES[model_type].kind}`, weights {dtype}, expert bias float32",
        "parameters": f"{counts.total:,}, of which {counts.active:,} for one token",
        "experts": f"{m.num_experts} routed, {m.top_k} for a token, {m.num_shared_experts} shared; {config.num_moe_layers} "
        f"of {m.num_layers} layers",
        "tokens": f"{progress['tokens']:,} ({progress['step']:,} steps of {config.tokens_per_step:,}), "
        f"sequences of {config.data.seq_len:,}",
        "data": f"`{Path(config.data.path).name}`, fingerprint {trainer['identity']['data']}",
        "balancing": f"`{b.method}`{rate}" + "".join(f", {name} {value}" for name, value in losses.items()),
        "optimizer": f"AdamW, peak learning rate {o.lr:g} ({o.schedule}), weight decay {o.weight_decay:g}",
        "initial weights": f"hash {trainer['init_hash']}, seed {config.run.seed}",
    }
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "val/ce": ("held-out cross-entropy, nats per token", "{:.4f}".format),
        "val/bits_per_byte": ("held-out bits per byte", "{:.4f}".format),
        "val/tokens": ("held-out tokens", "{:,.0f}".format),
        "moe/maxvio_val/mean": ("held-out MaxVio, mean over layers", "{:.3f}".format),
        "moe/maxvio_val/max": ("held-out MaxVio, worst layer", "{:.3f}".format),
    }
    table |= {title: form(row[key]) for key, (title, form) in shown.items() if row.get(key) is not None}
    if not row:
        table["metrics"] = "none: the run was not evaluated up to this checkpoint"
    elif row["train/step"] != progress["step"]:
        table["metrics are of step"] = f"{row['train/step']:,}"
    notes = []
    if config.data.document_mask:
        notes.append("In training, attention did not cross the end of a document; transformers lets it.")
    if config.train.compute_dtype == "bfloat16":
        notes.append("Trained with matrix products in bfloat16 and float32 weights.")
    return CARD.format(
        name=config.run.name,
        table="\n".join(f"| {key} | {value} |" for key, value in table.items()),
        notes="".join(f"\n{note}\n" for note in notes),
    )
