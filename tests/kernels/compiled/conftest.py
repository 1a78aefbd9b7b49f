"""Run by tests/kernels/test_lanes.py in a process of its own: a stub driver takes the place of the GPU's."""

import os

if os.environ.get("ALF_COMPILE_LANE") != "1":
    collect_ignore_glob = ["test_*.py"]
