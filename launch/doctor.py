"""`alf-moe doctor`: what a training run needs of this machine, one line each, and how to get what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

USAGE = """usage: alf-moe doctor [--data FOLDER] [--runs FOLDER] [--offline]

Checks versions, devices, collectives, Triton, disk, ports, W&B and prepared data. Exit code 0: nothing is missing; 1: something
is. --offline leaves out W&B."""
WANDB_SERVER = ("api.wandb.ai", 443)
GLOO = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
assert one.item() == 2
dist.barrier()
dist.destroy_process_group()
"""


class Finding(NamedTuple):
    """ok: True; False: a run would fail; None: a run works without it."""

    ok: bool | None
    what: str
    remedy: str = ""


def main(argv: list[str]) -> int:
    """0, 1 (something is missing) or 2 (wrong words)."""
    options = {"--data": "data/enwik8-8192", "--runs": "runs"}
    words, offline = list(argv), False
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            print(USAGE)
            return 0
        if word == "--offline":
            offline = True
        elif word in options and words:
            options[word] = words.pop(0)
        else:
            problem = "has no value" if word in options else "is not an option of alf-moe doctor"
            print(f"error: {word} {problem}: see alf-moe doctor --help", file=sys.stderr)
            return 2
    return report(checks(Path(options["--data"]), Path(options["--runs"]), offline))


def report(named: dict[str, Callable[[], Finding]]) -> int:
    """Run each check and print its line; what a check does not expect is its finding."""
    missing = False
    for name, check in named.items():
        try:
            found = check()
        except Exception as error:
            found = Finding(False, f"{type(error).__name__}: {error}".splitlines()[0], "report this line")
        word = {True: "ok", False: "missing", None: "note"}[found.ok]
        print(f"{word:<8} {name:<10} {found.what}{': ' + found.remedy if found.remedy else ''}", flush=True)
        missing = missing or found.ok is False
    return int(missing)


def checks(data: Path, runs: Path, offline: bool) -> dict[str, Callable[[], Finding]]:
    """In the order in which a missing one explains those after it."""
    named: dict[str, Callable[[], Finding]] = {
        "python": python,
        "packages": packages,
        "our files": shadowed,
        "devices": devices,
        "triton": triton,
        "gloo": gloo,
        "nccl": multi_gpu,
        "ports": ports,
        "disk": lambda: disk(runs),
        "data": lambda: prepared(data),
    }
    return named if offline else named | {"wandb": wandb}


def python() -> Finding:
    """3.11 or newer, on Linux."""
    if sys.version_info < (3, 11) or not sys.platform.startswith("linux"):
        return Finding(False, f"{platform.python_version()} on {sys.platform}", "use Python 3.11 or newer on Linux")
    return Finding(True, f"{platform.python_version()}, {platform.system()} {platform.release()}")


def packages() -> Finding:
    """What pyproject.toml requires."""
    found, absent = [], []
    for name in (
        "torch",
        "numpy",
        "pydantic",
        "rich",
        "tomli-w",
        "tokenizers",
        "safetensors",
        "xxhash",
        "wandb",
        "pillow",
    ):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    if absent:
        return Finding(
            False, f"not installed: {', '.join(absent)}", f"{sys.executable} -m pip install {' '.join(absent)}"
        )
    return Finding(True, ", ".join(found))


def shadowed() -> Finding:
    """Our packages have common names: another one of the same name may come first."""
    here = Path(__file__).resolve().parents[1]
    for name in ("moe", "kernels", "launch"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or here not in origin.parents:
            remedy = f"uninstall the other package named {name}, or put {here} first in PYTHONPATH"
            return Finding(False, f"import {name} finds {origin}, not {here / name}", remedy)
    return Finding(True, f"moe, kernels and launch are those of {here}")


def devices() -> Finding:
    """GPUs, or the cores."""
    import torch

    cores = f"{len(os.sched_getaffinity(0))} cores"
    if not torch.cuda.is_available():
        if list(Path("/dev").glob("nvidia[0-9]*")):
            return Finding(
                False, "GPUs, which torch does not see", f"install the CUDA build of torch, not {torch.__version__}"
            )
        return Finding(True, f"no GPU, {cores}: training on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding(True, f"{len(names)} x {names[0]} (CUDA {torch.version.cuda}), {cores}")


def triton() -> Finding:
    """Needed on a GPU; the CPU takes torch's operations."""
    import torch

    try:
        return Finding(
            True,
            version("triton") + (", compiles at the first use" if torch.cuda.is_available() else ", unused on the CPU"),
        )
    except PackageNotFoundError:
        return Finding(False, "not installed", f"{sys.executable} -m pip install 'triton>=3.6'")


def gloo() -> Finding:
    """Two processes add 1 and 1 over loopback, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", GLOO]
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    except subprocess.TimeoutExpired:
        return Finding(
            False, "two processes did not meet in 120 s", "allow connections to 127.0.0.1 and to this host's name"
        )
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "no message")
        return Finding(False, f"two processes could not add 1 and 1 ({last.strip()})", "set GLOO_SOCKET_IFNAME=lo")
    return Finding(True, "two processes met over loopback and added 1 and 1")


def multi_gpu() -> Finding:
    """Needed for more than one GPU."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    if dist.is_nccl_available() and torch.cuda.is_available():
        return Finding(True, ".".join(map(str, nccl.version())))
    if torch.cuda.device_count() > 1:
        return Finding(False, "this torch has none", "install the CUDA build of torch")
    return Finding(None, "none, and none is needed here")


def ports() -> Finding:
    """torchrun listens on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        remedy = f"add {socket.gethostname()} to /etc/hosts, or runs on several machines cannot find it"
        return Finding(None, "a port on 127.0.0.1 works; this host's name has no address", remedy)
    return Finding(True, "a port on 127.0.0.1 can be opened and reached")


def disk(runs: Path) -> Finding:
    """Room where runs are written."""
    place = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free / 2**30
    if not os.access(place, os.W_OK):
        return Finding(False, f"{place} cannot be written", "choose another --run.folder")
    if free < 1:
        return Finding(False, f"{free:.2f} GiB free under {place}", "free some, or choose another --run.folder")
    return Finding(True, f"{free:,.0f} GiB free under {place}")


def prepared(folder: Path) -> Finding:
    """The default corpus, or the one that is asked about, whole."""
    from moe.train.folder import DataError, read_meta

    if not folder.is_dir():
        return Finding(None, f"{folder} is not there", "alf-moe prepare (the default corpus), or --data FOLDER")
    try:
        meta = read_meta(folder, setting="--data")
    except DataError as error:
        return Finding(False, str(error))
    tokens = sum(source["train"]["tokens"] for source in meta["sources"].values())
    return Finding(True, f"{folder}: {tokens:,} training tokens, {meta['vocab_size']:,} entries, hashes agree")


def wandb() -> Finding:
    """Never needed: without it metrics are logged offline."""
    try:
        with socket.create_connection(WANDB_SERVER, timeout=3):
            pass
    except OSError as error:
        return Finding(
            None, f"{WANDB_SERVER[0]} is not reachable ({error})", "runs log offline; wandb sync uploads later"
        )
    key = "WANDB_API_KEY is set" if os.environ.get("WANDB_API_KEY") else "without WANDB_API_KEY runs log offline"
    return Finding(True, f"{WANDB_SERVER[0]} is reachable; {key}")
