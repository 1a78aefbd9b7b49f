"""Prepared token folders, and the order in which a run reads them.

The order is a pure function of (seed, sample index): it depends neither on the layout of the ranks nor on what was read
before, so that any position is reached at once. Letters: B batch, S sequence.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from moe.model.loss import IGNORED
from moe.train.folder import DataError, read_meta

BLOCK = 1024  # samples over which the shares of a mix are kept
ROUNDS = 8  # of the Feistel network: with 4, sources of 10 windows come out visibly uneven (chi-squared 16 x too large)


class Batch(NamedTuple):
    """tokens_BS and targets_BS int64 on the host; a target of IGNORED marks padding."""

    tokens_BS: Tensor
    targets_BS: Tensor


class Labelled(NamedTuple):
    """N windows of held-out text on the host, int64: tokens; of each token its source, by its place in TokenData.names, and its
    document, counted through all sources. No window has padding."""

    tokens_NS: Tensor
    source_NS: np.ndarray
    document_NS: np.ndarray


class TokenData:
    """The windows of a prepared folder: window w of a source covers tokens w * S ... w * S + S, so that no target is
    shared. Sources count in the order of the folder, whatever the order of the mix.

    eos_id, vocab_size: of the folder. fingerprint: hexadecimal, over the files, seq_len and the mix.
    bytes_per_token_val: UTF-8 bytes of the held-out text over its tokens.
    """

    def __init__(
        self, folder: Path, meta: dict[str, Any], seq_len: int, mix: dict[str, float], seed: int, batch_size: int
    ):
        sources = {name: source for name, source in meta["sources"].items() if name in mix}
        self.seq_len, self.seed, self.batch_size = seq_len, seed, batch_size
        self.eos_id, self.vocab_size = int(meta["eos_id"]), int(meta["vocab_size"])
        self.names = list(sources)
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self._train = [np.memmap(folder / s["train"]["file"], dtype, "r") for s in sources.values()]
        self._val = [np.memmap(folder / s["val"]["file"], dtype, "r") for s in sources.values()]
        self._windows = [_windows(s, seq_len) for s in sources.values()]
        self._counts = _block_counts(mix, self.names)
        val_bytes = sum(s["val"]["bytes"] for s in sources.values())
        self.bytes_per_token_val = val_bytes / sum(s["val"]["tokens"] for s in sources.values())
        hashes = {name: [s[split]["xxh3"] for split in ("train", "val")] for name, s in sources.items()}
        identity = json.dumps([hashes, seq_len, self._counts.tolist(), meta["tokenizer"]["xxh3"]], sort_keys=True)
        self.fingerprint = xxhash.xxh3_64_hexdigest(identity.encode())

    @classmethod
    def open(
        cls,
        path: str,
        seq_len: int,
        mix: dict[str, float],
        seed: int,
        vocab_size: int,
        batch_size: int = 1,
        verify: bool = True,
    ) -> TokenData:
        """Check and open a folder of `alf-moe prepare`.

        mix: weight per source; empty: every source by its number of windows. vocab_size: the model's. verify: hash the
        files (about 1 s per GB); without it only their sizes are checked, for the ranks beside the first.
        Raises DataError: absent, changed or too small files, a vocabulary larger than the model's, unknown sources.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError(f"data.path = '{path}' does not exist: run `alf-moe prepare` or name a prepared folder")
        meta = read_meta(folder, verify)
        if meta["vocab_size"] > vocab_size:
            raise DataError(
                f"model.vocab_size = {vocab_size} is smaller than the {meta['vocab_size']} entries of data.path = '{path}': "
                f"set model.vocab_size to at least {meta['vocab_size']}"
            )
        _check_mix(path, meta["sources"], mix)
        mix = mix or {name: float(_windows(source, seq_len)) for name, source in meta["sources"].items()}
        _check_sizes(path, meta["sources"], mix, seq_len, batch_size)
        return cls(folder, meta, seq_len, mix, seed, batch_size)

    def sample_ids(self, step: int, first: int = 0, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(source index, window) of samples first ... first + count of optimizer step `step` (from 0), int64."""
        count = self.batch_size - first if count is None else count
        start = step * self.batch_size + first
        blocks = range(start // BLOCK, (start + count - 1) // BLOCK + 1)
        inside = slice(start - blocks.start * BLOCK, start - blocks.start * BLOCK + count)
        source, rank = np.concatenate([self._block(block) for block in blocks], axis=1)[:, inside]
        window = np.empty(count, dtype=np.int64)
        for index, windows in enumerate(self._windows):
            mine = source == index
            epoch, place = np.divmod(rank[mine], windows)
            window[mine] = permuted(place, windows, _key(self.seed, self.names[index]), epoch)
        return source, window

    def _block(self, block: int) -> np.ndarray:
        # [2, BLOCK]: the source of every sample of a block, and how many samples of that source came before it in the
        # run: in order, so that an epoch of a source has ended before its next one begins.
        slot = permuted(np.arange(BLOCK), BLOCK, _key(self.seed, ""), np.array(block))
        source = np.searchsorted(np.cumsum(self._counts), slot, side="right")
        rank = np.empty(BLOCK, dtype=np.int64)
        for index, count in enumerate(self._counts.tolist()):
            rank[source == index] = block * count + np.arange(count)
        return np.stack([source, rank])

    def order_hash(self, previous: str, step: int) -> str:
        """Rolling hash of the samples read, this step's included; in the checkpoint."""
        source, window = self.sample_ids(step)
        return xxhash.xxh3_64_hexdigest(
            previous.encode() + source.astype("<i8").tobytes() + window.astype("<i8").tobytes()
        )

    def train_batch(self, step: int, first: int, count: int) -> Batch:
        """Samples first ... first + count of optimizer step `step` (from 0)."""
        ids = zip(*self.sample_ids(step, first, count), strict=True)
        rows = [self._train[s][w * self.seq_len : (w + 1) * self.seq_len + 1].astype(np.int64) for s, w in ids]
        rows_t = torch.from_numpy(np.stack(rows))
        return Batch(rows_t[:, :-1].contiguous(), rows_t[:, 1:].contiguous())

    def val_batches(self, batch_size: int, rank: int, world_size: int, max_tokens: int | None) -> Iterator[Batch]:
        """This rank's held-out batches: every rank gets the same number, the last ones padded with IGNORED targets.

        Whole windows until max_tokens are covered; the same windows in every layout.
        """
        spans = [(v, w * self.seq_len) for v in self._val for w in range(-(-(len(v) - 1) // self.seq_len))]
        if max_tokens is not None:
            # Spread over the held-out text: its beginning alone would be a few documents.
            keep = min(len(spans), -(-max_tokens // self.seq_len))
            spans = [spans[i * len(spans) // keep] for i in range(keep)]
        rounds = -(-len(spans) // (batch_size * world_size))
        for index in range(rounds):
            first = (index * world_size + rank) * batch_size
            yield self._padded([*spans[first : first + batch_size]], batch_size)

    def labelled(self, max_tokens: int | None) -> Labelled:
        """As many held-out windows of every source, spread over its text: all that the smallest has, or max_tokens of all
        together, at least one each. Raises DataError when a source has none."""
        sizes = {name: len(tokens) for name, tokens in zip(self.names, self._val, strict=True)}
        fewest, name = min((size, name) for name, size in sizes.items())
        if fewest < self.seq_len:
            raise DataError(
                f"source {name} has {fewest} held-out tokens, less than one window of data.seq_len = {self.seq_len}: prepare "
                "more text, or hold a larger --val-share of it out"
            )
        keep = fewest // self.seq_len
        if max_tokens is not None:
            keep = min(keep, max(1, max_tokens // (self.seq_len * len(sizes))))
        found, documents = [], 0
        for source, tokens in enumerate(self._val):
            document = documents + np.cumsum(np.append(0, tokens[:-1] == self.eos_id))  # it ends with its last token
            documents = int(document[-1]) + 1
            first_N = np.arange(keep) * (len(tokens) // self.seq_len) // keep * self.seq_len
            place_NS = first_N[:, None] + np.arange(self.seq_len)
            found.append((tokens[place_NS].astype(np.int64), np.full(place_NS.shape, source), document[place_NS]))
        tokens_NS, source_NS, document_NS = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Labelled(torch.from_numpy(tokens_NS), source_NS, document_NS)

    def _padded(self, spans: list[tuple[np.ndarray, int]], batch_size: int) -> Batch:
        tokens = torch.full((batch_size, self.seq_len), self.eos_id, dtype=torch.int64)
        targets = torch.full((batch_size, self.seq_len), IGNORED, dtype=torch.int64)
        for row, (source, start) in enumerate(spans):
            window = torch.from_numpy(source[start : start + self.seq_len + 1].astype(np.int64))
            tokens[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return Batch(tokens, targets)


def _windows(source: dict[str, Any], seq_len: int) -> int:
    return max(0, (source["train"]["tokens"] - 1) // seq_len)


def _check_mix(path: str, sources: dict[str, Any], mix: dict[str, float]) -> None:
    for name in mix:
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=1)
            hint = f"did you mean data.mix.{near[0]}?" if near else f"its sources are {', '.join(sources)}"
            raise DataError(f"data.mix.{name} is no source of data.path = '{path}': {hint}")


def _check_sizes(path: str, sources: dict[str, Any], mix: dict[str, float], seq_len: int, batch_size: int) -> None:
    chosen = [name for name in sources if name in mix]
    for name in chosen:
        windows, val = _windows(sources[name], seq_len), sources[name]["val"]["tokens"]
        if windows < 1 or val < 2:
            raise DataError(
                f"data.seq_len = {seq_len} is too long for source {name} of data.path = '{path}' "
                f"({windows} training windows, {val} held-out tokens): shorten data.seq_len or prepare more text"
            )
    for name, count in zip(chosen, _block_counts(mix, chosen), strict=True):
        if count < 1:
            raise DataError(
                f"data.mix.{name} = {mix[name]:g} is less than 1/{BLOCK} of the mix of data.path = '{path}': "
                "raise it, or set data.mix to the other sources"
            )
    total = sum(_windows(sources[name], seq_len) for name in chosen)
    if total < batch_size:
        raise DataError(
            f"train.batch_size = {batch_size} is more than the {total} windows of data.path = '{path}': "
            "lower train.batch_size or data.seq_len, or prepare more text"
        )


def permuted(index: np.ndarray, size: int, key: int, epoch: np.ndarray) -> np.ndarray:
    """A bijection of 0 ... size - 1, another one for each key and epoch, without a table: a Feistel network on the next
    even number of bits; results outside are sent through again (cycle walking). int64 in and out."""
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    out = index.astype(np.uint64)
    epoch = np.broadcast_to(epoch.astype(np.uint64), index.shape)
    round_keys = _mix(np.array(key, dtype=np.uint64), np.arange(ROUNDS, dtype=np.uint64))
    walking = np.ones(len(out), dtype=bool)
    while walking.any():
        left, right, e = out[walking] >> half, out[walking] & mask, epoch[walking]
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key, e) & mask)
        out[walking] = (left << half) | right
        walking &= out >= size
    return out.astype(np.int64)


def _key(seed: int, stream: str) -> int:
    # By the name of a source, not its number: its order is the same in every mix.
    return xxhash.xxh3_64_intdigest(f"{seed}/{stream}".encode())


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # splitmix64's finaliser (Steele, Lea, Flood 2014) over both words; wraps on purpose.
    with np.errstate(over="ignore"):
        z = x * np.uint64(0x9E3779B97F4A7C15) + y * np.uint64(0xD1B54A32D192ED03) + np.uint64(0x632BE59BD9B4E019)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _block_counts(mix: dict[str, float], names: list[str]) -> np.ndarray:
    # How many samples of a block each source gets, by largest remainder: their sum is exactly BLOCK.
    weights = np.array([mix[name] for name in names], dtype=np.float64)
    exact = weights / weights.sum() * BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - int(counts.sum())]] += 1
    return counts
