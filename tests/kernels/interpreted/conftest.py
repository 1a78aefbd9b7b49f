"""Run by tests/kernels/test_lanes.py in a process of its own: triton reads TRITON_INTERPRET when it is first imported."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
