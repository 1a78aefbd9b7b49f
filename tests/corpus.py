"""A prepared token folder made in a moment, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moe.train.folder import FORMAT_VERSION, file_hash


def make_token_folder(
    folder: Path,
    sources: dict[str, int] | None = None,
    vocab_size: int = 128,
    val_tokens: int = 200,
    seed: int = 0,
) -> Path:
    """sources: training tokens per source. Tokens repeat a short pattern with noise, so that a model can learn them."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    generator = np.random.default_rng(seed)
    entries = {}
    for name, tokens in (sources or {"text": 4000}).items():
        entry = {}
        for split, count in (("train", tokens), ("val", val_tokens)):
            # Few distinct tokens: the experts' load is skewed, and a bias rule has something to do.
            stream = generator.integers(1, 20, size=count)
            stream[::17] = 0
            file = folder / f"{name}-{split}.bin"
            stream.astype("<u2").tofile(file)
            entry[split] = {"file": file.name, "tokens": count, "xxh3": file_hash(file)}
        entry["val"]["bytes"] = 3 * val_tokens
        entries[name] = entry
    meta = {
        "format_version": FORMAT_VERSION,
        "settings": {},
        "vocab_size": vocab_size,
        "dtype": "uint16",
        "eos_id": 0,
        "tokenizer": {"file": "tokenizer.json", "xxh3": file_hash(folder / "tokenizer.json")},
        "sources": entries,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
