"""`alf-moe compare`: several balancing methods on paired seeds, one resumable matrix of training runs, one table.

alf-moe compare run --config configs/tiny.toml --methods none,aux-global,sign,quantile,coordinate --seeds 3 -o runs/compare
alf-moe compare status runs/compare
alf-moe compare report runs/compare --reference none

A method is a file of the folder `methods` beside the first --config file, or a TOML file. --sweep METHOD:SETTING=V1,V2 runs a
method once for each value. Other `--section.setting value` are overrides of every run.

report prints the table and writes into the folder: table.md, results.json (with every run's curves), pareto.png (late excess MaxVio
against the difference in loss) and, where a rule ran with several rates, rates.png (excess MaxVio against rate x steps).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import ConfigError, load, resolve

PLAN = "compare.json"
INTERRUPTED = 75


class Arm(NamedTuple):
    """A method with its settings: a name that is a folder name, its file, its own overrides."""

    name: str
    file: str
    overrides: list[str]


class Unit(NamedTuple):
    """One training run."""

    arm: Arm
    seed: int
    folder: Path


class Plan(NamedTuple):
    """The matrix; compare.json of its folder."""

    files: list[str]
    overrides: list[str]
    arms: list[Arm]
    seeds: list[int]
    nproc: int | None

    def units(self, out: Path) -> list[Unit]:
        """Seed by seed, so that a comparison cut short has all methods of its seeds."""
        return [Unit(arm, seed, out / arm.name / f"seed{seed}") for seed in self.seeds for arm in self.arms]


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 a run failed, 2 refused, 75 interrupted (the same command continues)."""
    commands = {"run": run_command, "status": status_command, "report": report_command}
    if not argv or argv[0] in ("--help", "-h"):
        print(f"{__doc__}\nalf-moe compare run|status|report --help shows the options")
        return 0 if argv else 2
    if argv[0] not in commands:
        print(f"error: {argv[0]!r} is no part of alf-moe compare: choose run, status or report", file=sys.stderr)
        return 2
    try:
        return commands[argv[0]](argv[1:])
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# -- the plan ----------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the overrides of every run."""
    p = argparse.ArgumentParser(prog="alf-moe compare run", description="Train every method on every seed; resumes.")
    p.add_argument("--config", action="append", default=[], help="configuration of all runs; repeatable")
    p.add_argument("--methods", default="", help="comma-separated names or TOML files")
    p.add_argument("--sweep", action="append", default=[], help="METHOD:SETTING=V1,V2,...; repeatable")
    p.add_argument("--seeds", default="3", help="N: seeds 0 ... N-1; A-B: these, as 1-4 when seed 0 chose the settings")
    p.add_argument("--nproc", type=int, help="processes of a run")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    p.add_argument("--emit", choices=["slurm", "wandb"], help="write a SLURM array or a W&B sweep instead of running")
    p.add_argument("--unit", type=int, help="run only this one of the plan in the folder (what --emit writes)")
    p.add_argument("-o", "--out", default="runs/compare", help="folder of the comparison")
    return p.parse_known_args(argv)


def make_plan(options: argparse.Namespace, overrides: list[str]) -> Plan:
    """Every arm's configuration is checked. Raises ConfigError."""
    seeds = _parse_seeds(options.seeds)
    if options.jobs < 1:
        raise ConfigError(f"--jobs = {options.jobs} is too small: give at least 1")
    if not options.config:
        raise ConfigError("--config is missing: name the file of all runs, for example --config configs/tiny.toml")
    if not options.methods:
        raise ConfigError("--methods is missing: name the methods, for example --methods none,sign,coordinate")
    for word in overrides:
        if word.split("=")[0] in ("--run.seed", "--run.name", "--run.folder"):
            raise ConfigError(f"{word.split('=')[0]} is set by compare for every run: use --seeds and --out")
    methods = options.methods.split(",")
    sweeps = [_parse_sweep(text, methods) for text in options.sweep]
    arms = [arm for method in methods for arm in _arms(method, Path(options.config[0]).parent / "methods", sweeps)]
    names = [arm.name for arm in arms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--methods names {twice} twice: name every method once")
    plan = Plan(options.config, overrides, arms, seeds, options.nproc)
    for arm in arms:
        try:
            resolve(load([*plan.files, arm.file], [*plan.overrides, *arm.overrides]), options.nproc or 2)
        except ConfigError as error:
            raise ConfigError(f"method {arm.name}: {error}") from None
    return plan


def _parse_seeds(text: str) -> list[int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found:
        raise ConfigError(f"--seeds = {text} is not understood: give a number as 4, or the first and the last as 1-4")
    first, end = (0, int(text)) if found[2] is None else (int(found[1]), int(found[2]) + 1)
    if end <= first:
        raise ConfigError(f"--seeds = {text} is no seed: give at least 1, or the first and the last as 1-4")
    return list(range(first, end))


def _parse_sweep(text: str, methods: list[str]) -> tuple[str, str, list[str]]:
    found = re.fullmatch(r"([^:=]+):([\w.]+)=(.+)", text)
    if not found:
        raise ConfigError(
            f"--sweep {text} is not understood: write METHOD:SETTING=V1,V2, as sign:balance.rate=1e-3,1e-2"
        )
    method, setting, values = found.groups()
    if method not in methods:
        raise ConfigError(f"--sweep {text}: {method} is not among --methods {','.join(methods)}: add it")
    return method, setting, values.split(",")


def _arms(method: str, folder: Path, sweeps: list[tuple[str, str, list[str]]]) -> Iterator[Arm]:
    file = Path(method) if method.endswith(".toml") else folder / f"{method}.toml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.toml"))) or f"none in {folder}"
        raise ConfigError(f"--methods {method} is not known: choose of {known}, or name a TOML file")
    grid: list[list[tuple[str, str]]] = [[]]
    for of, setting, values in sweeps:
        if of == method:
            grid = [[*point, (setting, value)] for point in grid for value in values]
    for point in grid:
        name = "_".join([file.stem, *(f"{setting.split('.')[-1]}={value}" for setting, value in point)])
        yield Arm(name, str(file), [word for setting, value in point for word in (f"--{setting}", value)])


def write_plan(plan: Plan, out: Path) -> Plan:
    """Into the folder, with the arms and seeds that it has already. Raises ConfigError when its runs had other settings."""
    file = out / PLAN
    if file.is_file():
        old = read_plan(out)
        for name in ("files", "overrides", "nproc"):
            if getattr(old, name) != getattr(plan, name):
                raise ConfigError(
                    f"{file} was made with {name} = {getattr(old, name)}, now it is {getattr(plan, name)}: give the same, "
                    "or another --out"
                )
        new = [arm for arm in plan.arms if arm not in old.arms]
        if clash := next((arm.name for arm in new if arm.name in {a.name for a in old.arms}), None):
            raise ConfigError(f"{file} has a method {clash} with other settings: choose another --out")
        plan = plan._replace(arms=old.arms + new, seeds=sorted({*old.seeds, *plan.seeds}))
    out.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**plan._asdict(), "arms": [arm._asdict() for arm in plan.arms]}, indent=1))
    partial.replace(file)
    return plan


def read_plan(out: Path) -> Plan:
    """Raises ConfigError."""
    try:
        tree = json.loads((out / PLAN).read_text())
        seeds = list(range(tree["seeds"])) if isinstance(tree["seeds"], int) else tree["seeds"]  # a number, until 0.1
        return Plan(**{**tree, "seeds": seeds, "arms": [Arm(**arm) for arm in tree["arms"]]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out} holds no comparison ({error}): alf-moe compare run -o {out} begins one") from None


# -- running -----------------------------------------------------------------------------------------------------------


def state(unit: Unit) -> str:
    """done, interrupted, failed (with its exit code) or to do."""
    if not unit.folder.exists():
        return "to do"
    try:
        code = json.loads((unit.folder / "exit.json").read_text())["code"]
    except (OSError, ValueError, KeyError, TypeError):
        return "interrupted"
    return {0: "done", INTERRUPTED: "interrupted"}.get(code, f"failed ({code})")


def command(plan: Plan, unit: Unit) -> list[str]:
    """The `alf-moe train` of one run; an interrupted one continues."""
    words = [sys.executable, "-m", "launch.cli", "train"]
    for file in [*plan.files, unit.arm.file]:
        words += ["--config", file]
    words += [*plan.overrides, *unit.arm.overrides, "--run.seed", str(unit.seed)]
    words += ["--run.folder", str(unit.folder.parent), "--run.name", unit.folder.name]
    words += ["--nproc", str(plan.nproc)] if plan.nproc else []
    if unit.folder.exists():
        words.append("--resume" if list((unit.folder / "checkpoints").glob("step-*")) else "--clean")
    return words


class Running:
    """The processes under way, so that a signal reaches them: each saves and ends."""

    def __init__(self) -> None:
        self.stopping = False
        self.processes: set[subprocess.Popen] = set()
        self.before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True
        for process in list(self.processes):
            process.terminate()

    def train(self, words: list[str], log: Path) -> int:
        """Its exit code; everything that it prints is in `log`."""
        with log.open("a") as file:
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            self.processes.add(process)
            if self.stopping:
                process.terminate()
            code = process.wait()
        self.processes.discard(process)
        return code


def run_command(argv: list[str]) -> int:
    """alf-moe compare run."""
    options, overrides = parse(argv)
    out = Path(options.out)
    if options.unit is not None:
        plan = read_plan(out)
        units = plan.units(out)
        if not 0 <= options.unit < len(units):
            raise ConfigError(f"--unit = {options.unit} is not in the plan: it has the runs 0 to {len(units) - 1}")
        units = [units[options.unit]]
    else:
        plan = write_plan(make_plan(options, overrides), out)
        units = plan.units(out)
        if options.emit:
            return emit(options.emit, plan, out)
    return run_units(plan, units, options.jobs, options.minutes)


def run_units(plan: Plan, units: list[Unit], jobs: int, minutes: float) -> int:
    """All that are not done; one line for each."""
    deadline, codes = time.monotonic() + 60 * minutes, []

    def one(running: Running, index: int, unit: Unit) -> None:
        name = f"{index + 1}/{len(units)} {unit.arm.name}, seed {unit.seed}"
        if state(unit) == "done":
            print(f"{name}: done before", flush=True)
            return
        if running.stopping or time.monotonic() > deadline:
            codes.append(INTERRUPTED)
            return
        unit.folder.parent.mkdir(parents=True, exist_ok=True)
        log, start = unit.folder.parent / f"{unit.folder.name}.log", time.monotonic()
        code = running.train(command(plan, unit), log)
        codes.append(code)
        print(f"{name}: {state(unit)} after {time.monotonic() - start:.0f} s ({log})", flush=True)

    with Running() as running, ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, running, index, unit) for index, unit in enumerate(units)]:
            future.result()
    return next((1 for code in codes if code not in (0, INTERRUPTED)), INTERRUPTED if INTERRUPTED in codes else 0)


def emit(kind: str, plan: Plan, out: Path) -> int:
    """A SLURM array or a W&B sweep over the units."""
    last = len(plan.units(out)) - 1
    one = shlex.join(["alf-moe", "compare", "run", "-o", str(out), "--unit"])
    if kind == "slurm":
        path = out / "compare.sbatch"
        path.write_text(
            f"#!/bin/bash\n#SBATCH --job-name=compare\n#SBATCH --array=0-{last}\n#SBATCH --output={out}/slurm-%a.log\n"
            f"#SBATCH --signal=TERM@300\n#SBATCH --requeue\n{one} $SLURM_ARRAY_TASK_ID\n"
            "code=$?\nif [ $code = 75 ]; then scontrol requeue ${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi\nexit $code\n"
        )
        print(f"{path}: add partition, GPUs and time, then sbatch {path}")
    else:
        path = out / "sweep.yaml"
        units = json.dumps(list(range(last + 1)))
        words = json.dumps(["alf-moe", "compare", "run", "-o", str(out), "${args}"])  # W&B puts --unit=N there
        path.write_text(f"method: grid\nparameters:\n  unit:\n    values: {units}\ncommand: {words}\n")
        print(f"{path}: wandb sweep {path}, then wandb agent on every machine")
    return 0


# -- reading -----------------------------------------------------------------------------------------------------------


def _folder_option(command: str, argv: list[str], **more: Any) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog=f"alf-moe compare {command}")
    p.add_argument("out", help="folder of the comparison")
    for name, settings in more.items():
        p.add_argument(f"--{name}", **settings)
    return p.parse_args(argv)


def status_command(argv: list[str]) -> int:
    """alf-moe compare status: one line a method, one word a seed."""
    from launch.train import last_step

    out = Path(_folder_option("status", argv).out)
    plan = read_plan(out)
    width = max(len(arm.name) for arm in plan.arms)
    for arm in plan.arms:
        words = []
        for unit in plan.units(out):
            if unit.arm == arm:
                word = state(unit)
                words.append(f"step {last_step(unit.folder)}" if word == "interrupted" else word)
        print(f"{arm.name:<{width}}  {'  '.join(words)}")
    return 0


def report_command(argv: list[str]) -> int:
    """alf-moe compare report. Exit code 2, and no picture, when the runs may not be compared."""
    from moe.observe import paired

    reference = {"help": "method that the others are compared with; default: the first"}
    margin = {"type": float, "default": 0.01, "help": "nats that matter: equivalence, seeds needed"}
    options = _folder_option("report", argv, reference=reference, margin=margin)
    out = Path(options.out)
    plan = read_plan(out)
    reference_name = options.reference or plan.arms[0].name
    if reference_name not in (names := [arm.name for arm in plan.arms]):
        raise ConfigError(f"--reference {reference_name} is not in the comparison: choose of {', '.join(names)}")
    if options.margin <= 0:
        raise ConfigError(
            f"--margin = {options.margin} is too small: give the difference in nats that matters, as 0.01"
        )
    results, missing = [], []
    for unit in plan.units(out):
        try:
            results.append(paired.read_result(unit.folder, unit.arm.name, unit.seed))
        except ValueError as error:
            missing.append(str(error) if state(unit) == "done" else f"{unit.arm.name}, seed {unit.seed}: {state(unit)}")
    if not results:
        raise ConfigError(f"{out} has no finished run yet: alf-moe compare run -o {out}")
    refused = paired.differences_that_forbid(results)
    table = paired.rows(results, reference_name, options.margin)
    text = paired.markdown(table, reference_name, options.margin, refused)
    text += "".join(f"\n\nMissing: {sentence}" for sentence in missing)
    (out / "table.md").write_text(text + "\n")
    record = {"reference": reference_name, "margin": options.margin, "not_comparable": refused, "missing": missing}
    record |= {
        "rows": [_plain(row) for row in table],
        "runs": [{k: v for k, v in result._asdict().items() if k != "run"} for result in results],
    }
    (out / "results.json").write_text(_lists_in_a_line(json.dumps(record, indent=1)))
    red, plain = ("\033[1;31m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(re.sub(r"\*\*(NOT COMPARABLE.*?)\*\*", rf"{red}\1{plain}", text))
    if not refused:
        paired.plot(table, reference_name, out / "pareto.png", {arm.name: Path(arm.file).stem for arm in plan.arms})
        paired.plot_rates(results, out / "rates.png")
    return 2 if refused else 0


def _lists_in_a_line(text: str) -> str:
    number = r"(?:null|NaN|[-+.\deE]+)"
    return re.sub(rf"\[\s+{number}(?:,\s+{number})*\s+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)


def _plain(row: Any) -> dict[str, Any]:
    return {**row._asdict(), "delta": row.delta._asdict() if row.delta else None}
