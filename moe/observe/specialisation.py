"""What routing knows of a text's domain beyond the token: I(expert; domain | token), beside nulls and intervals.

    I(E; X | Z) = sum p(x, z, e) log2 [p(x, z, e) p(z) / (p(x, z) p(z, e))]

from counts, in bits. A token's K experts count 1 / K each: E is one of them, drawn at random. Counts see dependence where
there is none (Miller 1955); the same figure with the labels permuted among the tokens of equal z measures how much, and the
excess over its mean is what is reported. Letters: L MoE layers, T tokens, K experts of a token, E experts, D domains,
G documents, R permutations, B resamples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

PERMUTATIONS, FEW_PERMUTATIONS = 100, 20  # where a p value is asked for; where the mean alone is
SPLITS = 5  # of the documents of every domain into halves
RESAMPLES = 2000
LEVEL = 0.95  # of the intervals and of the band of the null
TIE = 1e-9  # bits: sums in another order


class Text(NamedTuple):
    """Of T tokens, int64: the token id, the domain 0 ... D - 1, the document, counted from 0 through all domains."""

    token_T: np.ndarray
    domain_T: np.ndarray
    document_T: np.ndarray


class Information(NamedTuple):
    """bits_L: the estimate from counts; null_RL: the same under each permutation."""

    bits_L: np.ndarray
    null_RL: np.ndarray

    @property
    def excess_L(self) -> np.ndarray:
        """Bits beyond the mean of the null; just below 0 at times where there is nothing."""
        return self.bits_L - self.null_RL.mean(0)

    @property
    def p_L(self) -> np.ndarray:
        """Share of the permutations, the observed one among them, that come as high (Phipson and Smyth 2010)."""
        return (1 + (self.null_RL >= self.bits_L - TIE).sum(0)) / (1 + len(self.null_RL))

    @property
    def band_2L(self) -> np.ndarray:
        """The middle LEVEL of the null, less its mean."""
        return _middle(self.null_RL) - self.null_RL.mean(0)


class Specialisation(NamedTuple):
    """beyond_token: I(expert; domain | token); interval_2L: of its excess, over documents. domain, token: I(expert; domain) and
    I(expert; token). ceiling: H(domain | token), the most that beyond_token can be. shares_LDE: `shares`.

    documents_alone_L: the excess that the documents would make if domains did not differ. A document has its own routing, the
    mean of M documents keeps a variance s / M of it, and D such means differ by (1 - 1/D) s / M. Two halves of a domain differ
    by s / M: that is measured, as the excess of I(expert; half | token, domain)."""

    beyond_token: Information
    interval_2L: np.ndarray
    domain: Information
    token: Information
    documents_alone_L: np.ndarray
    ceiling: float
    shares_LDE: np.ndarray


def specialisation(topk_ids_LTK: np.ndarray, text: Text, num_experts: int, seed: int = 0) -> Specialisation:
    """topk_ids_LTK: experts of every token, any integer type, none missing. The same seed gives the same figures."""
    assert topk_ids_LTK.min() >= 0, "padding is left out before"
    rng = np.random.default_rng(seed)
    token_T, domain_T, document_T = text
    whole_T, both_T = np.zeros_like(token_T), pairs(token_T, domain_T)

    def measured(label_T: np.ndarray, given_T: np.ndarray, permutations: int) -> Information:
        return information(topk_ids_LTK, num_experts, label_T, given_T, permutations, rng)

    beyond = measured(domain_T, token_T, PERMUTATIONS)
    splits = [split(text, rng) for _ in range(SPLITS)]
    halves = [measured(half_G[document_T], both_T, FEW_PERMUTATIONS // SPLITS).excess_L for half_G in splits]
    return Specialisation(
        beyond,
        resampled(contributions(topk_ids_LTK, num_experts, domain_T, token_T), text, rng) - beyond.null_RL.mean(0),
        measured(domain_T, whole_T, FEW_PERMUTATIONS),
        measured(token_T, whole_T, FEW_PERMUTATIONS),
        (1 - 1 / (domain_T.max() + 1)) * np.mean(halves, axis=0),
        (_xlogx(np.bincount(token_T)).sum() - _xlogx(np.bincount(both_T)).sum()) / len(token_T),
        shares(topk_ids_LTK, domain_T, num_experts),
    )


def information(
    topk_ids_LTK: np.ndarray,
    num_experts: int,
    label_T: np.ndarray,
    given_T: np.ndarray,
    permutations: int,
    rng: np.random.Generator,
) -> Information:
    """I(expert; label | given), and under `permutations` of the labels among the tokens of equal `given`, the same ones for
    every layer. label_T, given_T int64 >= 0."""
    layers, tokens, top_k = topk_ids_LTK.shape
    # Sorted, so that the counts of one `given` lie side by side in memory.
    sort_T = np.argsort(given_T, kind="stable")
    ids_LKT = np.ascontiguousarray(topk_ids_LTK[:, sort_T].transpose(0, 2, 1))
    given_T, label_T = _dense(given_T[sort_T]), label_T[sort_T]
    row_T = _dense(pairs(given_T, label_T))
    xlogx = _xlogx(np.arange(tokens * top_k + 1))

    def summed(group_T: np.ndarray) -> np.ndarray:
        return np.array([xlogx.take(_counts(group_T, ids_KT, num_experts)).sum() for ids_KT in ids_LKT])

    # A permutation moves neither the labels that a `given` has nor its experts: one of the four sums is left to do.
    fixed_L = xlogx[np.bincount(given_T) * top_k].sum() - xlogx[np.bincount(row_T) * top_k].sum() - summed(given_T)
    null_RL = np.empty((permutations, layers))
    for r in range(permutations):
        null_RL[r] = summed(row_T[np.argsort(given_T + rng.random(tokens))])
    return Information((summed(row_T) + fixed_L) / (tokens * top_k), (null_RL + fixed_L) / (tokens * top_k))


def contributions(topk_ids_LTK: np.ndarray, num_experts: int, label_T: np.ndarray, given_T: np.ndarray) -> np.ndarray:
    """Bits [L, T] whose mean over the tokens is I(expert; label | given)."""
    given_T, row_T = _dense(given_T), _dense(pairs(given_T, label_T))
    sizes_T = np.log2(np.bincount(given_T)[given_T] / np.bincount(row_T)[row_T])
    out_LT = np.empty(topk_ids_LTK.shape[:2])
    for bits_T, ids_TK in zip(out_LT, topk_ids_LTK, strict=True):
        joint_KT, alone_KT = (
            _counts(group_T, ids_TK.T, num_experts)[_cells(group_T, ids_TK.T, num_experts)]
            for group_T in (row_T, given_T)
        )
        bits_T[:] = sizes_T + np.log2(joint_KT / alone_KT).mean(0)
    return out_LT


def resampled(bits_LT: np.ndarray, text: Text, rng: np.random.Generator) -> np.ndarray:
    """The middle LEVEL [2, L] of mean bits when the documents of every domain are drawn anew, each domain's weight kept.

    The contributions are the influence function of the information: they are resampled, not the counts, because counts of
    repeated documents see still more dependence where there is none."""
    _, domain_T, document_T = text
    domain_G = np.zeros(document_T.max() + 1, dtype=np.int64)
    domain_G[document_T] = domain_T
    tokens_G = np.bincount(document_T)
    sums_GL = np.stack([np.bincount(document_T, bits_T) for bits_T in bits_LT], axis=1)
    total_BL = np.zeros((RESAMPLES, len(bits_LT)))
    for domain, weight in enumerate(np.bincount(domain_T) / len(domain_T)):
        mine = np.flatnonzero((domain_G == domain) & (tokens_G > 0))
        drawn_BG = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=RESAMPLES)
        total_BL += weight * (drawn_BG @ sums_GL[mine]) / (drawn_BG @ tokens_G[mine])[:, None]
    return _middle(total_BL)


def split(text: Text, rng: np.random.Generator) -> np.ndarray:
    """0 or 1 for each document [G]: half of the documents of every domain, at random."""
    half_G = np.zeros(text.document_T.max() + 1, dtype=np.int64)
    for domain in range(text.domain_T.max() + 1):
        mine = np.unique(text.document_T[text.domain_T == domain])
        half_G[rng.permutation(mine)[: len(mine) // 2]] = 1
    return half_G


def shares(topk_ids_LTK: np.ndarray, domain_T: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, D, E]: share of a domain's pairs of token and expert at each expert, times E; 1 where the domain has no favourite."""
    counts_LDE = np.stack(
        [_counts(domain_T, ids_TK.T, num_experts).reshape(-1, num_experts) for ids_TK in topk_ids_LTK]
    )
    return counts_LDE / counts_LDE.mean(-1, keepdims=True)


def facts(found: Specialisation, layers: list[int], text: Text, names: list[str]) -> dict[str, Any]:
    """For eval-STEP.json: of the text, then of every layer, by its global index, in bits."""
    documents = {name: len(np.unique(text.document_T[text.domain_T == d])) for d, name in enumerate(names)}
    beyond = found.beyond_token
    columns = {
        "excess": beyond.excess_L,
        "low": found.interval_2L[0],
        "high": found.interval_2L[1],
        "null_mean": beyond.null_RL.mean(0),
        "null_low": beyond.band_2L[0],
        "null_high": beyond.band_2L[1],
        "p": beyond.p_L,
        "documents_alone": found.documents_alone_L,
        "domain": found.domain.excess_L,
        "token": found.token.excess_L,
    }
    about = {"tokens": len(text.token_T), "documents": documents, "permutations": len(beyond.null_RL)}
    rows = {
        f"layer_{layer:02d}": {name: float(value_L[l]) for name, value_L in columns.items()}
        for l, layer in enumerate(layers)
    }
    return {**about, "ceiling": float(found.ceiling), "layers": rows}


def pairs(a_T: np.ndarray, b_T: np.ndarray) -> np.ndarray:
    """One number for every pair."""
    return a_T * (b_T.max() + 1) + b_T


def _dense(x_T: np.ndarray) -> np.ndarray:
    """The same classes, numbered without gaps in their order."""
    return np.unique(x_T, return_inverse=True)[1]


def _cells(group_T: np.ndarray, ids_KT: np.ndarray, num_experts: int) -> np.ndarray:
    return group_T * num_experts + ids_KT


def _counts(group_T: np.ndarray, ids_KT: np.ndarray, num_experts: int) -> np.ndarray:
    """Pairs of every group and expert, flat: group * E + expert."""
    cells_KT = _cells(group_T, ids_KT, num_experts)
    return np.bincount(cells_KT.ravel(), minlength=(int(group_T.max()) + 1) * num_experts)


def _xlogx(n: np.ndarray) -> np.ndarray:
    return n * np.log2(np.maximum(n, 1))


def _middle(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
