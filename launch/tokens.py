"""The stages of `alf-moe prepare`: documents -> text file -> tokenizer -> token files, and the floors under a loss.

Texts are streamed: a source costs memory for its tokens, not for its text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.corpora import PrepareError, documents

END = "<|endoftext|>"
TOKENIZER_CHARACTERS = 50_000_000
PIECE = 1_000_000  # characters encoded in one call: a document of any length costs bounded memory
BATCH = 64  # pieces encoded side by side
FLOOR_TOKENS = 50_000_000  # of the training tokens, for the floors
SHORTEST_SOURCE = 100  # tokens
DISCOUNT = 0.75  # absolute discount of the bigram floor


def progress_bar() -> Any:
    """On the terminal only: lines of a log stay whole."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def write_text(target: Path, source: str, path: str | None, raw: Path) -> dict[str, Any]:
    """One JSON string per line. Raises PrepareError when the source is empty."""
    count = characters = 0
    with target.open("w", encoding="utf-8") as file, progress_bar() as bar:
        for text in bar.track(documents(source, path, raw), total=None, description=f"reading {source}"):
            file.write(json.dumps(text, ensure_ascii=False) + "\n")
            count, characters = count + 1, characters + len(text)
    if not count:
        raise PrepareError(f"source {source} holds no text: name files with text")
    return {"documents": count, "characters": characters}


def pieces(file: Path) -> Iterator[tuple[str, bool]]:
    """The text in pieces, cut at line ends where there are any, and whether a piece ends its document."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            text, at = json.loads(line), 0
            while len(text) - at > PIECE:
                end = text.rfind("\n", at, at + PIECE) + 1 or at + PIECE
                yield text[at:end], False
                at = end
            yield text[at:], True


def train_tokenizer(target: Path, texts: dict[Path, int], vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE on the first characters of every source, by its share of the characters; deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def sample() -> Iterator[str]:
        total = sum(texts.values())
        for file, characters in texts.items():
            budget = TOKENIZER_CHARACTERS * characters / total
            for piece, _ in pieces(file):
                if budget <= 0:
                    break
                yield piece
                budget -= len(piece)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.save(str(target))
    return {"vocab_size": tokenizer.get_vocab_size(), "eos_id": tokenizer.token_to_id(END)}


def take_tokenizer(target: Path, source: Path) -> dict[str, Any]:
    """Copy tokenizer.json of a Hugging Face folder; documents end with the eos_token of its tokenizer_config.json, or with END.

    Byte-level BPE only: the bytes of a text, for bits per byte, are counted in its tokens. Raises PrepareError.
    """
    from tokenizers import Tokenizer

    file, about = source / "tokenizer.json", source / "tokenizer_config.json"
    if not file.is_file():
        raise PrepareError(
            f"--tokenizer {source} holds no tokenizer.json: name the folder of a Hugging Face checkpoint"
        )
    try:
        tokenizer, kind = Tokenizer.from_file(str(file)), str(json.loads(file.read_text())["decoder"])
        eos = (json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}).get("eos_token") or END
    except Exception as error:  # the package raises bare Exceptions
        raise PrepareError(f"--tokenizer {source} cannot be read ({error}): restore its files") from None
    eos = eos["content"] if isinstance(eos, dict) else eos
    if "ByteLevel" not in kind:
        raise PrepareError(f"--tokenizer {source} is not a byte-level BPE: name one whose decoder is ByteLevel")
    if (eos_id := tokenizer.token_to_id(eos)) is None:
        raise PrepareError(
            f"--tokenizer {source} has no token {eos!r} to end a document: correct its tokenizer_config.json"
        )
    target.write_bytes(file.read_bytes())
    return {"vocab_size": max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, "eos_id": eos_id}


def write_tokens(
    folder: Path, source: str, text: Path, count: int, dtype: str, val_share: float, eos: int
) -> dict[str, Any]:
    """Encode a source into its two .bin files; its entry of meta.json, without hashes. Raises PrepareError."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    little = np.dtype(dtype).newbyteorder("<")
    train_file, val_file = folder / f"{source}-train.bin", folder / f"{source}-val.bin"
    lengths = [0]
    with train_file.open("wb") as out, progress_bar() as bar:
        task = bar.add_task(f"encoding {source}", total=count)
        for batch in _batches(pieces(text)):
            encodings = tokenizer.encode_batch_fast([p for p, _ in batch], add_special_tokens=False)
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                ids = np.array([*encoding.ids, eos] if last else encoding.ids, dtype=little)
                ids.tofile(out)
                lengths[-1] += len(ids)
                if last:
                    lengths.append(0)
            bar.update(task, completed=len(lengths) - 1)
    tokens = np.fromfile(train_file, little)
    if len(tokens) < SHORTEST_SOURCE:
        raise PrepareError(f"source {source} has only {len(tokens)} tokens: name files with at least {SHORTEST_SOURCE}")
    held, cut = held_out(lengths[:-1], val_share)
    train, val = tokens[:-held], tokens[-held:]
    if cut:
        train = np.append(train, np.array(eos, dtype=little))
    train.tofile(train_file)
    val.tofile(val_file)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    # A character of a byte-level token stands for one byte of the text.
    entries = max(vocabulary.values()) + 1
    token_bytes = np.zeros(entries, dtype=np.int64)
    token_bytes[list(vocabulary.values())] = [0 if index == eos else len(token) for token, index in vocabulary.items()]
    return {
        "documents": len(lengths) - 1,
        "floors": floors(train, val, entries),
        "train": {"file": train_file.name, "tokens": len(train)},
        "val": {"file": val_file.name, "tokens": len(val), "bytes": int(token_bytes[val].sum())},
    }


def _batches(items: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def held_out(lengths: list[int], val_share: float) -> tuple[int, bool]:
    """How many of the last tokens are held out: whole documents, at least `val_share`. A document so long that this
    would be twice as much is cut (second result)."""
    wanted = max(2, int(val_share * sum(lengths)))
    held = 0
    for length in reversed(lengths):
        held += length
        if held >= wanted:
            break
    return (wanted, True) if held > 2 * wanted else (held, False)


def floors(train: Any, val: Any, vocab_size: int) -> dict[str, float]:
    """Nats per held-out token of two models that a working one must beat, counted on the first 50 M training tokens.

    unigram: add-one. bigram: interpolated Kneser-Ney with discount 0.75 (Chen and Goodman 1999, section 2.7).
    """
    import numpy as np

    train, val = train[:FLOOR_TOKENS].astype(np.int64), val.astype(np.int64)
    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    seen = np.bincount(train[:-1], minlength=vocab_size)[val[:-1]]
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)[val[:-1]]
    continuation = (np.bincount(pairs % vocab_size, minlength=vocab_size) + 1) / (len(pairs) + vocab_size)
    wanted, lower = val[:-1] * vocab_size + val[1:], continuation[val[1:]]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    bigram = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * followers * lower) / np.maximum(seen, 1)
    bigram = np.where(seen > 0, bigram, lower)
    return {"unigram": float(-np.log(unigram[val]).mean()), "bigram": float(-np.log(bigram).mean())}
