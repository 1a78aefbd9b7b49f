"""`alf-moe prepare`: fetch and verify a corpus, train a tokenizer on it, write the token folder (moe/train/folder.py).

    text        one JSON string per line, for each source
    tokenizer   a byte-level BPE on the first 50 MB, or a copy of a Hugging Face checkpoint's
    tokens      <source>-train.bin and, the last documents, <source>-val.bin
    meta.json   last; then one rename makes the folder appear

Stages work in `<out>.partial` and leave the hash of their files there: an interrupted preparation goes on where it was.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launch.corpora import CORPORA, LICENCES, PrepareError, local_identity
from launch.tokens import take_tokenizer, train_tokenizer, write_text, write_tokens


class Stages:
    """What is finished in the folder of an unfinished preparation: stages.json holds, for every stage, the hashes of its
    files and its facts. A folder of other settings is emptied. Raises PrepareError when another process works there."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self._log = folder, folder / "stages.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise PrepareError(f"{folder} is being written by another `alf-moe prepare`: wait for it") from None
        try:
            found = json.loads(self._log.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("settings") != settings:
            for path in folder.iterdir():
                if path.suffix in (".text", ".bin", ".json", ".new"):
                    path.unlink()
            found = {"settings": settings, "stages": {}}
        self._found = found

    def close(self) -> None:
        """Let others in."""
        os.close(self._lock)

    def run(self, stage: str, files: list[str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The facts that `work` returns after it has written `files`; not called when they are there unchanged."""
        from moe.train.folder import file_hash

        paths = [self.folder / file for file in files]
        known = self._found["stages"].get(stage)
        if known and all(path.is_file() for path in paths) and [file_hash(path) for path in paths] == known["hashes"]:
            print(f"{stage}: found from an earlier start", flush=True)
            return known["facts"]
        facts = work()
        self._found["stages"][stage] = {"hashes": [file_hash(path) for path in paths], "facts": facts}
        fresh = self._log.with_suffix(".new")
        fresh.write_text(json.dumps(self._found), encoding="utf-8")
        fresh.replace(self._log)
        return facts


def named_sources(text: list[str]) -> dict[str, str]:
    """["law=a.txt", "b/c.jsonl"] -> {"law": "a.txt", "c": "b/c.jsonl"}. Raises ValueError with one sentence."""
    found: dict[str, str] = {}
    for item in text:
        name, equals, path = item.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            name, path = re.sub(r"[^\w.-]+", "-", Path(item).resolve().stem), item
        if name in found:
            raise ValueError(f"--text {item} gives the name {name} twice: name one of them with --text NAME=PATH")
        found[name] = path
    return found


def check(corpus: str, vocab_size: int, text: list[str], val_share: float) -> dict[str, str | None]:
    """The sources, each with its path when local. Raises ValueError: one sentence about the usage."""
    if corpus != "text" and corpus not in CORPORA:
        raise ValueError(f"--corpus {corpus!r} is not known: choose one of {', '.join(CORPORA)}, text")
    if (corpus == "text") != bool(text):
        way_out = "name files with --text PATH" if corpus == "text" else "leave one of them out"
        raise ValueError(f"--corpus {corpus} {'lacks' if corpus == 'text' else 'excludes'} --text: {way_out}")
    if not 257 <= vocab_size <= 2**20:
        raise ValueError(f"--vocab-size {vocab_size} is out of range: choose 257 (256 bytes and the end) to {2**20}")
    if not 0 < val_share <= 0.5:
        raise ValueError(f"--val-share {val_share} is out of range: choose more than 0 and at most 0.5")
    return dict(named_sources(text)) if text else dict.fromkeys(CORPORA[corpus])


def describe(folder: Path, meta: dict[str, Any]) -> None:
    """One line per source: its size and the floors."""
    for name, source in meta["sources"].items():
        train, val, floor = source["train"]["tokens"], source["val"]["tokens"], source["floors"]
        print(
            f"{name}: {source['documents']:,} documents, {train + val:,} tokens ({val:,} held out, "
            f"{source['val']['bytes'] / val:.3f} bytes per token); nats per held-out token: "
            f"unigram (add-one) {floor['unigram']:.3f}, bigram (Kneser-Ney) {floor['bigram']:.3f}"
        )
    print(f"{folder}: ready, vocabulary {meta['vocab_size']:,}")


def ready(folder: Path, settings: dict[str, Any]) -> None:
    """One line about a finished folder. Raises DataError when damaged, PrepareError when of other settings."""
    from moe.train.folder import read_meta

    meta = read_meta(folder, setting="--out")
    found = meta.get("settings") or {}
    if differing := [key for key in settings if found.get(key) != settings[key]]:
        key = differing[0]
        raise PrepareError(
            f"--out {folder} was prepared with {key} {json.dumps(found.get(key))}, not {json.dumps(settings[key])}: "
            "choose another --out or remove the folder"
        )
    tokens = sum(source["train"]["tokens"] for source in meta["sources"].values())
    print(f"{folder}: ready, {tokens:,} training tokens, files verified")


def write_folder(
    folder: Path, settings: dict[str, Any], sources: dict[str, str | None], raw: Path, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Every stage in `<folder>.partial`, then the rename; meta.json as a dictionary. Raises PrepareError."""
    from moe.train.folder import FORMAT_VERSION, file_hash

    stages = Stages(folder.with_name(folder.name + ".partial"), settings)
    work, texts = stages.folder, {}
    try:
        for name, path in sources.items():
            print(f"{name}: {LICENCES.get(name, '') if path is None else path}", flush=True)
            file = work / f"{name}.text"
            texts[file] = stages.run(f"text of {name}", [file.name], lambda: write_text(file, name, path, raw))  # noqa: B023
        characters = {file: facts["characters"] for file, facts in texts.items()}
        vocabulary = stages.run(
            "tokenizer",
            ["tokenizer.json"],
            lambda: (
                take_tokenizer(work / "tokenizer.json", tokenizer)
                if tokenizer is not None
                else train_tokenizer(work / "tokenizer.json", characters, settings["vocab_size"])
            ),
        )
        dtype = "uint16" if vocabulary["vocab_size"] <= 2**16 else "uint32"
        meta = {"format_version": FORMAT_VERSION, "settings": settings, **vocabulary, "dtype": dtype}
        meta["tokenizer"] = {"file": "tokenizer.json", "xxh3": file_hash(work / "tokenizer.json")}
        meta["sources"] = {}
        for name, (file, facts) in zip(sources, texts.items(), strict=True):
            arguments = (work, name, file, facts["documents"], dtype, settings["val_share"], vocabulary["eos_id"])
            files = [f"{name}-train.bin", f"{name}-val.bin"]
            entry = stages.run(f"tokens of {name}", files, partial(write_tokens, *arguments))
            for part in (entry["train"], entry["val"]):
                part["xxh3"] = file_hash(work / part["file"])
            meta["sources"][name] = entry
        for leftover in [*texts, work / "stages.json"]:
            leftover.unlink()
        (work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        work.rename(folder)
    finally:
        stages.close()
    return meta


def tokenizer_identity(folder: Path) -> str:
    """Hashes of the files that say what the tokenizer does."""
    from moe.train.folder import file_hash

    files = (folder / name for name in ("tokenizer.json", "tokenizer_config.json"))
    return " ".join(file_hash(path) for path in files if path.is_file())


def prepare(
    corpus: str = "enwik8",
    out: str | None = None,
    vocab_size: int = 8192,
    text: list[str] | None = None,
    raw: str = "data/raw",
    val_share: float = 0.02,
    tokenizer: str | None = None,
) -> int:
    """Make the token folder `out` (default data/<corpus>-<vocab_size>), or report that it is there; nothing finished is
    ever overwritten. The result is the exit code: 0, 2 usage, 3 data."""
    from moe.train.folder import DataError

    try:
        sources = check(corpus, vocab_size, text or [], val_share)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    theirs = None if tokenizer is None else Path(tokenizer)
    folder = Path(out or f"data/{corpus}-{vocab_size if theirs is None else theirs.resolve().name}")
    try:
        identity = {name: path and local_identity(Path(path)) for name, path in sources.items()}
        settings = {"corpus": corpus, "sources": identity, "vocab_size": vocab_size, "val_share": val_share}
        if theirs is not None:
            settings |= {"vocab_size": None, "tokenizer": tokenizer_identity(theirs)}
        if folder.exists():
            ready(folder, settings)
        else:
            describe(folder, write_folder(folder, settings, sources, Path(raw), theirs))
    except (PrepareError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


def main(argv: list[str]) -> int:
    """Returns 0, 2 (usage) or 3 (data)."""
    parser = argparse.ArgumentParser(prog="alf-moe prepare", description="Fetch, verify and tokenize a corpus.")
    parser.add_argument(
        "--corpus",
        choices=[*CORPORA, "text"],
        help="enwik8 (default), mix (wiki, law, python), domains (these and speech, c, dictionary, math), or text",
    )
    own = "own text: a .txt, .jsonl or .parquet file, or a folder of them; repeat for more sources"
    parser.add_argument("--text", action="append", default=[], metavar="[NAME=]PATH", help=own)
    parser.add_argument("--vocab-size", type=int, default=8192, help="entries of the tokenizer (default 8192)")
    theirs = "a Hugging Face checkpoint whose tokenizer is taken instead of training one (byte-level BPE)"
    parser.add_argument("--tokenizer", metavar="FOLDER", help=theirs)
    parser.add_argument("--val-share", type=float, default=0.02, help="share of the tokens held out (default 0.02)")
    parser.add_argument("--out", help="folder to write (default data/CORPUS-VOCAB)")
    parser.add_argument("--raw", default="data/raw", help="where fetched files are kept (default data/raw)")
    args = parser.parse_args(argv)
    corpus = args.corpus or ("text" if args.text else "enwik8")
    return prepare(corpus, args.out, args.vocab_size, args.text, args.raw, args.val_share, args.tokenizer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
