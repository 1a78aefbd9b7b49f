"""The `alf-moe` command: `cli.py` and one file a command. Nothing here imports torch."""
