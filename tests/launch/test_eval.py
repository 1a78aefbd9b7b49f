"""`alf-moe eval` against the same scores computed with transformers on the exported model."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from launch import cli
from launch import eval as command
from launch.ckpt import trainer_of
from moe.observe.sinks import read_metrics
from moe.train.data import TokenData
from moe.train.loop import train
from moe.train.questions import TASKS, read_questions
from tests.corpus import make_token_folder
from tests.moe.observe.test_specialisation import naive
from tests.moe.train.test_questions import archive, request
from tests.moe.train.test_run import config
from tests.tiny import ALONE, CPU

ENDS = (" of the river", " load balance", " naïve expert two", " x = y + 1;")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Questions of every set in the words of the run's text, in a folder as fetched."""
    folder = tmp_path_factory.mktemp("raw")
    texts = [f"the router of expert {i} {'bias ' * i}the token" for i in range(7)]
    tasks = {
        task: [request(i, k, text, end, i % 4) for i, text in enumerate(texts) for k, end in enumerate(ENDS)]
        + [request(1_000_000 + i, 0, "Answer:", " x", 0) for i in range(7)]
        for task in TASKS
        if task != "lambada"
    }
    tasks["lambada"] = [request(i, 0, text, ENDS[i % 4], [ENDS[i % 4]]) for i, text in enumerate(texts)]
    file = archive(folder / command.SETS.file, **tasks)
    package = command.SETS._replace(sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    return folder, package


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory):
    """A run of 2 steps on two sources."""
    base = tmp_path_factory.mktemp("domains")
    data = make_token_folder(base / "data", {"wiki": 2000, "law": 1000}, val_tokens=400)
    assert train(config(data, train__steps=2), ALONE, base / "run", False).code == 0
    return base / "run"


def evaluate(capsys, *words):
    capsys.readouterr()
    code = cli.main(["eval", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_scores_are_those_of_transformers_on_the_exported_model(trained, sets, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    raw, package = sets
    monkeypatch.setattr(command, "SETS", package)
    code, said, err = evaluate(capsys, trained, "--raw", raw)
    assert code == 0, err
    found = json.loads((trained / "eval-00000004.json").read_text())["tasks"]
    assert list(found) == list(command.NAMES[:-1]) and all(f"\n{task} " in said for task in command.NAMES)
    assert "specialisation left out: data.path" in said and "gave the run one source, notes" in said
    assert cli.main(["export", str(trained), str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))

    @torch.no_grad()
    def score(ids):
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def choice(context, continuation):
        whole = [0, *tokenizer.encode(context + continuation).ids][-33:]
        n = len(tokenizer.encode(context + continuation).ids) - len(tokenizer.encode(context).ids)
        logs = score(whole[:-1])[-n:]
        return [float(row[token]) for row, token in zip(logs, whole[-n:], strict=True)], logs.argmax(
            -1
        ).tolist() == whole[-n:]

    for task in TASKS:
        asked = read_questions(raw / package.file, task)
        scored = [[choice(c, e) for c, e in zip(q.contexts, q.continuations, strict=True)] for q in asked]
        if task == "lambada":
            assert found[task]["acc"] == sum(s[0][1] for s in scored) / 7
            nats = -sum(sum(s[0][0]) for s in scored) / 7
            assert found[task]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
            continue
        sums = [[sum(nats) for nats, _ in choices] for choices in scored]
        right = [s.index(max(s)) == q.gold for s, q in zip(sums, asked, strict=True)]
        each = [[s / len(e.strip()) for s, e in zip(row, ENDS, strict=True)] for row in sums]
        normed = [s.index(max(s)) == q.gold for s, q in zip(each, asked, strict=True)]
        assert found[task]["acc"] == pytest.approx(sum(right) / 7) and found[task]["acc_norm"] == pytest.approx(
            sum(normed) / 7
        )
        assert found[task]["chance"] == 0.25

    data = TokenData.open(str(trained.parent / "data"), 32, {}, 0, 320, 8)
    nats = tokens = 0.0
    for batch in data.val_batches(4, 0, 1, None):
        for x, y in zip(batch.tokens_BS, batch.targets_BS, strict=True):
            logs = score(x.tolist())
            nats -= sum(float(logs[i, t]) for i, t in enumerate(y.tolist()) if t >= 0)
            tokens += int((y >= 0).sum())
    assert found["val"]["tokens"] == tokens and found["val"]["ce"] == pytest.approx(nats / tokens, rel=1e-5)
    own = [row for row in read_metrics(trained / "metrics.jsonl") if "val/ce" in row][-1]
    assert found["val"]["ce"] == pytest.approx(own["val/ce"], rel=1e-6)
    assert found["val"]["bits_per_byte"] == pytest.approx(own["val/bits_per_byte"], rel=1e-6)


def test_a_second_evaluation_keeps_what_the_first_one_found_under_the_same_conditions(
    trained, sets, monkeypatch, capsys
):
    raw, package = sets
    monkeypatch.setattr(command, "SETS", package)
    file = trained / "eval-00000002.json"
    checkpoint = trained / "checkpoints/step-00000002"
    assert evaluate(capsys, checkpoint, "--raw", raw, "--tasks", "piqa", "--limit", "3")[0] == 0
    assert json.loads(file.read_text())["tasks"]["piqa"]["questions"] == 3
    assert evaluate(capsys, checkpoint, "--raw", raw, "--tasks", "winogrande", "--limit", "3")[0] == 0
    assert set(json.loads(file.read_text())["tasks"]) == {"piqa", "winogrande"}
    assert evaluate(capsys, checkpoint, "--tasks", "val", "--dtype", "bfloat16")[0] == 0
    again = json.loads(file.read_text())
    assert set(again["tasks"]) == {"val"} and again["dtype"] == "bfloat16"


def test_specialisation_is_that_of_the_routed_experts(two_domains, capsys):
    before = {path: path.read_bytes() for path in (two_domains / "checkpoints").rglob("*") if path.is_file()}
    code, said, err = evaluate(capsys, two_domains, "--tasks", "specialisation")
    assert code == 0, err
    assert "50 documents, 2 domains" in said
    assert {path: path.read_bytes() for path in (two_domains / "checkpoints").rglob("*") if path.is_file()} == before
    found = json.loads((two_domains / "eval-00000002.json").read_text())["tasks"]["specialisation"]
    assert found["tokens"] == 2 * 400 and found["documents"] == {"wiki": 25, "law": 25}

    options = command.parser().parse_args([str(two_domains)])
    checkpoint = two_domains / "checkpoints/step-00000002"
    settings = command.settings(checkpoint, options)
    data = command.open_data(settings, trainer_of(checkpoint))
    model = command.load_model(settings, checkpoint, data.eos_id, CPU).eval()
    labelled, chosen = data.labelled(None), {layer: [] for layer in model.routers}
    for layer, router in model.routers.items():
        router.register_forward_hook(lambda _m, _i, routing, layer=layer: chosen[layer].append(routing.topk_ids_TK))
    with torch.no_grad():
        for row in labelled.tokens_NS:
            model(row[None], row[None])
    assert list(found["layers"]) == [f"layer_{layer:02d}" for layer in model.routers] == ["layer_01", "layer_02"]
    tokens, domains = labelled.tokens_NS.flatten().tolist(), labelled.source_NS.ravel().tolist()
    for ids, layer in zip(chosen.values(), found["layers"].values(), strict=True):
        expected = naive(torch.cat(ids), domains, tokens)
        assert layer["excess"] + layer["null_mean"] == pytest.approx(expected, abs=1e-9)
        assert layer["low"] < layer["excess"] < layer["high"]
    with Image.open(two_domains / "specialisation-00000002.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_specialisation_of_fewer_tokens_and_without_matplotlib(two_domains, monkeypatch, capsys):
    (two_domains / "specialisation-00000002.png").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said, err = evaluate(capsys, two_domains, "--tasks", "specialisation,val", "--val-tokens", "200")
    assert code == 0 and "no plot: matplotlib is not installed" in err
    assert not (two_domains / "specialisation-00000002.png").exists()
    found = json.loads((two_domains / "eval-00000002.json").read_text())["tasks"]
    assert set(found) == {"val", "specialisation"} and found["specialisation"]["tokens"] == 192  # 6 of 16 for each


@pytest.mark.parametrize(
    ("settings", "val_tokens", "says"),
    [
        (
            {"model__first_k_dense": 3, "balance__method": "none"},
            40,
            "model.first_k_dense = 3 leaves no layer with a router",
        ),
        ({}, 15, "source law has 15 held-out tokens, less than one window of data.seq_len = 16"),
        ({}, 16, None),
    ],
)
def test_a_run_without_routers_or_held_out_windows_has_no_domains(tmp_path, settings, val_tokens, says):
    make_token_folder(tmp_path / "data", {"wiki": 200, "law": 200}, val_tokens=val_tokens)
    c = config(tmp_path / "data", **settings)
    problem = command.no_domains(c, TokenData.open(c.data.path, c.data.seq_len, {}, 0, c.model.vocab_size))
    assert (problem or "").startswith(says or "") and (problem is None) == (says is None)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--tasks", "piqa,boolq"], 2, "--tasks boolq is not known: choose some of val, lambada"),
        (["--tasks", ","], 2, "--tasks names none"),
        (
            ["--tasks", "specialisation"],
            2,
            "one source, notes, and domains are told apart by their source: take a run on",
        ),
        (["--limit", "0"], 2, "--limit 0 is no number of questions"),
        (["--tasks", "val", "--data", "nowhere"], 3, "nowhere"),
    ],
)
def test_bad_words_are_one_sentence(trained, capsys, words, code, says):
    found, _, err = evaluate(capsys, trained, *words)
    assert found == code and says in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_questions_that_cannot_be_fetched_are_one_sentence_with_a_way_out(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SETS", command.SETS._replace(command=("false",)))
    code, _, err = evaluate(capsys, trained, "--raw", tmp_path, "--tasks", "piqa")
    assert code == 3 and "leave the questions out with --tasks val" in err and err.count("\n") == 1, err


def test_a_run_without_a_checkpoint_is_one_sentence(tmp_path, capsys):
    code, _, err = evaluate(capsys, tmp_path)
    assert code == 2 and "holds no checkpoint" in err


@pytest.mark.skipif(not Path("data/raw", command.SETS.file).exists(), reason="the question sets are not fetched")
def test_the_fetched_sets_have_as_many_questions_as_published():
    with zipfile.ZipFile(Path("data/raw", command.SETS.file)):
        counts = {task: len(read_questions(Path("data/raw", command.SETS.file), task)) for task in TASKS}
    assert counts == {"lambada": 5153, "hellaswag": 10042, "arc_easy": 570, "piqa": 1838, "winogrande": 1267}
