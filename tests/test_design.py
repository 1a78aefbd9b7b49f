"""The experiment of scripts/design_default.py: its table, its loop against the laboratory's, resuming, the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.balance.bias import Gain
from moe.balance.quantile import Coordinate
from moe.balance.streams import KINDS, stream
from moe.config import BalanceSection
from moe.observe import laboratory
from scripts import design_default as design
from scripts.design_default import CELLS, DEFAULT, NOTHING, Cell

SMALL = Cell(16, 2, 256, "softmax", "skewed")


@pytest.fixture
def one_thread(monkeypatch):
    """A run sets the threads of its process and of those it starts; both are set back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_design_covers_every_pair_of_levels():
    levels = [(16, 64, 256, 512), (1, 2, 6, 8), (2048, 16384), ("sigmoid", "softmax"), (*KINDS[1:], "recorded")]
    assert len(CELLS) == len(set(CELLS)) == 36
    for a, b in itertools.combinations(range(5), 2):
        assert {(cell[a], cell[b]) for cell in CELLS} >= set(itertools.product(levels[a], levels[b]))
    for kind in levels[-1]:
        mine = [cell for cell in CELLS if cell.stream == kind]
        assert sorted(c.experts for c in mine) == list(levels[0]) and sorted(c.top_k for c in mine) == list(levels[1])
    large = [cell for cell in CELLS if cell.tokens == 131072]
    assert sorted(cell.experts for cell in large) == [16, 64, 64, 256]
    assert len(design.HELD_OUT) == 18 and not set(design.HELD_OUT) & set(CELLS)
    assert {c.score for c in large} == {"sigmoid", "softmax"} and len({c.stream for c in large} - {"recorded"}) == 4


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_loop_is_the_laboratory_s(score: str, monkeypatch):
    monkeypatch.setattr(design, "BLOCK", 100 * 16)  # blocks of unequal size
    cell = SMALL._replace(score=score)
    # Scores rounded to halves of a per cent: ties at the boundary in most batches.
    batches = [(200 * s).round() / 200 for s in stream("skewed", 256, 16, score, 12, 0)]
    rules = design.contestants(cell)
    plain = {name: rule for name, rule in rules.items() if name not in design.ABLATIONS}
    sections = [rule.section for rule in plain.values()]
    traces, _ = laboratory.simulate(batches, sections, 2, keep=False)
    found = design.simulate(batches, plain, 2)
    assert list(found.values()) == [trace.maxvio for trace in traces]
    assert found[DEFAULT] != found[NOTHING]


def test_ablations_differ_from_the_rule_only_in_their_one_part():
    class Same(design.OtherGain):
        gain = Gain

    section = BalanceSection(method="coordinate", rate="auto")
    batches = [*stream("jump", 512, 16, "sigmoid", 60, 1), *stream("topics", 512, 16, "sigmoid", 40, 1)]
    rules = {DEFAULT: Coordinate(section, [0], 16, 2), "same": Same(section, [0], 16, 2)}
    rules |= {
        name: kind(section, [0], 16, 2) for name, kind in (("reset", design.NoReset), ("eager", design.EagerReset))
    }
    found = design.simulate(batches, rules, 2)
    assert found["same"] == found[DEFAULT]
    assert found["reset"][:30] == found[DEFAULT][:30] and found["reset"] != found[DEFAULT]
    assert found["eager"][:30] == found[DEFAULT][:30] and found["eager"][60:] != found[DEFAULT][60:]


def test_a_second_run_does_nothing_and_a_missing_recording_is_one_line(tmp_path: Path, monkeypatch, capsys, one_thread):
    recorded = Cell(16, 2, 128, "softmax", "recorded")
    monkeypatch.setattr(design, "CELLS", [SMALL, recorded])
    monkeypatch.setattr(design, "STEPS", 8)
    design.main(["run", "--out", str(tmp_path), "--minutes", "0"])
    assert not list(tmp_path.glob("*.json"))
    design.main(["run", "--out", str(tmp_path)])
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 3 and "cell 1 skipped: there is no" in capsys.readouterr().out
    unit = json.loads(design.unit_path(tmp_path, SMALL, 2).read_text())
    assert unit["versions"]["torch"] == torch.__version__ and len(unit["maxvio"][DEFAULT]) == 8
    design.main(["run", "--out", str(tmp_path)])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert "0 units to run" in capsys.readouterr().out

    (tmp_path / "recorded").mkdir()
    scores = np.random.default_rng(0).random((28, 128, 16), dtype=np.float32)
    np.savez(tmp_path / "recorded" / recorded.recording, scores=scores[:27], top_k=2)
    design.main(["run", "--out", str(tmp_path), "--cells", "1"])
    assert "cell 1, seed 2 skipped" in capsys.readouterr().out  # 7 of 8 batches are left from seed 2 on
    np.savez(tmp_path / "recorded" / recorded.recording, scores=scores, top_k=2)
    design.main(["run", "--out", str(tmp_path), "--cells", "1"])
    assert len(list(tmp_path.glob("recorded_*.json"))) == 3


def write(out: Path, index: int, levels: dict[str, float], finite: bool = True) -> None:
    """Units of one cell whose rules have a constant MaxVio of 1, or that of `levels`, plus 0.1 for each seed."""
    for seed in range(CELLS[index].seeds):
        names = design.contestants(CELLS[index])
        unit = {"seed": seed, "cpu_seconds": 1.0, "balance_digest": "0"}
        unit["versions"] = {"git": "g", "torch": "t", "python": "3"}
        unit["maxvio"] = {name: [levels.get(name, 1.0) + seed / 10] * design.STEPS for name in names}
        unit["finite"] = {name: finite or name != DEFAULT for name in names}
        design.unit_path(out, CELLS[index], seed).write_text(json.dumps(unit))


def test_the_report_has_the_right_ratios_and_failures(tmp_path: Path, capsys):
    jump = next(i for i, cell in enumerate(CELLS) if cell.stream == "jump" and cell.seeds == 3)
    write(tmp_path, 0, {DEFAULT: 0.9, "no reset": 1.9, "gain 0.2": 0.4})  # every mean over three seeds is 0.1 higher
    write(tmp_path, 1, {DEFAULT: 0.6, "smebu 0.002": 0.4, "cap 0.8": 0.1})  # ablations are no rivals
    write(tmp_path, 3, {})
    design.unit_path(tmp_path, CELLS[3], 2).unlink()  # not finished
    write(tmp_path, 4, {}, finite=False)
    write(tmp_path, jump, {DEFAULT: 1.7, NOTHING: 0.9})
    design.main(["report", "--out", str(tmp_path), "--summary", str(tmp_path / "summary.json")])
    text, found = capsys.readouterr().out, json.loads((tmp_path / "summary.json").read_text())

    assert list(map(int, found["cells"])) == [0, 1, 4, jump] and "**32 cells missing:** 2, 3, 5, " in text
    assert found["cells"]["0"]["figures"][DEFAULT] == {"late": 1.0, "early": 1.0, "diverged": 0}
    for figure in ("late", "early"):
        expected = {"0": 1 / 1.1, "1": 0.7 / 0.5, "4": 1, str(jump): 1.8 / 1.1}
        assert design.ratios(found, figure) == pytest.approx(expected)
    assert design.ratios(found, "after") == pytest.approx({str(jump): 1.8 / 1.1})
    assert "1.40 (0.700 / 0.500 smebu 0.002)" in text
    assert f"| late | 1.05 | 4 | 2 | 50% | 1.20 | 1.64 (cell {jump}) |" in text
    assert f"| after | 1.5 | 1 | 0 | 0% | 1.64 | 1.64 (cell {jump}) |" in text
    assert "| no reset | 1.29 | 2.00 (cell 0) |" in text  # 2.0 / 1.0, 1.1 / 0.7, 1, 1.1 / 1.8
    failures = [line.split(" (")[0] for line in text.splitlines() if line.startswith("- ")]
    assert failures == [
        "- late 1.40 > 1.05: cell 1",
        f"- late 1.64 > 1.05: cell {jump}",
        "- early 1.40 > 1.25: cell 1",
        f"- early 1.64 > 1.25: cell {jump}",
        f"- after 1.64 > 1.5: cell {jump}",
        "- diverged on 3 of 3 seeds: cell 4",
        f"- diverged on 3 of 3 seeds: cell {jump}",
    ]
