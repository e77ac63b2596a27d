"""Log lines that appear once: for fast paths that step aside and hints that mean nothing here."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger("mindspeed")


@functools.lru_cache(maxsize=4096)
def log_once(message: str, *details: object) -> None:
    """Log at INFO the first time this message with these (hashable) details is given in the process."""
    _log.info(message, *details)


@functools.lru_cache(maxsize=4096)
def warn_once(message: str, *details: object) -> None:
    """Log at WARNING the first time this message with these (hashable) details is given in the process."""
    _log.warning(message, *details)
