"""I(expert; domain | token) where it is known: by hand, none, of the token alone, all of it; its null, its interval."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from moe.observe import specialisation as observed
from moe.observe.specialisation import Text, contributions, facts, information, shares, specialisation, split


def naive(ids_TK, label_T, given_T):
    """The defining sum, pair by pair."""
    tokens, top_k = ids_TK.shape
    triples = [(x, z, e) for row, x, z in zip(ids_TK.tolist(), label_T, given_T, strict=True) for e in row]
    n_xze, n_xz = Counter(triples), Counter((x, z) for x, z, _ in triples)
    n_ze, n_z = Counter((z, e) for _, z, e in triples), Counter(z for _, z, _ in triples)
    bits = (n * math.log2(n * n_z[z] / (n_xz[x, z] * n_ze[z, e])) for (x, z, e), n in n_xze.items())
    return sum(bits) / (tokens * top_k)


def random_text(rng, tokens, domains=4, vocab=30, documents=5):
    """Domains of unlike vocabulary; documents of unlike length."""
    domain_T = np.sort(rng.integers(0, domains, tokens))
    token_T = (rng.geometric(0.15, tokens) + 3 * domain_T) % vocab
    return Text(token_T, domain_T, domain_T * documents + rng.integers(0, documents, tokens) ** 2 // documents)


def random_experts(rng, layers, tokens, top_k, experts):
    return rng.random((layers, tokens, experts)).argsort(-1)[..., :top_k].astype(np.int16)


def test_tables_by_hand():
    # Token 7: 2 of domain 0 at expert 0; of domain 1 one at expert 0, one at expert 1. Token 9 is of one domain.
    token, domain = np.array([7, 7, 7, 7, 9, 9, 9, 9]), np.array([0, 0, 1, 1, 1, 1, 1, 1])
    ids = np.array([0, 0, 0, 1, 0, 1, 2, 2])[None, :, None]
    half = 0.5 * math.log2(0.5 / (0.5 * 0.75)) + 0.25 * math.log2(0.25 / (0.5 * 0.25)) + 0.25 * math.log2(0.25 / 0.375)
    found = information(ids, 3, domain, token, 0, np.random.default_rng(0))
    assert found.bits_L == pytest.approx([half / 2], abs=1e-12)
    # Two experts a token: 0 and 1 in one domain, 0 and 2 in the other; of one drawn at random expert 0 says nothing.
    ids = np.array([[0, 1], [0, 1], [2, 0], [0, 2]])[None]
    found = information(ids, 3, domain[:4], token[:4], 0, np.random.default_rng(0))
    assert found.bits_L == pytest.approx([0.5], abs=1e-12)
    assert shares(ids, domain[:4], 3).tolist() == [[[1.5, 1.5, 0], [1.5, 0, 1.5]]]


def test_estimate_and_contributions_are_the_defining_sum():
    rng = np.random.default_rng(1)
    text, ids = random_text(rng, 500), random_experts(rng, 3, 500, 2, 6)
    for label, given in (
        (text.domain_T, text.token_T),
        (text.token_T, text.domain_T),
        (text.token_T, 0 * text.token_T),
    ):
        expected = [naive(ids_TK, label.tolist(), given.tolist()) for ids_TK in ids]
        assert information(ids, 6, label, given, 0, rng).bits_L == pytest.approx(expected, abs=1e-12)
        assert contributions(ids, 6, label, given).mean(-1) == pytest.approx(expected, abs=1e-12)


def test_the_null_is_every_order_of_the_domains_within_a_token():
    token, domain = np.array([3, 1, 3, 3, 1, 3, 3, 1]), np.array([0, 1, 0, 1, 0, 1, 1, 1])
    ids = np.array([[0, 1], [2, 3], [1, 2], [2, 0], [2, 0], [3, 1], [3, 2], [0, 1]])
    at = [np.flatnonzero(token == v) for v in (1, 3)]
    every = []
    for ones, threes in itertools.product(*(itertools.permutations(domain[place]) for place in at)):
        permuted = domain.copy()
        permuted[at[0]], permuted[at[1]] = ones, threes
        every.append(naive(ids, permuted.tolist(), token.tolist()))
    null = information(ids[None], 4, domain, token, 4000, np.random.default_rng(2)).null_RL[:, 0]
    assert set(null.round(9)) == set(np.round(every, 9))
    assert null.mean() == pytest.approx(np.mean(every), abs=4 * np.std(every) / math.sqrt(4000))


def test_p_counts_ties_and_the_observed():
    found = observed.Information(np.array([0.3, 0.5]), np.array([[0.1, 0.2], [0.3 - 1e-12, 0.1], [0.4, 0.3]]))
    assert found.p_L.tolist() == [3 / 4, 1 / 4]
    assert found.excess_L == pytest.approx([0.3 - 0.8 / 3, 0.3])


def test_independent_routing_has_no_excess_and_p_is_uniform():
    rng = np.random.default_rng(3)
    text, layers = random_text(rng, 1500), 400
    found = information(random_experts(rng, layers, 1500, 2, 8), 8, text.domain_T, text.token_T, 39, rng)
    assert found.null_RL.mean() > 0.05  # the bias that the null is for
    assert abs(found.excess_L.mean()) < 4 * found.excess_L.std() / math.sqrt(layers)
    assert abs(found.p_L.mean() - 0.5125) < 4 * math.sqrt(1 / 12 / layers)  # of 1/40, 2/40 ... 1
    assert abs((found.p_L <= 0.1).mean() - 0.1) < 4 * math.sqrt(0.09 / layers)


def test_routing_by_the_token_knows_the_domain_and_nothing_beyond():
    rng = np.random.default_rng(4)
    text = random_text(rng, 4000)
    liking_VE = 2 * rng.normal(size=(30, 8))
    noisy = (liking_VE[text.token_T] + rng.gumbel(size=(20, 4000, 8))).argsort(-1)[..., -2:]
    found = specialisation(noisy, text, 8)
    spread = found.beyond_token.null_RL.std(0)
    assert (found.domain.p_L == 1 / (1 + observed.FEW_PERMUTATIONS)).all()
    assert (found.domain.excess_L > 5 * spread).all() and (found.token.excess_L > found.domain.excess_L).all()
    assert (abs(found.beyond_token.excess_L) < 5 * spread).all() and found.beyond_token.p_L.mean() > 0.2
    fixed = liking_VE.argsort(-1)[:, -2:][text.token_T][None]
    assert specialisation(fixed, text, 8).beyond_token.bits_L == pytest.approx([0], abs=1e-12)


def test_routing_by_the_domain_knows_all_that_there_is():
    rng = np.random.default_rng(5)
    text = random_text(rng, 3000)
    ids = np.stack([2 * text.domain_T, 2 * text.domain_T + 1], axis=-1)[None]
    found = specialisation(ids, text, 8)
    pairs = Counter(zip(text.token_T.tolist(), text.domain_T.tolist(), strict=True))
    tokens = Counter(text.token_T.tolist())
    entropy = -sum(n * math.log2(n / tokens[v]) for (v, _), n in pairs.items()) / 3000
    assert found.ceiling == pytest.approx(entropy, abs=1e-12)
    assert found.beyond_token.bits_L == pytest.approx([entropy], abs=1e-12)
    assert found.beyond_token.p_L == 1 / (1 + observed.PERMUTATIONS)
    assert found.shares_LDE[0, 1].tolist() == [0, 0, 4, 4, 0, 0, 0, 0]
    assert found.documents_alone_L == pytest.approx([0], abs=1e-12)  # the documents of a domain do not differ


def test_names_of_experts_and_order_of_layers_do_not_matter():
    rng = np.random.default_rng(6)
    text = random_text(rng, 800)
    ids = random_experts(rng, 2, 800, 2, 8)
    ids[1, :, 0] = (ids[1, :, 1] + 1 + text.domain_T % 3) % 8
    first = specialisation(ids, text, 8)
    again = specialisation(rng.permutation(8)[ids[::-1, :, ::-1]], text, 8)
    for name in ("beyond_token", "domain", "token"):
        for one, other in zip(getattr(first, name), getattr(again, name), strict=True):
            assert one == pytest.approx(other[..., ::-1], abs=1e-12), name
    assert first.interval_2L == pytest.approx(again.interval_2L[:, ::-1], abs=1e-12)
    assert first.documents_alone_L == pytest.approx(again.documents_alone_L[::-1], abs=1e-12)


def clustered(rng, effect_DVE, document_effect, documents, length):
    """Documents with a liking of their own for some experts; effect_DVE: what a domain likes beyond the token."""
    domains, vocab, experts = effect_DVE.shape
    domain_T = np.repeat(np.arange(domains), documents * length)
    document_T = np.repeat(np.arange(domains * documents), length)
    token_T = np.minimum(rng.geometric(0.1, len(domain_T)), vocab) - 1
    liking_TE = (
        effect_DVE[domain_T, token_T] + document_effect * rng.normal(size=(domains * documents, experts))[document_T]
    )
    ids_TK = (liking_TE + rng.gumbel(size=liking_TE.shape)).argsort(-1)[:, -2:]
    return ids_TK[None], Text(token_T, domain_T, document_T)


@pytest.mark.parametrize("domain_effect", [0.0, 1.0])
def test_interval_and_documents_alone_are_those_of_fresh_documents(domain_effect: float):
    rng = np.random.default_rng(7)
    effect_DVE = domain_effect * rng.normal(size=(3, 20, 6)) + rng.normal(size=(20, 6))
    large, text = clustered(rng, effect_DVE, 1.0, 1000, 100)
    truth = information(large, 6, text.domain_T, text.token_T, 2, rng).excess_L[0]
    found = [specialisation(*clustered(rng, effect_DVE, 1.0, 10, 200), 6, seed=seed) for seed in range(40)]
    excess, alone = np.array([(f.beyond_token.excess_L[0], f.documents_alone_L[0]) for f in found]).T
    low, high = np.array([f.interval_2L[:, 0] for f in found]).T
    assert (low < excess).all() and (excess < high).all()
    # 40 draws know their standard deviation to 11 %. Where domains do not differ the interval is too wide, 1.4 times; tokens
    # drawn apart from their documents would make it half as wide.
    assert 0.75 < (high - low).mean() / (2 * 1.96 * excess.std(ddof=1)) < 1.6
    assert abs((excess - alone).mean() - truth) < 4 * (excess - alone).std() / math.sqrt(40)
    assert excess.mean() - truth > 4 * excess.std() / math.sqrt(40)  # alone, the excess counts documents as domains
    assert ((low - alone < truth) & (truth < high - alone)).mean() >= 0.8


def test_halves_split_the_documents_of_every_domain():
    text = random_text(np.random.default_rng(8), 300)
    half_G = split(text, np.random.default_rng(9))
    for domain in range(4):
        documents = np.unique(text.document_T[text.domain_T == domain])
        assert half_G[documents].sum() == len(documents) // 2
    assert (half_G != split(text, np.random.default_rng(10))).any()


def test_facts_name_layers_and_count_documents():
    text = Text(np.array([1, 1, 2, 2, 1, 2]), np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 2, 3, 3, 3]))
    found = specialisation(np.array([0, 1, 0, 1, 1, 0])[None, :, None], text, 2)
    said = facts(found, [5], text, ["wiki", "law"])
    assert said["documents"] == {"wiki": 2, "law": 1} and said["tokens"] == 6 and list(said["layers"]) == ["layer_05"]
    layer = said["layers"]["layer_05"]
    assert layer["excess"] + layer["null_mean"] == pytest.approx(
        naive(np.array([[0], [1], [0], [1], [1], [0]]), text.domain_T, text.token_T)
    )
    assert layer["low"] <= layer["excess"] <= layer["high"] and layer["null_low"] <= 0 <= layer["null_high"]
