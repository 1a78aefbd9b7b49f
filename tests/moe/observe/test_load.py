"""Load metrics by hand, at the edges, over a run, and against docs/metrics.md. Each test named pNN excludes pitfall NN."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.balance.dual import sampling_floor
from moe.observe import load
from moe.observe.load import LoadTracker

METRICS_MD = Path(__file__).parents[3] / "docs" / "metrics.md"


def counts(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def zeros_LE(layers, experts):
    return torch.zeros(layers, experts)


def stepped(tracker, rows, before=None, after=None):
    """One update whose tokens follow from the counts."""
    bias = zeros_LE(*rows.shape)
    tokens_L = rows.sum(-1) // tracker.top_k
    tracker.update(rows, tokens_L, bias if before is None else before, bias if after is None else after)


def test_metrics_by_hand():
    one = counts([8, 4, 4, 0], [4, 4, 4, 4])
    assert load.maxvio(one).tolist() == [1.0, 0.0]
    assert load.minvio(one).tolist() == [-1.0, 0.0]
    assert load.avgvio(one).tolist() == [0.5, 0.0]
    assert load.cv(one).tolist() == pytest.approx([0.5**0.5, 0.0])
    assert load.idle(one).tolist() == [1, 0]
    entropy = 0.5 * np.log(2) + 2 * 0.25 * np.log(4)
    assert load.effective_experts(one).tolist() == pytest.approx([np.exp(entropy) / 4, 1.0])
    assert load.straggler(one, 2).tolist() == [1.5, 1.0]  # contiguous: (8 + 4) / 8
    assert load.straggler(one, 1).tolist() == [1.0, 1.0]
    assert load.straggler(one, 4).tolist() == [2.0, 1.0]


def test_p17_counts_beyond_float32_are_exact():
    big = counts([2**24 + 1, 2**24 - 1])
    assert load.maxvio(big).item() == 2.0**-24


@pytest.mark.parametrize("rows", [counts([5, 5, 5, 5]), counts([0, 0, 0, 0])], ids=["balanced", "no tokens"])
def test_p35_nothing_to_report_is_zero_and_finite(rows):
    for metric in (load.maxvio, load.minvio, load.avgvio, load.cv):
        assert metric(rows).tolist() == [0.0]
    for value in (load.effective_experts(rows), load.straggler(rows, 2)):
        assert value.isfinite().all()
    tracker = LoadTracker([0], 4, 2, ep=2)
    stepped(tracker, rows)
    values = tracker.metrics(1, zeros_LE(1, 4)) | tracker.val_metrics(rows)
    assert all(np.isfinite(v) for v in values.values()), values


def test_no_token_is_no_idle_expert_and_leaves_the_streaks():
    tracker = LoadTracker([0], 4, 2, ep=1)
    stepped(tracker, counts([8, 0, 4, 4]))
    stepped(tracker, counts([0, 0, 0, 0]))
    metrics = tracker.metrics(2, zeros_LE(1, 4))
    assert metrics["moe/idle_batch/max"] == 0
    assert metrics["moe/idle_streak/max"] == 1
    assert load.late_idle(LoadTracker([0], 4, 2, ep=1).history()) == 0


def test_padding_does_not_cost_a_new_floor_every_step():
    sampling_floor.cache_clear()
    tracker = LoadTracker([0], 64, 2, ep=1)
    for tokens in range(3200, 3232):
        rows = torch.full((1, 64), tokens * 2 // 64, dtype=torch.int64)
        rows[0, 0] += tokens * 2 - rows.sum()
        stepped(tracker, rows)
        tracker.metrics(tokens, zeros_LE(1, 64))
    assert sampling_floor.cache_info().misses <= 3


def test_history_is_bounded_and_loses_no_count():
    tracker = LoadTracker([0], 2, 1, ep=1)
    tracker.MAX_ROWS = 8
    for step in range(1, 101):
        stepped(tracker, counts([step, 1]))
        tracker.metrics(step, zeros_LE(1, 2))
    history = tracker.history()
    assert len(history.steps) <= 8
    assert history.steps[-1] == 100
    assert history.counts.sum(0).tolist() == [[5050, 100]]
    ends = history.steps.tolist()
    firsts = [0, *ends[:-1]]
    assert history.counts[:, 0, 0].tolist() == [sum(range(a + 1, b + 1)) for a, b in zip(firsts, ends, strict=True)]


def test_history_keeps_the_bias_of_the_last_step_of_a_row():
    tracker = LoadTracker([0], 2, 1, ep=1)
    tracker.MAX_ROWS = 8
    bias = torch.zeros(1, 2)
    for step in range(1, 101):
        stepped(tracker, counts([1, 1]))
        bias.copy_(torch.tensor([[step, -step]]))  # the balancer's own tensor: the history must not follow it
        tracker.metrics(step, bias)
    history = tracker.history()
    assert history.bias.dtype == np.float32
    assert history.bias[:, 0, 0].tolist() == history.steps.tolist()
    assert history.bias.shape == history.counts.shape


def test_names_of_a_hundred_layers_sort_by_layer():
    tracker = LoadTracker(range(120), 2, 1, ep=1)
    stepped(tracker, torch.ones(120, 2, dtype=torch.int64))
    names = [k for k in tracker.metrics(1, zeros_LE(120, 2)) if "/layer_" in k]
    assert sorted(names) == names


def test_p39_load_planted_in_layer_10_appears_under_layer_10():
    layers = list(range(1, 13))
    rows = torch.full((12, 4), 4, dtype=torch.int64)
    rows[layers.index(10)] = torch.tensor([16, 0, 0, 0])
    tracker = LoadTracker(layers, 4, 2, ep=1)
    stepped(tracker, rows)
    metrics = tracker.metrics(1, zeros_LE(12, 4))
    per_layer = {k: v for k, v in metrics.items() if "/layer_" in k}
    assert {k for k, v in per_layer.items() if v} == {"moe/maxvio_batch/layer_10"}
    assert sorted(per_layer) == list(per_layer) == [f"moe/maxvio_batch/layer_{n:02d}" for n in layers]
    assert metrics["moe/maxvio_batch/max"] == 3.0
    assert metrics["moe/maxvio_batch/mean"] == pytest.approx(3 / 12)
    assert metrics["moe/maxvio_batch/median"] == 0 and metrics["moe/maxvio_batch/p95"] == pytest.approx(0.45 * 3)


def test_p30_number_of_keys_does_not_grow_with_experts():
    def keys(layers, experts):
        tracker = LoadTracker(range(layers), experts, 2, ep=1)
        stepped(tracker, torch.ones(layers, experts, dtype=torch.int64) * 2)
        return set(tracker.metrics(1, zeros_LE(layers, experts)))

    assert keys(3, 64) == keys(3, 1024)
    assert len(keys(27, 64)) - len(keys(3, 64)) == 24  # one more a layer
    assert len(keys(27, 64)) <= 60 + 4 * 27


def test_excess_is_over_the_floor_of_the_real_tokens():
    rows = counts([300, 100, 100, 100])  # 300 tokens, top-2: L = 150
    tracker = LoadTracker([0], 4, 2, ep=1)
    stepped(tracker, rows)
    metrics = tracker.metrics(1, zeros_LE(1, 4))
    assert metrics["moe/excess_maxvio_batch/max"] == pytest.approx(1.0 - sampling_floor(300, 4, 2))
    assert tracker.val_metrics(rows)["moe/excess_maxvio_val/max"] == metrics["moe/excess_maxvio_batch/max"]


def test_batch_is_the_last_batch_and_seen_is_all_of_them():
    tracker = LoadTracker([0], 2, 1, ep=1)
    for rows in (counts([8, 0]), counts([0, 8]), counts([2, 6])):
        stepped(tracker, rows)
    metrics = tracker.metrics(3, zeros_LE(1, 2))
    assert metrics["moe/maxvio_batch/max"] == 0.5
    assert metrics["moe/maxvio_seen/max"] == pytest.approx(14 / 12 - 1)
    assert metrics["moe/idle_seen/max"] == 0


def test_p04_validation_changes_nothing():
    tracker = LoadTracker([0], 2, 1, ep=1)
    stepped(tracker, counts([3, 5]))
    before = {k: v.clone() for k, v in tracker.state_dict().items()}
    tracker.val_metrics(counts([8, 0]))
    assert all(torch.equal(before[k], v) for k, v in tracker.state_dict().items())


def test_idle_streak_and_death():
    tracker = LoadTracker([4], 4, 1, ep=1)
    starved, revived = counts([500, 500, 4, 0]), counts([250, 250, 250, 250])  # 4 and 0 against 0.01 * 251
    starved[0, 2] = 2
    for _ in range(99):
        stepped(tracker, starved)
    metrics = tracker.metrics(99, zeros_LE(1, 4))
    assert (metrics["moe/idle_streak/max"], metrics["moe/dead/max"]) == (99, 0)
    stepped(tracker, starved)
    metrics = tracker.metrics(100, zeros_LE(1, 4))
    assert (metrics["moe/idle_streak/max"], metrics["moe/dead/max"]) == (100, 2)
    stepped(tracker, revived)
    metrics = tracker.metrics(101, zeros_LE(1, 4))
    assert (metrics["moe/idle_streak/max"], metrics["moe/dead/max"]) == (0, 0)


def test_bias_range_drift_and_flip_rate():
    tracker = LoadTracker([0], 4, 1, ep=1)
    rows = counts([1, 1, 1, 1])
    at = torch.zeros(1, 4)
    for move in ([1.0, -1.0, 1.0, 0.0], [-1.0, -1.0, 1.0, 1.0]):  # one of four turns; 0 to 1 is no turn
        after = at + torch.tensor([move])
        stepped(tracker, rows, at, after)
        at = after
    metrics = tracker.metrics(2, torch.tensor([[0.5, -0.25, 0.25, 0.0]]))
    assert metrics["moe/flip_rate/max"] == 0.25
    assert metrics["moe/bias_range/max"] == 0.75
    assert metrics["moe/bias_drift/max"] == 0.125


def test_straggler_is_simulated_where_the_ranks_divide_the_experts():
    tracker = LoadTracker([0], 8, 1, ep=2)
    stepped(tracker, counts([8, 0, 0, 0, 0, 0, 0, 0]))
    straggling = {k: v for k, v in tracker.metrics(1, zeros_LE(1, 8)).items() if "straggler" in k and k.endswith("max")}
    assert sorted(straggling.values()) == [2, 2, 4, 8]  # ep = 2; simulated 2, 4, 8; 16 and 64 do not divide 8


def test_restored_tracker_continues_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 9, (2, 4), generator=generator) * 2 for _ in range(6)]
    biases = [torch.randn(2, 4, generator=generator) for _ in range(7)]

    def run(tracker, first, last):
        for n in range(first, last):
            stepped(tracker, batches[n], biases[n], biases[n + 1])

    whole, part, restored = (LoadTracker([1, 2], 4, 2, ep=2) for _ in range(3))
    run(whole, 0, 6)
    run(part, 0, 3)
    assert all(isinstance(v, torch.Tensor) for v in part.state_dict().values())
    restored.load_state_dict({k: v.clone() for k, v in part.state_dict().items()})
    run(restored, 3, 6)
    assert restored.metrics(6, biases[6]) == whole.metrics(6, biases[6])
    assert np.array_equal(restored.history().counts, whole.history().counts)


def test_history_holds_every_count_and_survives_the_file(tmp_path):
    tracker = LoadTracker([3, 11], 4, 1, ep=1)
    for step in range(1, 7):
        stepped(tracker, torch.full((2, 4), step, dtype=torch.int64))
        if step % 2 == 0:
            tracker.metrics(step, torch.full((2, 4), step / 8))
    path = tmp_path / "loads.npz"
    tracker.write_npz(path)
    assert [p.name for p in tmp_path.iterdir()] == ["loads.npz"]
    tracker.write_latest(tmp_path / "loads-latest.npz")
    with np.load(tmp_path / "loads-latest.npz") as latest, np.load(path) as file:
        assert all(np.array_equal(latest[name], file[name][-1:]) for name in ("steps", "counts", "bias"))
        assert latest["layers"].tolist() == [3, 11]
    assert not list(tmp_path.glob("*tmp*"))
    with np.load(path) as file:
        assert file["steps"].tolist() == [2, 4, 6]
        assert file["layers"].tolist() == [3, 11]
        assert file["counts"].dtype == np.int64
        assert file["counts"][:, 1, 2].tolist() == [1 + 2, 3 + 4, 5 + 6]
        assert file["bias"][:, 1, 2].tolist() == [0.25, 0.5, 0.75]
    resumed = LoadTracker([3, 11], 4, 1, ep=1)
    resumed.load_state_dict(tracker.state_dict())
    resumed.read_npz(path, 4)
    assert resumed.history().steps.tolist() == [2, 4]
    assert resumed.history().bias[:, 0, 0].tolist() == [0.25, 0.5]


def test_a_run_of_an_older_version_resumes_with_an_unknown_bias(tmp_path):
    np.savez(tmp_path / "loads.npz", steps=[2], counts=np.ones((1, 1, 4), np.int64), layers=[0])
    tracker = LoadTracker([0], 4, 1, ep=1)
    tracker.read_npz(tmp_path / "loads.npz", 2)
    stepped(tracker, counts([1, 1, 1, 1]))
    tracker.metrics(3, zeros_LE(1, 4))
    assert np.isnan(tracker.history().bias[0]).all()
    assert tracker.history().bias[1].tolist() == [[0.0] * 4]


def test_late_window_is_the_last_fifth_and_sums_before_the_ratio():
    tracker = LoadTracker([0], 2, 1, ep=1)
    for step in range(1, 11):
        stepped(tracker, counts([10, 0]) if step <= 8 else counts([6, 4]) if step == 9 else counts([4, 6]))
        tracker.metrics(step, zeros_LE(1, 2))
    assert load.late_maxvio(tracker.history(), share=0.2) == [0.0]  # 10 and 10; each batch alone has 0.2
    assert load.late_maxvio(tracker.history(), share=1.0) == [pytest.approx(0.8)]
    assert load.late_idle(tracker.history(), share=0.2) == 0


def test_a_row_that_begins_before_the_late_window_does_not_count():
    tracker = LoadTracker([0], 2, 1, ep=1)
    for step in range(1, 11):
        stepped(tracker, counts([10, 0]) if step <= 8 else counts([5, 5]))
        if step in (3, 8, 10) or step == 6:
            tracker.metrics(step, zeros_LE(1, 2))
    # rows end at 3, 6, 8, 10: the last 30 % are steps 8 to 10, and step 8 shares its row with step 7
    assert load.late_maxvio(tracker.history(), share=0.3) == [0.0]
    assert load.late_maxvio(tracker.history(), share=0.1) == [0.0]  # less than a row: the last one


def test_model_without_experts_reports_nothing():
    tracker = LoadTracker([], 4, 2, ep=1)
    assert tracker.metrics(1, torch.zeros(0, 4)) == {}
    assert load.late_maxvio(tracker.history(), 0.2) == []


def test_dropped_pairs_and_repeated_steps_are_counted_since_the_last_line():
    tracker = LoadTracker([1], 4, 2, ep=1)
    for pairs in (3, 0, 4):
        tracker.count_dropped(pairs)
    stepped(tracker, torch.full((1, 4), 6, dtype=torch.int64))
    found = tracker.metrics(1, zeros_LE(1, 4))
    assert (found["moe/dropped_pairs"], found["moe/repeated_steps"]) == (7, 2)
    assert tracker.metrics(2, zeros_LE(1, 4))["moe/dropped_pairs"] == 0


# -- docs/metrics.md -------------------------------------------------------------------------------------------------


def documented_patterns():
    """Keys of the table: `{a,b}` is a choice, NN a layer, <D> a number of ranks."""
    found = re.findall(r"^\| `([^`]+)`", METRICS_MD.read_text(), flags=re.M)
    assert len(found) == len(set(found)), "a key is documented twice"
    patterns = {}
    for key in found:
        regex = re.sub(r"\{([^}]*)\}", lambda choice: f"(?:{choice[1].replace(',', '|')})", key)
        patterns[key] = re.compile(regex.replace("NN", r"\d{2,}").replace("<D>", r"\d+"))
    return patterns


def test_every_emitted_key_is_documented_once_and_every_documented_one_is_emitted():
    tracker = LoadTracker([1, 2], 64, 6, ep=2)
    rows = torch.full((2, 64), 6, dtype=torch.int64)
    stepped(tracker, rows)
    emitted = set(tracker.metrics(1, zeros_LE(2, 64))) | set(tracker.val_metrics(rows))
    patterns = documented_patterns()
    for key in emitted:
        matches = [name for name, pattern in patterns.items() if pattern.fullmatch(key)]
        assert len(matches) == 1, f"{key} is documented by {matches or 'no row'}"
    for name, pattern in patterns.items():
        if name.startswith("moe/") and "topk_margin" not in name:  # measured with the regret
            assert any(pattern.fullmatch(key) for key in emitted), f"{name} is documented and never emitted"
