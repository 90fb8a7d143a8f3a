"""How every program starts and fails: its config flag, the compile cache, one-line errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import processes
from proxy_jax.errors import InputError

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; the second is a shell's for SIGINT
# What a config file, or a value that does not fit a field, may raise.
_CONFIG_ERRORS = (
    AttributeError, ImportError, KeyError, NameError, OSError, SyntaxError, TypeError, ValueError
)  # fmt: skip


def run(
    main: Callable[[ConfigDict], None], *, xla_flags: str = "", catches_sigterm: bool = False
) -> None:
    """Parses --config and runs main(config).

    Args:
      main: the program.
      xla_flags: for the compiler; those in $XLA_FLAGS come after them, and win.
      catches_sigterm: main saves what it has when the machine is about to be taken away.

    An InputError, or a config that cannot be read, ends the program with one line and status 2;
    Ctrl-C with one word and status 130; the loss of another process of the job with one line and
    status 1 or, if JAX finds it, an abort. Finished rows and checkpoints are on disk by then: main
    loses nothing by it.
    """
    os.environ["XLA_FLAGS"] = f"{xla_flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    config = config_flags.DEFINE_config_file(
        "config",
        help_string="A Python file with get_config(); see configs/. Any field can be set on the "
        "command line: --config.alpha=0.5.",
    )

    def entry(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise InputError(f"unexpected argument {argv[1]!r}; options start with --config.")
            if config.value is None:
                raise InputError("--config=FILE is missing; see configs/ for examples")
            use_compilation_cache()
            if _distributed(config.value):
                processes.join(catches_sigterm=catches_sigterm)
            main(config.value)
        except InputError as error:
            _fail(error)
        except (Exception, KeyboardInterrupt) as error:
            if jax.distributed.is_initialized():
                processes.fail(error)
            if isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                sys.exit(INTERRUPTED)
            raise

    app.run(entry, flags_parser=_parse)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is quick.

    In $JAX_COMPILATION_CACHE_DIR, or ~/.cache/proxy_jax/compiled.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path("~/.cache/proxy_jax/compiled").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _distributed(config: ConfigDict) -> bool:
    try:
        return config.distributed
    except (OSError, AttributeError) as error:  # a file that is absent fails on first use only
        raise InputError(f"--config: {error}") from error


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except KeyError as error:  # its text is the name, and perhaps a better one
        _fail(InputError(f"--config: there is no field {error.args[0]}"))
        raise
    except (flags.Error, *_CONFIG_ERRORS) as error:
        _fail(error)
        raise  # not reached: _fail exits


def _fail(error: Exception) -> None:
    # One line, whatever a library put into its message.
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if jax.distributed.is_initialized():
        processes.leave(BAD_INPUT)
    sys.exit(BAD_INPUT)
