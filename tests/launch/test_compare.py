"""The comparison's matrix: arms, resuming, refusals. The runs themselves are stand-ins."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from launch import compare
from tests.moe.observe.test_paired import write_run

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
BASE = ["--config", TINY, "--methods", "none,sign"]


def plan_of(tmp_path):
    return compare.read_plan(tmp_path / "c")


def emit(tmp_path, *words):
    """Make the plan, run nothing."""
    return compare.main(["run", *words, "-o", str(tmp_path / "c"), "--emit", "slurm"])


def test_sweeps_multiply_and_units_go_seed_by_seed(tmp_path):
    words = ["--sweep", "sign:balance.rate=1e-3,1e-2", "--sweep", "sign:balance.warmup_steps=0,5", "--seeds", "2"]
    assert emit(tmp_path, *BASE, *words, "--train.steps", "40") == 0
    plan = plan_of(tmp_path)
    assert [arm.name for arm in plan.arms] == [
        "none",
        "sign_rate=1e-3_warmup_steps=0",
        "sign_rate=1e-3_warmup_steps=5",
        "sign_rate=1e-2_warmup_steps=0",
        "sign_rate=1e-2_warmup_steps=5",
    ]
    units = plan.units(tmp_path / "c")
    assert [u.seed for u in units] == [0] * 5 + [1] * 5
    words = compare.command(plan, units[-1])
    assert "--resume" not in words and "--clean" not in words
    config = compare.load(
        [w for flag, w in itertools.pairwise(words) if flag == "--config"],
        words[words.index("--train.steps") :],
    )
    assert (config.balance.rate, config.balance.warmup_steps, config.run.seed) == (1e-2, 5, 1)
    assert (config.run.name, config.run.folder) == ("seed1", str(tmp_path / "c" / units[-1].arm.name))
    script = (tmp_path / "c" / "compare.sbatch").read_text()
    assert "--array=0-9" in script and "--unit $SLURM_ARRAY_TASK_ID" in script


def test_a_plan_grows_but_keeps_its_settings(tmp_path, capsys):
    assert emit(tmp_path, *BASE, "--seeds", "2") == 0
    assert emit(tmp_path, "--config", TINY, "--methods", "coordinate", "--seeds", "1") == 0
    plan = plan_of(tmp_path)
    assert ([arm.name for arm in plan.arms], plan.seeds) == (["none", "sign", "coordinate"], [0, 1])
    assert emit(tmp_path, *BASE, "--seeds", "3-4") == 0
    plan = plan_of(tmp_path)
    assert plan.seeds == [0, 1, 3, 4] and len({unit.folder for unit in plan.units(tmp_path)}) == 12
    assert emit(tmp_path, *BASE, "--train.steps", "70") == 2
    assert "overrides" in capsys.readouterr().err
    assert plan_of(tmp_path) == plan


def test_runs_resume_and_finished_ones_are_left_alone(tmp_path, monkeypatch, capsys):
    started = []
    code = "import json, pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True, exist_ok=True); "
    code += "(p / 'exit.json').write_text(json.dumps({'code': int(sys.argv[2])})); sys.exit(int(sys.argv[2]))"

    def stand_in(plan, unit):
        started.append((unit.arm.name, unit.seed))
        ends = "4" if (unit.arm.name, unit.seed) == ("sign", 1) else "0"
        return [sys.executable, "-c", code, str(unit.folder), ends]

    monkeypatch.setattr(compare, "command", stand_in)
    out = str(tmp_path / "c")
    assert compare.main(["run", *BASE, "--seeds", "2", "-o", out, "--minutes", "0"]) == 75
    assert started == []
    assert compare.main(["run", *BASE, "--seeds", "2", "-o", out]) == 1
    assert started == [("none", 0), ("sign", 0), ("none", 1), ("sign", 1)]
    assert compare.main(["run", "-o", out, "--unit", "3"]) == 1
    assert compare.main(["run", "-o", out, "--unit", "0"]) == 0
    assert started[4:] == [("sign", 1)]
    capsys.readouterr()
    assert compare.main(["status", out]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "sign  done  failed (4)"


def test_interrupted_runs_continue_from_their_checkpoint(tmp_path):
    assert emit(tmp_path, *BASE) == 0
    plan = plan_of(tmp_path)
    unit = plan.units(tmp_path / "c")[0]
    unit.folder.mkdir(parents=True)
    assert compare.state(unit) == "interrupted" and compare.command(plan, unit)[-1] == "--clean"
    (unit.folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert compare.command(plan, unit)[-1] == "--resume"


def test_report_and_its_refusal(tmp_path, capsys):
    assert emit(tmp_path, *BASE, "--seeds", "2") == 0
    out = tmp_path / "c"
    for unit in plan_of(tmp_path).units(out):
        if (unit.arm.name, unit.seed) != ("sign", 1):
            write_run(unit.folder, ce=5.0 + 0.01 * (unit.arm.name == "sign"))
    assert compare.main(["report", str(out)]) == 0
    assert "+0.0100" in (text := capsys.readouterr().out) and "Missing: sign, seed 1: to do" in text
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == 3 and (out / "pareto.png").is_file() and not (out / "rates.png").exists()
    assert results["runs"][0]["curves"]["excess"][4:6] == [1.0, 50.0]
    assert len((out / "results.json").read_text().splitlines()) < 200  # a list is one line
    write_run(plan_of(tmp_path).units(out)[3].folder, init_hash="other")
    assert compare.main(["report", str(out)]) == 2
    assert "NOT COMPARABLE: the initial weights differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--config", TINY], "--methods is missing"),
        (["run", "--methods", "none"], "--config is missing"),
        (["run", "--config", TINY, "--methods", "nono"], "--methods nono is not known: choose of"),
        (["run", "--config", TINY, "--methods", "none,none"], "twice"),
        (["run", *BASE, "--seeds", "0"], "--seeds = 0 is no seed: give at least 1"),
        (["run", *BASE, "--seeds", "4-1"], "--seeds = 4-1 is no seed"),
        (["run", *BASE, "--seeds", "a"], "--seeds = a is not understood: give a number as 4"),
        (["run", *BASE, "--jobs", "0"], "--jobs = 0 is too small"),
        (["run", *BASE, "--sweep", "sign"], "is not understood"),
        (["run", *BASE, "--sweep", "rms:balance.rate=1"], "rms is not among --methods"),
        (["run", *BASE, "--sweep", "sign:balance.rate=-1"], "method sign_rate=-1: balance.rate = -1 is out of range"),
        (["run", *BASE, "--train.stepps", "3"], "did you mean train.steps?"),
        (["run", *BASE, "--run.seed", "3"], "--run.seed is set by compare"),
        (["run", "--unit", "3", "-o", "nowhere"], "holds no comparison"),
        (["status", "nowhere"], "holds no comparison"),
        (["report", "nowhere"], "holds no comparison"),
        (["repport"], "choose run, status or report"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert list(tmp_path.iterdir()) == []
