"""The order of the samples, the mix, the held-out batches, and every refusal of a prepared folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.loss import IGNORED
from moe.train.data import BLOCK, DataError, TokenData, permuted
from tests.corpus import make_token_folder

S = 8


def open_data(folder, mix=None, seed=3, batch_size=4, seq_len=S, vocab_size=128, verify=True):
    return TokenData.open(str(folder), seq_len, mix or {}, seed, vocab_size, batch_size, verify)


def ids(data, first_step, steps):
    """(source index, window) of whole steps, one after another."""
    found = [data.sample_ids(step) for step in range(first_step, first_step + steps)]
    return np.concatenate([s for s, _ in found]), np.concatenate([w for _, w in found])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_token_folder(tmp_path_factory.mktemp("data") / "one", {"text": 801})  # 100 windows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    # 300, 100 and 50 windows
    return make_token_folder(tmp_path_factory.mktemp("data") / "three", {"wiki": 2401, "law": 801, "python": 408})


# -- the order -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**20))
def test_permutation_is_a_bijection(size, key, epoch):
    out = permuted(np.arange(size), size, key, np.array(epoch))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permutation_depends_on_key_and_epoch_and_looks_random():
    index = np.arange(5000)
    base = permuted(index, 5000, 0, np.array(0))
    for other in (permuted(index, 5000, 1, np.array(0)), permuted(index, 5000, 0, np.array(1)), index):
        # The correlation of independent permutations has a standard deviation of 1/sqrt(5000) = 0.014.
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.07
    assert abs(np.corrcoef(base[1:], base[:-1])[0, 1]) < 0.07


@pytest.mark.parametrize("size", [3, 5, 10])
def test_small_permutations_are_uniform_over_epochs(size):
    epochs = np.arange(20_000)
    first, second = (permuted(np.full(20_000, place), size, 5, epochs) for place in (0, 1))
    counts = np.bincount(first * size + second, minlength=size**2).reshape(size, size)[~np.eye(size, dtype=bool)]
    cells = size * (size - 1)
    # Chi-squared of the ordered pair, its mean and standard deviation at that many degrees of freedom.
    assert ((counts - 20_000 / cells) ** 2 * cells / 20_000).sum() < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


def test_the_order_never_changes(folder, mixed):
    # A checkpoint continues in this order: changing it is a new format.
    assert open_data(folder).sample_ids(7)[1].tolist() == [26, 79, 92, 83]
    source, window = open_data(mixed, {"wiki": 2.0, "law": 1.0}).sample_ids(1000)
    assert [source.tolist(), window.tolist()] == [[1, 0, 0, 0], [33, 229, 215, 182]]


def test_windows_cover_the_source_once_an_epoch(folder):
    data = open_data(folder)  # 100 windows, 25 steps an epoch
    first, second = ids(data, 0, 25)[1], ids(data, 25, 25)[1]
    assert sorted(first) == list(range(100)) == sorted(second)
    assert first.tolist() != second.tolist()


def test_epoch_may_end_inside_a_step(folder):
    data = open_data(folder, batch_size=7)
    windows = ids(data, 0, 100)[1]
    for epoch in range(7):
        assert sorted(windows[epoch * 100 : (epoch + 1) * 100]) == list(range(100))


def test_batches_are_the_windows_with_targets_shifted_by_one(folder):
    data = open_data(folder)
    tokens = np.fromfile(folder / "text-train.bin", "<u2").astype(np.int64)
    batch = data.train_batch(5, 1, 3)
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64
    for row, window in enumerate(data.sample_ids(5)[1][1:4]):
        assert batch.tokens_BS[row].tolist() == tokens[window * S : window * S + S].tolist()
        assert batch.targets_BS[row].tolist() == tokens[window * S + 1 : window * S + S + 1].tolist()


def test_uint32_tokens(tmp_path):
    folder = make_token_folder(tmp_path / "wide", {"text": 801})
    wide = np.fromfile(folder / "text-train.bin", "<u2").astype("<u4") + 70_000
    edit_meta(folder, dtype="uint32", vocab_size=80_000)
    wide.tofile(folder / "text-train.bin")
    np.full(200, 70_001, "<u4").tofile(folder / "text-val.bin")
    rehash(folder)
    batch = open_data(folder, vocab_size=80_000).train_batch(0, 0, 4)
    assert batch.tokens_BS.min() >= 70_000


def test_any_step_is_reached_at_once(mixed):
    walked, fresh = open_data(mixed), open_data(mixed)
    for step in range(40):
        walked.train_batch(step, 0, 4)
    for a, b in zip(walked.train_batch(40, 0, 4), fresh.train_batch(40, 0, 4), strict=True):
        assert torch.equal(a, b)
    source, window = fresh.sample_ids(10**12)  # far beyond any run, without a table
    assert len(source) == 4 and (window < 300).all()


@pytest.mark.parametrize("ranks", [2, 4])
def test_order_does_not_depend_on_the_ranks(mixed, ranks):
    data, per_rank = open_data(mixed, batch_size=8), 8 // ranks
    for step in (0, 200):
        whole = data.train_batch(step, 0, 8)
        parts = [open_data(mixed, batch_size=8).train_batch(step, rank * per_rank, per_rank) for rank in range(ranks)]
        assert torch.equal(whole.tokens_BS, torch.cat([part.tokens_BS for part in parts]))
        assert torch.equal(whole.targets_BS, torch.cat([part.targets_BS for part in parts]))


def test_order_does_not_depend_on_the_batch_size(mixed):
    small, large = ids(open_data(mixed, batch_size=4), 0, 64), ids(open_data(mixed, batch_size=16), 0, 16)
    assert np.array_equal(small, large)


def test_order_hash_rolls(folder):
    data, other = open_data(folder), open_data(folder, seed=4)
    first = data.order_hash("", 0)
    assert data.order_hash(first, 1) == open_data(folder).order_hash(first, 1)
    assert len({first, data.order_hash("", 1), data.order_hash(first, 1), other.order_hash("", 0)}) == 4


# -- the mix ---------------------------------------------------------------------------------------------------------


def test_shares_are_exact_in_every_block(mixed):
    data = open_data(mixed, {"python": 2.0, "wiki": 6.0, "law": 3.0}, batch_size=BLOCK // 8)
    for block in range(3):
        source, _ = ids(data, 8 * block, 8)
        # 1024 * (6, 3, 2) / 11 = 558.5, 279.3, 186.2: the one left goes to the largest remainder.
        assert np.bincount(source).tolist() == [559, 279, 186]
    assert not np.array_equal(ids(data, 0, 8)[0], ids(data, 8, 8)[0])


def test_sources_of_a_mix_come_in_the_order_of_the_folder(mixed):
    one, two = open_data(mixed, {"wiki": 1.0, "law": 3.0}), open_data(mixed, {"law": 3.0, "wiki": 1.0})
    assert one.names == two.names == ["wiki", "law"]
    assert one.fingerprint == two.fingerprint
    assert np.array_equal(one.sample_ids(3), two.sample_ids(3))


def test_every_source_is_read_once_an_epoch_of_its_own(mixed):
    source, window = ids(open_data(mixed, {"wiki": 1.0, "law": 1.0}, batch_size=256), 0, 8)
    for index, windows in ((0, 300), (1, 100)):
        mine = window[source == index]
        assert len(mine) == BLOCK
        for epoch in range(BLOCK // windows):
            assert sorted(mine[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_a_source_has_the_same_order_in_every_mix(mixed):
    alone = open_data(mixed, {"law": 1.0}, batch_size=100).sample_ids(0)[1]
    source, window = ids(open_data(mixed, {"wiki": 2.0, "law": 1.0, "python": 1.0}, batch_size=256), 0, 4)
    assert window[source == 1][:100].tolist() == alone.tolist()


def test_empty_mix_weighs_by_windows(mixed):
    whole = np.bincount(ids(open_data(mixed, batch_size=256), 0, 4)[0])
    assert whole.tolist() == [683, 227, 114]  # 1024 * (300, 100, 50) / 450 = 682.7, 227.6, 113.8


def test_fingerprint_follows_what_is_read(mixed, tmp_path):
    base = open_data(mixed).fingerprint
    assert base == open_data(mixed, seed=9, batch_size=2, verify=False).fingerprint
    twin = make_token_folder(tmp_path / "twin", {"wiki": 2401, "law": 801, "python": 408})
    assert base == open_data(twin).fingerprint
    changed = make_token_folder(tmp_path / "changed", {"wiki": 2401, "law": 801, "python": 408}, seed=1)
    assert open_data(mixed, {"law": 1.0}, seq_len=4).fingerprint != open_data(mixed, {"law": 1.0}).fingerprint
    others = [open_data(mixed, {"wiki": 1.0}), open_data(changed)]
    assert len({base, *(other.fingerprint for other in others)}) == 3


# -- held out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_tokens", [None, 1, 50, 10**9])
def test_val_batches_are_equal_in_number_and_cover_the_same_windows(mixed, world_size, max_tokens):
    data = open_data(mixed)
    ranks = [list(data.val_batches(5, rank, world_size, max_tokens)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    # Round-robin: batch 0 of rank 0, batch 0 of rank 1, ...
    rows = [row for round_ in zip(*ranks, strict=True) for batch in round_ for row in zip(*batch, strict=True)]
    real = [(t[y != IGNORED].tolist(), y[y != IGNORED].tolist()) for t, y in rows if (y != IGNORED).any()]
    single = [row for batch in data.val_batches(5, 0, 1, max_tokens) for row in zip(*batch, strict=True)]
    assert real == [(t[y != IGNORED].tolist(), y[y != IGNORED].tolist()) for t, y in single if (y != IGNORED).any()]
    if max_tokens is not None and max_tokens < 600:
        assert len(real) == -(-max_tokens // S)


def test_val_covers_every_held_out_target_once_and_pads(tmp_path):
    folder = make_token_folder(tmp_path / "two", {"a": 100, "b": 100}, val_tokens=21)  # 20 targets: 8 + 8 + 4
    data = open_data(folder)
    batches = list(data.val_batches(4, 1, 2, None))
    assert len(batches) == 1
    tokens, targets = (
        torch.cat(parts) for parts in zip(next(data.val_batches(4, 0, 2, None)), batches[0], strict=True)
    )
    held = [np.fromfile(folder / f"{name}-val.bin", "<u2").astype(int).tolist() for name in "ab"]
    assert targets[targets != IGNORED].tolist() == held[0][1:] + held[1][1:]
    assert tokens[targets != IGNORED].tolist() == held[0][:-1] + held[1][:-1]
    assert (tokens[targets == IGNORED] == data.eos_id).all()
    assert (targets[6:] == IGNORED).all() and tokens.shape == (8, S)  # the short rank's last rows are all padding


def test_val_of_a_limit_is_spread_over_the_text(mixed):
    data = open_data(mixed, {"wiki": 1.0})
    held = np.fromfile(mixed / "wiki-val.bin", "<u2").astype(int).tolist()
    (batch,) = data.val_batches(5, 0, 1, 5 * S)
    assert batch.tokens_BS.tolist() == [held[w * S : w * S + S] for w in (0, 5, 10, 15, 20)]  # of 25 windows


def test_labelled_windows_are_as_many_of_every_source_and_know_their_document(tmp_path):
    folder = make_token_folder(tmp_path / "two", {"a": 100, "b": 100}, val_tokens=50)
    held = {name: np.fromfile(folder / f"{name}-val.bin", "<u2") for name in "ab"}
    data = open_data(folder)
    data._val = [held["a"], held["b"][:29]]  # 6 windows of S = 8, and 3
    found = data.labelled(None)
    assert found.tokens_NS.dtype == torch.int64 and found.tokens_NS.shape == (6, S)
    at = [w * S for w in (0, 2, 4)]
    assert found.tokens_NS[:3].tolist() == [held["a"][i : i + S].tolist() for i in at]
    assert found.tokens_NS[3:].tolist() == [held["b"][i : i + S].tolist() for i in (0, 8, 16)]
    assert found.source_NS.tolist() == [[0] * S] * 3 + [[1] * S] * 3
    # A document ends with its end token, 0: at 0, 17, 34 in either text. The second text's are counted on.
    ended = [[(held["a"][:i] == data.eos_id).sum() for i in range(first, first + S)] for first in at]
    assert found.document_NS[:3].tolist() == ended and ended[0] == [0] + [1] * 7
    before = 1 + (held["a"][:-1] == data.eos_id).sum()
    assert (found.document_NS[3] == before + np.array([0] + [1] * 7)).all()
    assert len(data.labelled(4 * S).tokens_NS) == 4 and len(data.labelled(1).tokens_NS) == 2


def test_labelled_refuses_a_source_without_a_window(tmp_path):
    data = open_data(make_token_folder(tmp_path / "two", {"a": 100, "b": 100}, val_tokens=7))
    with pytest.raises(DataError, match=r"^source a has 7 held-out tokens, less than one window of data.seq_len = 8: "):
        data.labelled(None)


def test_bytes_per_token(mixed):
    assert open_data(mixed).bytes_per_token_val == 3.0


# -- refusals --------------------------------------------------------------------------------------------------------


def edit_meta(folder, **fields):
    file = folder / "meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rehash(folder):
    from moe.train.folder import ITEM_BYTES, file_hash

    meta = json.loads((folder / "meta.json").read_text())
    for source in meta["sources"].values():
        for part in (source["train"], source["val"]):
            file = folder / part["file"]
            part.update(xxh3=file_hash(file), tokens=file.stat().st_size // ITEM_BYTES[meta["dtype"]])
    edit_meta(folder, **meta)


def flip_a_bit(folder):
    file = folder / "text-train.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def truncate(folder):
    file = folder / "text-val.bin"
    file.write_bytes(file.read_bytes()[:-2])


def empty_train(folder):
    (folder / "text-train.bin").write_bytes(b"")
    rehash(folder)


def drop(name):
    return lambda folder: (folder / name).unlink()


REFUSED = {
    "no meta": (drop("meta.json"), {}, "has no meta.json: run `alf-moe prepare`"),
    "half a meta": (lambda f: (f / "meta.json").write_text('{"format'), {}, "meta.json cannot be read"),
    "a list": (lambda f: (f / "meta.json").write_text("[]"), {}, "meta.json cannot be read"),
    "format": (lambda f: edit_meta(f, format_version=2), {}, "format_version 2, this version reads 1"),
    "no sources": (lambda f: edit_meta(f, sources={}), {}, "no sources"),
    "dtype": (lambda f: edit_meta(f, dtype="int8"), {}, "lacks or misstates an entry ('int8')"),
    "an entry": (lambda f: edit_meta(f, tokenizer={}), {}, "lacks or misstates an entry ('file')"),
    "eos": (lambda f: edit_meta(f, eos_id=128), {}, "lacks or misstates an entry (eos_id)"),
    "no tokens": (drop("text-val.bin"), {}, "lacks the file text-val.bin"),
    "no tokenizer": (drop("tokenizer.json"), {}, "lacks the file tokenizer.json"),
    "changed": (flip_a_bit, {}, "text-train.bin was changed since it was prepared: remove the folder and run"),
    "truncated": (truncate, {}, "text-val.bin has 398 bytes instead of 400"),
    "empty": (empty_train, {}, "data.seq_len = 8 is too long for source text"),
    "vocabulary": (None, {"vocab_size": 100}, "set model.vocab_size to at least 128"),
    "unknown source": (None, {"mix": {"texts": 1.0}}, "did you mean data.mix.text?"),
    "unlike any": (None, {"mix": {"zzz": 1.0}}, "its sources are text"),
    "long windows": (None, {"seq_len": 801}, "data.seq_len = 801 is too long for source text"),
    "large batch": (None, {"batch_size": 101}, "train.batch_size = 101 is more than the 100 windows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(tmp_path, case):
    spoil, arguments, says = REFUSED[case]
    folder = make_token_folder(tmp_path / "folder", {"text": 801})
    open_data(folder)
    if spoil:
        spoil(folder)
    with pytest.raises(DataError) as caught:
        open_data(folder, **arguments)
    sentence = str(caught.value)
    assert says in sentence and "\n" not in sentence and str(folder) in sentence


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist: run `alf-moe prepare`"):
        open_data(tmp_path / "none")


def test_limits_are_inclusive(folder):
    assert open_data(folder, seq_len=800, batch_size=1).train_batch(0, 0, 1).tokens_BS.shape == (1, 800)
    assert open_data(folder, batch_size=100, vocab_size=128).batch_size == 100


def test_tiny_share(mixed):
    with pytest.raises(DataError, match=r"data\.mix\.law = 0\.0001 is less than 1/1024 of the mix"):
        open_data(mixed, {"wiki": 1.0, "law": 1e-4})


def test_without_verify_only_sizes_are_checked(tmp_path):
    folder = make_token_folder(tmp_path / "folder", {"text": 801})
    flip_a_bit(folder)
    open_data(folder, verify=False)
    truncate(folder)
    with pytest.raises(DataError, match="instead of 400"):
        open_data(folder, verify=False)
