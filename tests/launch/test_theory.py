"""`alf-moe theory`: the command end to end, and that the laboratory behind it sees what it claims to see."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kernels.router_topk import topk_lowest_index
from launch.theory import main, parse_method
from moe.balance import build_balancer
from moe.balance.dual import dual_value, solve_dual
from moe.balance.streams import stream
from moe.config import BalanceSection
from moe.observe import laboratory as lab

SIGN = BalanceSection(method="sign", rate=1e-2, centre=False)  # not centred: steps can be mirrored


def run(tmp_path, capsys, *words):
    out = tmp_path / "out"
    small = ["--tokens", "96", "--experts", "6", "--top-k", "2", "--steps", "60", "--seeds", "2"]
    assert main([*small, "--out", str(out), *words]) == 0
    return out, json.loads((out / "results.json").read_text())["results"], capsys.readouterr().out


def test_tables_plots_and_records_of_every_stream_seed_and_method(tmp_path, capsys):
    methods = "sign:1e-2,proportional:inverse:2,proportional:1e-2,coordinate"
    out, results, printed = run(tmp_path, capsys, "--streams", "fixed,jump", "--methods", methods)
    assert [(r["stream"], r["seed"], r["method"]) for r in results] == [
        (kind, seed, method) for kind in ("fixed", "jump") for seed in (0, 1) for method in methods.split(",")
    ]
    assert {p.name for p in out.iterdir()} == {"results.json", "table.md", "fixed.png", "jump.png"}
    assert (out / "fixed.png").read_bytes()[:4] == b"\x89PNG"
    table = (out / "table.md").read_text()
    assert table.strip() in printed and table.count("\n") == 2 + 8
    for r in results:
        assert len(r["maxvio"]) == len(r["regret"]) == len(r["lagrangian"]) == 60
        assert ("after" in r) == (r["stream"] == "jump")
        assert (r["bound"] is None) == (r["method"] in ("sign:1e-2", "coordinate"))
        if r["stream"] == "fixed":
            assert set(r["violations"].values()) == {0}
            if r["bound"] is not None:
                assert (np.array(r["regret"]) <= np.array(r["bound"])).all()
    assert "| fixed | sign:1e-2 |" in table and "no bound covers this rule" in table


def test_own_recorded_scores_bring_their_own_sizes(tmp_path, capsys):
    scores = torch.stack(list(stream("iid", 50, 5, "sigmoid", 9, seed=3))).numpy()
    np.savez(tmp_path / "layer_01.npz", scores=scores, top_k=3, steps=np.arange(9))
    _, results, _ = run(
        tmp_path, capsys, "--streams", f"recorded={tmp_path / 'layer_01.npz'}", "--methods", "sign:1e-2", "--seeds", "1"
    )
    assert results[0]["experts"] == 5 and len(results[0]["maxvio"]) == 9
    ids = topk_lowest_index(torch.from_numpy(scores[0]), 3)
    assert results[0]["maxvio"][0] == pytest.approx(float(ids.flatten().bincount(minlength=5).max()) / 30 - 1)


def test_methods_are_written_as_name_schedule_rate():
    section = parse_method("proportional:inverse:0.2")
    assert (section.method, section.schedule, section.rate) == ("proportional", "inverse", 0.2)
    assert parse_method("coordinate").rate == "auto" and parse_method("sign").rate == 1e-3


def test_simulation_is_the_loop_of_training_written_again():
    batches = list(stream("skewed", 64, 6, "softmax", 12, seed=0))
    traces, kept = lab.simulate(batches, [SIGN, BalanceSection(method="coordinate", rate="auto")], 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, batches, strict=True))
    bias = torch.zeros(6)
    for n, scores in enumerate(batches):
        assert torch.equal(traces[0].bias[n], bias) and torch.equal(traces[1].bias[0], torch.zeros(6))
        load = topk_lowest_index(scores + bias, 2).flatten().bincount(minlength=6).double()
        target = 64 * 2 / 6
        assert traces[0].maxvio[n] == pytest.approx(float(load.max()) / target - 1)
        assert traces[0].deviation[n] == pytest.approx(float((load - target).abs().max()))
        assert traces[0].square[n] == pytest.approx(float((load - target).square().sum()))
        assert traces[0].lagrangian[n] == pytest.approx(float(dual_value(scores, bias, 2)) / 64)
        bias = (bias.double() + 1e-2 * (target - load).sign()).float()


def fixed_trace(section, steps=40, sign=1.0, kind="iid"):
    scores = next(stream(kind, 40, 4, "sigmoid", 1, seed=0))
    rule, trace = build_balancer(section, [0], 4, 1), lab.Trace()
    for _ in range(steps):
        trace.bias.append(rule.bias_LE[0].clone())
        load = topk_lowest_index(scores + rule.bias_LE[0], 1).flatten().bincount(minlength=4)
        before = rule.bias_LE.clone()
        rule.step(type("Stats", (), {"tokens": torch.tensor([40]), "tokens_per_expert": load[None]})())
        rule.state["bias"] = before + sign * (rule.bias_LE - before)
    return scores, trace


def test_properties_hold_for_the_rule_and_are_seen_to_break_for_the_wrong_sign():
    scores, trace = fixed_trace(SIGN, 300)
    assert set(lab.check_properties(scores, trace, SIGN, 1).values()) == {0}

    def broken(scores, trace, section=SIGN):
        return {name[0] for name, count in lab.check_properties(scores, trace, section, 1).items() if count}

    assert "5" in broken(*fixed_trace(SIGN, 300, sign=-1.0))
    resting = BalanceSection(method="sign", rate=1e-9, centre=False)
    half = BalanceSection(method="sign", rate=5e-3, centre=False)
    assert broken(*fixed_trace(resting, 320, kind="skewed"), half) == {"4"}  # never balanced


def test_properties_1_and_3_break_when_the_bias_is_not_what_routed():
    scores, trace = fixed_trace(SIGN, 30)
    chosen = lab._chosen
    flipped = lambda scores, bias, top_k: chosen(scores, -bias, top_k)  # noqa: E731
    lab._chosen = flipped
    try:
        found = lab.check_properties(scores, trace, SIGN, 1)
    finally:
        lab._chosen = chosen
    assert found["3: preference"] > 0


def test_summary_windows():
    trace = lab.Trace(maxvio=[5.0] * 40 + [1.0] * 40 + [3.0] * 40 + [2.0] * 40)
    found = lab.summary(trace, floor=0.5, jump_at=80)
    assert found == {"early": 5.0, "late": 2.0, "after": 3.0, "late_excess": 1.5}


def test_static_regret_is_against_the_best_fixed_bias():
    batches = list(stream("iid", 64, 4, "sigmoid", 8, seed=0))
    (trace,), kept = lab.simulate(batches, [SIGN], 2)
    best = lab.hindsight_bias(kept, 2)
    torch.testing.assert_close(best, solve_dual(torch.cat(batches), 2).bias)
    found = lab.static_regret(kept, trace, SIGN, 2, best)
    own = sum(float(dual_value(s, b, 2)) for s, b in zip(batches, trace.bias, strict=True)) / 64
    assert found.cumulative[-1] == pytest.approx(own - float(solve_dual(torch.cat(batches), 2).value) / 64, abs=1e-5)
    assert found.bound is None and found.cumulative[-1] > 0
