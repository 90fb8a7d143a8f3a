"""One command that says what this machine does with the engine: `python -m device_check`."""
