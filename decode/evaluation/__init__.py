"""An evaluation: what is decoded, what it is worth, and the report."""
