"""The environment of programs that tests start: that of most users, who have no torch.

Where torch is installed transformers imports it, which takes longer than all else at the start of a
program. Only the tests' oracles need it.
"""

import os
from pathlib import Path

_WITHOUT_TORCH = Path(__file__).parent / "without_torch"


def environment(**more: str) -> dict[str, str]:
    """This process's variables, and more."""
    path = os.pathsep.join([str(_WITHOUT_TORCH), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.strip(os.pathsep), **more}
