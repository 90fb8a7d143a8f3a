"""How every program starts and fails: its config flag, the compile cache, one-line errors."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from proxy_jax.errors import InputError
from proxy_jax.jobs import processes
from proxy_jax.jobs.exits import INTERRUPTED, fail
from proxy_jax.reading import reading, shown

_PATIENCE = 30  # seconds that a program has to end after Ctrl-C


def run(
    main: Callable[[ConfigDict], None],
    defaults: Callable[[ConfigDict], ConfigDict],
    *,
    xla_flags: str = "",
    catches_sigterm: bool = False,
) -> None:
    """Parses --config and runs main(config).

    Args:
      main: the program.
      defaults: of a config, the one with every field that the program reads; config files that
        lack one, or have others, or values of other types, are refused.
      xla_flags: for the compiler; those in $XLA_FLAGS come after them, and win.
      catches_sigterm: main saves what it has when the machine is about to be taken away.

    An InputError, or a config that cannot be read, ends the program with one line and status 2;
    Ctrl-C with one word and status 130; an output that nobody reads, or that is full, with status
    1; the loss of another process of the job with one line and status 1 or, if JAX finds it, an
    abort. Finished rows and checkpoints are on disk by then: main loses nothing by it.
    """
    os.environ["XLA_FLAGS"] = f"{xla_flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    config = config_flags.DEFINE_config_file(
        "config",
        help_string="A Python file with get_config(); see configs/. Any field can be set on the "
        "command line: --config.alpha=0.5.",
    )

    def entry(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        signal.signal(signal.SIGINT, _interrupt)
        try:
            if len(argv) > 1:
                raise InputError(f"unexpected argument {argv[1]!r}; options start with --config.")
            if config.value is None:
                raise InputError("--config=FILE is missing; see configs/ for examples")
            with reading("--config"):
                distributed = config.value.distributed  # an absent file fails on first use only
                check_fields(config.value, defaults(config.value))
            use_compilation_cache()
            if distributed:
                processes.join(catches_sigterm=catches_sigterm)
            main(config.value)
            sys.stdout.flush()
        except InputError as error:
            fail(error)
        except BrokenPipeError:  # whoever read the output, head(1) say, has enough
            _leave_output()
        except (Exception, KeyboardInterrupt) as error:
            if jax.distributed.is_initialized():
                processes.fail(error)
            if isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                sys.exit(INTERRUPTED)
            if (
                isinstance(error, OSError)
                and error.filename is None
                and error.errno == errno.ENOSPC
            ):
                print(f"error: standard output: {error.strerror}", file=sys.stderr)
                _leave_output()
            raise

    app.run(entry, flags_parser=_parse)


def check_fields(config: Any, defaults: ConfigDict, prefix: str = "") -> None:
    """Refuses a config that is not of the program.

    Args:
      config: what get_config() gave.
      defaults: with all its fields; an empty part of it may hold anything.
      prefix: of the names in errors.

    Raises:
      InputError: names the field that is missing, unknown, or of another type.
    """
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config: {prefix or 'get_config()'} must be a ConfigDict")
    if not defaults:
        return
    if missing := sorted(set(defaults) - set(config)):
        raise InputError(
            f"--config: there is no field {prefix}{missing[0]}; is it another program's config?"
        )
    if unknown := sorted(set(config) - set(defaults)):
        raise InputError(f"--config: field {prefix}{unknown[0]} is unknown to this program")
    for name in defaults:
        value, default = config[name], defaults[name]
        if isinstance(default, ConfigDict):
            check_fields(value, default, f"{prefix}{name}.")
            continue
        kinds = {float: (int, float), tuple: (tuple, list)}.get(type(default), (type(default),))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InputError(
                f"--config: {prefix}{name} must be of type {type(default).__name__}, "
                f"not {shown(value)}"
            )


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is quick.

    In $JAX_COMPILATION_CACHE_DIR, or ~/.cache/proxy_jax/compiled.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path("~/.cache/proxy_jax/compiled").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _interrupt(*_: object) -> None:
    """Ends the program, even where the KeyboardInterrupt is lost: native callbacks swallow it."""
    end = threading.Timer(_PATIENCE, os._exit, (INTERRUPTED,))
    end.daemon = True
    end.start()
    raise KeyboardInterrupt


def _leave_output() -> None:
    # Python flushes once more as it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except KeyError as error:  # its text is the name, and perhaps a better one
        fail(InputError(f"--config: there is no field {error.args[0] if error.args else ''}"))
    except (Exception, SystemExit) as error:  # whatever a config file does
        kind = "" if isinstance(error, flags.Error | InputError) else f"{type(error).__name__}: "
        fail(InputError(f"{kind}{error}"))
