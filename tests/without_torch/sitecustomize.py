"""Python reads this at its start where PYTHONPATH names the folder: torch cannot be imported."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
