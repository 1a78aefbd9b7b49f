"""The `alf-moe` command: one file a sub-command, imported when used. No torch here: --help answers at once."""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "train": "pretrain a configuration with torchrun on the local devices",
    "prepare": "fetch and verify a corpus, train its tokenizer, write token files",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of the sub-command; 2 for usage errors."""
    words = sys.argv[1:] if argv is None else argv
    if sys.platform != "linux":
        print(f"error: alf-moe runs on Linux only, this is {sys.platform}: use a Linux machine or container", file=sys.stderr)
        return 2
    if not words or words[0] in ("-h", "--help"):
        print("usage: alf-moe COMMAND ...  (alf-moe COMMAND --help tells more)\n")
        print("\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
        return 0
    if words[0] == "--version":
        import moe

        print(f"alf-moe {moe.__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: {words[0]!r} is not a command: {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"launch.{words[0]}").main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
