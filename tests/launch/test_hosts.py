"""One run on two machines: network namespaces with addresses of their own, joined by a virtual cable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import train
from moe.config import ConfigError
from moe.observe.sinks import read_metrics
from tests.corpus import make_token_folder
from tests.moe.train.test_run import SMALL_WORDS

ROOT = Path(__file__).parents[2]
TWO = ["--nnodes", "2", "--rdzv-endpoint", "10.77.0.1:29411", "--rdzv-id", "cable"]

MACHINES = """
set -eu
ip link set lo up
unshare -n sleep 300 & other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add cable0 type veth peer name cable1
ip link set cable1 netns $other
ip addr add 10.77.0.1/24 dev cable0 && ip link set cable0 up
nsenter -t $other -n sh -c 'ip addr add 10.77.0.2/24 dev cable1; ip link set cable1 up; ip link set lo up'
GLOO_SOCKET_IFNAME=cable1 nsenter -t $other -n "$@" --node-rank 1 --local-addr 10.77.0.2 >"$OUT/1.log" 2>&1 & second=$!
code=0; GLOO_SOCKET_IFNAME=cable0 "$@" --node-rank 0 --local-addr 10.77.0.1 >"$OUT/0.log" 2>&1 || code=$?
wait $second && echo "$code 0" || echo "$code $?"
"""


def namespaces_missing() -> str | None:
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed"
    probe = "ip link add probe0 type veth peer name probe1 && unshare -n true"
    done = subprocess.run(["unshare", "-rn", "sh", "-c", probe], capture_output=True, text=True)
    return None if done.returncode == 0 else f"network namespaces are not permitted: {done.stderr.strip()}"


def test_one_run_on_two_machines(tmp_path: Path):
    if (reason := namespaces_missing()) is not None:
        pytest.skip(reason)
    data = make_token_folder(tmp_path / "data")
    words = ["train", "--config", str(ROOT / "configs" / "tiny.toml"), *SMALL_WORDS, "--nproc", "1", *TWO]
    words += ["--parallel.ep", "2", "--parallel.data", "shard", "--data.path", str(data), "--run.folder", str(tmp_path)]
    words += [
        "--observe.peak_tflops",
        "1.0",
        "--observe.log_every",
        "1",
        "--run.name",
        "two",
        "--train.timeout_s",
        "90",
    ]
    done = subprocess.run(
        ["unshare", "-rn", "bash", "-c", MACHINES, "machines", sys.executable, "-m", "launch.cli", *words],
        capture_output=True, text=True, timeout=280, cwd=ROOT, env={**train.os.environ, "OUT": str(tmp_path)},
    )  # fmt: skip
    logs = "\n".join((tmp_path / f"{rank}.log").read_text() for rank in range(2) if (tmp_path / f"{rank}.log").exists())
    assert done.stdout.split() == ["0", "0"], done.stdout + done.stderr + logs
    run = tmp_path / "two"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert [row["train/step"] for row in read_metrics(run / "metrics.jsonl") if "loss/ce" in row] == [1, 2, 3]
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-00000003"}
    assert (run / "logs" / "host-1" / "torchrun.log").exists() and "step 3/3" in logs


def test_the_flags_reach_torchrun_and_the_workers(monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    options = train.parse(["--config", "a.toml", *TWO, "--node-rank", "1", "--local-addr", "10.0.0.9"])
    logs = options.logs(Path("run"))
    command = train.torchrun_command(options, 4, logs)
    for flag, value in zip(TWO[::2], TWO[1::2], strict=True):
        assert command[command.index(flag) + 1] == value
    assert command[command.index("--node-rank") + 1] == "1" and command[command.index("--local-addr") + 1] == "10.0.0.9"
    assert command[command.index("--rdzv-backend") + 1] == "c10d" and "--standalone" not in command
    environment = train.environment(4, options, logs)
    assert environment["TORCH_FR_BUFFER_SIZE"] == "7"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"].endswith("run/logs/host-1/nccl_trace_rank_")
    assert "--standalone" in train.torchrun_command(train.parse(["--config", "a.toml"]), 4, Path("logs"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nnodes", "2"], "--nnodes 2 has no --rdzv-endpoint"),
        (["--rdzv-endpoint", "a:1"], "--rdzv-endpoint is for several machines"),
        (["--node-rank", "1"], "--node-rank 1 is for several machines"),
        ([*TWO[:2], "--rdzv-endpoint", "host"], "--rdzv-endpoint host has no port"),
        ([*TWO, "--node-rank", "2"], "--node-rank 2 is not below --nnodes 2"),
        ([*TWO, "--clean"], "--clean would remove"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(words, says):
    with pytest.raises(ConfigError) as error:
        options = train.parse(words)
        options.check(options.clean)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_second_machine_believes_no_exit_code_of_an_earlier_run(tmp_path: Path, capsys):
    (tmp_path / "exit.json").write_text('{"code": 0}')
    assert train.finish(tmp_path, 1, False, train.parse([*TWO, "--node-rank", "1"])) == 1
    assert "--node-rank 1" in capsys.readouterr().err
    assert train.finish(tmp_path, 0, False, train.parse([*TWO, "--node-rank", "1"])) == 0
