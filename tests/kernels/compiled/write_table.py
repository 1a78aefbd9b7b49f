"""Write resources.json for the installed Triton: `ALF_COMPILE_LANE=1 python -m tests.kernels.compiled.write_table`.

Other versions in the file stay. A row a kernel, so that a change reads as one.
"""

from __future__ import annotations

import json
import re

import triton

from tests.kernels.compiled.lane import SHARED_LIMIT
from tests.kernels.compiled.launches import LAUNCHES, builds_of
from tests.kernels.compiled.resources import TABLE, read_table, resources


def main() -> None:
    """Compile everything: about a minute."""
    found = {f"sm_{sm}": {op: resources(builds_of(op, sm)) for op in LAUNCHES} for sm in SHARED_LIMIT}
    text = json.dumps(dict(sorted((read_table() | {triton.__version__: found}).items())), indent=1)
    text = re.sub(r"\[[\s\d,\[\]]*\]", lambda numbers: re.sub(r"\s+", "", numbers[0]).replace(",", ", "), text)
    TABLE.write_text(text + "\n")
    print(f"{TABLE.name}: triton {triton.__version__}, {sum(map(len, found.values()))} operations and architectures")


if __name__ == "__main__":
    main()
