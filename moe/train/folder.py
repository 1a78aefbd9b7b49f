"""The prepared token folder on disk: what `alf-moe prepare` writes and a run reads. Imports neither torch nor numpy.

meta.json            written last; format_version, settings, vocab_size, dtype ("uint16" | "uint32"), eos_id,
                     tokenizer {file, xxh3},
                     sources {name: {documents, floors, train {file, tokens, xxh3}, val {file, tokens, xxh3, bytes}}}
tokenizer.json       of the package tokenizers
<source>-train.bin   raw little-endian tokens; every document ends with eos_id
<source>-val.bin
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

FORMAT_VERSION = 1
ITEM_BYTES = {"uint16": 2, "uint32": 4}


class DataError(ValueError):
    """Data that cannot be used; its text is one sentence for the user. Exit code 3."""


def file_hash(path: Path) -> str:
    """xxh3 (64 bits) of a file, hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_meta(folder: Path, verify: bool = True, setting: str = "data.path") -> dict[str, Any]:
    """meta.json of a prepared folder, the size of every file checked and, with `verify`, its hash.

    `setting` is what the user named the folder with. Raises DataError.
    """
    here = f"{setting} = '{folder}'"
    again = "remove the folder and run `alf-moe prepare` again"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        version = meta["format_version"]
    except FileNotFoundError:
        raise DataError(f"{here} has no meta.json: run `alf-moe prepare` or name a prepared folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{here}: meta.json cannot be read ({type(error).__name__}): {again}") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{here} has format_version {version!r}, this version reads {FORMAT_VERSION}: {again}")
    try:
        files = _expected_files(meta)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{here}: meta.json lacks or misstates an entry ({error}): {again}") from None
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{here} lacks the file {name}: {again}")
        if size is not None and path.stat().st_size != size:
            raise DataError(f"{here}: {name} has {path.stat().st_size} bytes instead of {size}: {again}")
        if verify and file_hash(path) != digest:
            raise DataError(f"{here}: {name} was changed since it was prepared: {again}")
    return meta


def _expected_files(meta: dict[str, Any]) -> list[tuple[str, int | None, str]]:
    # Touches every entry that a reader relies on, so that a damaged meta.json is a sentence and no traceback.
    item = ITEM_BYTES[meta["dtype"]]
    if not 0 <= int(meta["eos_id"]) < int(meta["vocab_size"]):
        raise ValueError("eos_id")
    files: list[tuple[str, int | None, str]] = [(meta["tokenizer"]["file"], None, meta["tokenizer"]["xxh3"])]
    for source in meta["sources"].values():
        int(source["val"]["bytes"])
        for part in (source["train"], source["val"]):
            files.append((part["file"], int(part["tokens"]) * item, part["xxh3"]))
    if len(files) == 1:
        raise ValueError("no sources")
    return files
