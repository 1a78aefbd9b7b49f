"""`alf-moe <command>`: finds the command's module and calls its `main(argv) -> exit code`; imports no other."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

import moe

COMMANDS = {
    "train": ("launch.train", "train a model on the processes of this machine"),
    "prepare": ("launch.prepare", "turn a corpus into a tokenizer and token files"),
    "compare": ("launch.compare", "train several balancing methods on paired seeds, and compare them"),
    "eval": ("launch.eval", "held-out loss, zero-shot questions and routing by domain of a run"),
    "export": ("launch.export", "write a run's model as a Hugging Face folder"),
    "import": ("launch.import_model", "continue from, or upcycle, a Hugging Face checkpoint"),
    "plan": ("launch.plan", "memory, traffic and days of a run on a cluster, on paper"),
    "ckpt": ("launch.ckpt", "list, verify and compare checkpoints"),
    "doctor": ("launch.doctor", "check this machine: versions, devices, collectives, disk, data"),
    "slurm": ("launch.slurm", "write the sbatch script of a run on several machines"),
    "report": ("launch.report", "one HTML file from run folders, to read or to compare"),
    "watch": ("launch.watch", "follow a run in the terminal"),
    "dashboard": ("launch.dashboard", "show the W&B dashboard, or push it as a new saved view"),
    "theory": ("launch.theory", "run balancing rules on score streams beside the theory's bounds"),
}


def usage() -> str:
    """The text of `alf-moe --help`."""
    lines = [f"alf-moe {moe.__version__}: sparse mixture-of-experts language models", ""]
    lines += ["usage: alf-moe COMMAND ...", ""]
    lines += [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "alf-moe COMMAND --help shows the settings of a command; alf-moe --version the version."]
    return "\n".join(lines)


def unknown(command: str) -> str:
    """One sentence with the nearest command."""
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
    return f"{command!r} is not a command of alf-moe: {hint}"


def main(argv: list[str] | None = None) -> int:
    """Run one command; the result is the exit code of the process."""
    argv = sys.argv[1:] if argv is None else argv
    if not sys.platform.startswith("linux"):
        print(f"error: alf-moe runs on Linux only, this is {sys.platform}: use WSL2 or a container", file=sys.stderr)
        return 2
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("--version", "-V"):
        print(moe.__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: {unknown(argv[0])}", file=sys.stderr)
        return 2
    try:
        code = importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `alf-moe plan ... | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
