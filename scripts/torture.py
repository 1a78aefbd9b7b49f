"""Kill a small training run many times, and show that it ends with the weights of a run that nobody touched.

    python scripts/torture.py --kills 50 --seed 0

Each time SIGKILL hits a worker at random, or torchrun itself: at any time (also while the processes start), in training, or
while a checkpoint is being written. The run continues from its newest checkpoint: torchrun restarts killed workers, and
`alf-moe train --resume` a killed torchrun. Prints a table; exit code 0 when nothing but steps since the last checkpoint was
done again and the final state is the undisturbed one's bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a file: tests are not installed

from moe.train import manifest  # noqa: E402
from moe.train.contents import read_tensors, same_bits, verify_all  # noqa: E402
from tests.corpus import make_token_folder  # noqa: E402

SETTINGS = """
--model.dim 32 --model.num_layers 3 --model.first_k_dense 1 --model.num_heads 4 --model.num_kv_heads 2 --model.head_dim 8
--model.num_experts 8 --model.top_k 2 --model.expert_hidden_dim 16 --model.dense_hidden_dim 32 --model.vocab_size 128
--data.seq_len 16 --train.batch_size 8 --train.micro_batch_size 2 --train.compute_dtype float32 --parallel.ep 2
--optim.warmup_steps 0 --balance.method coordinate --observe.wandb off --observe.log_every 1 --observe.regret_every 10
--observe.peak_tflops 1.0 --evaluate.max_tokens 64 --evaluate.every 0 --evaluate.batch_size 4 --nproc 2
"""
WHEN = ("any", "training", "save")
STUCK_S = 180.0


@dataclass
class Found:
    """What the kills did."""

    kills: Counter = field(default_factory=Counter)
    resumes: int = 0
    lost: list[int] = field(default_factory=list)
    went_back: int = 0
    """Resumes from an older checkpoint than the newest one at the kill: there must be none."""


def main(argv: list[str]) -> int:
    """Both runs and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 20 a kill and 200 more")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a folder that is removed")
    o = parser.parse_args(argv)
    steps = o.steps or 20 * o.kills + 200
    folder = o.out or Path(tempfile.mkdtemp(prefix="torture-"))
    make_token_folder(folder / "data", {"text": 40_000})
    began = time.monotonic()
    words = [*SETTINGS.split(), "--data.path", str(folder / "data"), "--run.folder", str(folder)]
    words += ["--train.steps", str(steps), "--checkpoint.every", str(o.every)]
    with start([*words, "--run.name", "calm"], folder) as calm:
        if calm.wait() != 0:
            print(f"the undisturbed run failed: see {folder}/calm.log", file=sys.stderr)
            return 1
    print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    found = torture([*words, "--run.name", "torture"], folder, o.kills, random.Random(o.seed))
    mismatches = compare(folder / "calm" / "checkpoints", folder / "torture" / "checkpoints")
    print(table(found, mismatches, time.monotonic() - began))
    if o.out is None:
        shutil.rmtree(folder)
    return 0 if sum(found.kills.values()) >= o.kills and not mismatches and not found.went_back else 1


def start(words: list[str], folder: Path, *more: str) -> subprocess.Popen:
    """`alf-moe train`, its output appended to <name>.log."""
    command = [sys.executable, "-m", "launch.cli", "train", "--config", str(ROOT / "configs" / "tiny.toml"), *words]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20",
    }
    with (folder / f"{words[-1]}.log").open("a") as log:
        return subprocess.Popen([*command, "--max-restarts", "100000", *more], stdout=log, stderr=log, env=environment)


def torture(words: list[str], folder: Path, kills: int, rng: random.Random) -> Found:
    """Kill until `kills` are done, then let the run end."""
    run, found, checked = folder / "torture", Found(), 0
    lives = [start(words, folder)]
    try:
        while lives[-1].poll() is None or not (run / "exit.json").exists():
            checked = check_resumes(run, found, checked)
            if lives[-1].poll() is not None:
                again = "--resume" if manifest.steps(run / "checkpoints") else "--clean"
                lives.append(start(words, folder, again))
            elif sum(found.kills.values()) < kills:
                kill_one(lives[-1], run, found, rng)
            else:
                grown = lines(run)
                until(lives[-1], 0.5, lambda grown=grown: lines(run) > grown)
        check_resumes(run, found, checked)
    finally:
        for pid in children(lives[-1].pid):  # after an error: torchrun takes its workers with it
            os.kill(pid, signal.SIGKILL)
    return found


def kill_one(process: subprocess.Popen, run: Path, found: Found, rng: random.Random) -> None:
    """Wait for the moment, choose a victim, note where the run stands, kill."""
    when = rng.choice(WHEN)
    last = (rows(run.parent / "kills.jsonl") or [{"events": 0, "lines": 0}])[-1]
    if when != "any":
        until(process, 0.05, lambda: len(events(run)) > last["events"] and lines(run) > last["lines"])
    if when == "save":
        since = events(run)[-1]["time"] if events(run) else 0.0  # a partial of an earlier life may lie there
        until(process, 0.002, lambda: any(begun > since for begun in partials(run)))
    time.sleep(rng.uniform(0, {"any": 6.0, "training": 1.5, "save": 0.02}[when]))
    agent = children(process.pid)
    workers = [pid for parent in agent for pid in children(parent)]
    victims = [("torchrun", pid) for pid in agent[:1]] + [("worker", pid) for pid in workers] * 4
    if not victims or process.poll() is not None:
        return
    kind, pid = rng.choice(victims)
    note = {"published": newest(run), "step": last_step(run), "events": len(events(run)), "lines": lines(run)}
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    found.kills[when, kind] += 1
    with (run.parent / "kills.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "when": when, "kind": kind, **note}) + "\n")
    if kind == "torchrun":
        wait(process.wait, "the launcher after torchrun was killed")
    gone = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < gone and process.poll() is None:
        time.sleep(0.01)


def check_resumes(run: Path, found: Found, checked: int) -> int:
    """Every resume since the last look: from the newest checkpoint that was there when the kill came?"""
    now = events(run)
    notes = (
        [json.loads(line) for line in (run.parent / "kills.jsonl").read_text().splitlines()] if checked or now else []
    )
    for index in range(checked, len(now)):
        before = [note for note in notes if note["time"] <= now[index]["time"]]
        if now[index]["event"] != "resume" or not before:
            continue
        found.resumes += 1
        found.lost.append(max(0, before[-1]["step"] - now[index]["step"]))
        found.went_back += now[index]["step"] < before[-1]["published"]
    return len(now)


def until(process: subprocess.Popen, pause: float, holds: Callable[[], bool]) -> None:
    """Wait until it holds, or the run ends."""
    deadline = time.monotonic() + STUCK_S
    while process.poll() is None and not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"stuck: nothing new for {STUCK_S:g} s")
        time.sleep(pause)


def lines(run: Path) -> int:
    """Lines logged so far."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def partials(run: Path) -> list[float]:
    """When the checkpoints that are being written were begun."""
    found = []
    for path in (run / "checkpoints").glob(".partial-step-*"):
        with contextlib.suppress(FileNotFoundError):  # it got its name
            found.append(path.stat().st_mtime)
    return found


def wait(work, what: str):
    """work(timeout=...) or the end of the experiment."""
    try:
        return work(timeout=STUCK_S)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"stuck: {what} did not come in {STUCK_S:g} s") from None


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def rows(file: Path) -> list[dict]:
    """Lines of a JSONL file; cut ones are passed over."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def events(run: Path) -> list[dict]:
    """Starts and resumes so far."""
    return [row for row in rows(run / "events.jsonl") if row["event"] in ("start", "resume")]


def last_step(run: Path) -> int:
    """The last logged step."""
    return next((int(row["train/step"]) for row in reversed(rows(run / "metrics.jsonl"))), 0)


def newest(run: Path) -> int:
    """Step of the newest checkpoint with a name."""
    names = manifest.steps(run / "checkpoints")
    return manifest.step_of(names[-1]) if names else 0


def compare(calm: Path, tortured: Path) -> list[str]:
    """What differs between the final checkpoints of two runs: files, tensors, position."""
    names = [manifest.steps(folder)[-1] for folder in (calm, tortured)]
    if names[0] != names[1]:
        return [f"{names[0]} against {names[1]}"]
    paths = [folder / names[0] for folder in (calm, tortured)]
    damaged = [f"{path}: {problem}" for path in paths if (problem := verify_all(path))]
    if damaged:
        return damaged
    a, b = map(read_tensors, paths)
    different = [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or not same_bits(a[name], b[name])
    ]
    one, other = (json.loads((path / "trainer.json").read_text()) for path in paths)
    return different + [key for key in ("progress", "next_samples", "init_hash") if one[key] != other[key]]


def table(found: Found, mismatches: list[str], seconds: float) -> str:
    """The result."""
    lines = [f"{'when':<10} {'worker':>8} {'torchrun':>9}"]
    lines += [f"{when:<10} {found.kills[when, 'worker']:>8} {found.kills[when, 'torchrun']:>9}" for when in WHEN]
    lost = found.lost or [0]
    facts = {
        "kills": sum(found.kills.values()),
        "resumes": found.resumes,
        "steps lost": f"{sum(lost)}, at most {max(lost)} at a time",
        "resumes from an older checkpoint": found.went_back,
        "mismatches": len(mismatches),
        "minutes": f"{seconds / 60:.1f}",
    }
    return "\n".join([*lines, "", *(f"{name:<34}{value}" for name, value in facts.items()), *mismatches[:20]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
