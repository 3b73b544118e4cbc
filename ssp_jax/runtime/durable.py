"""Flushing to disk, so that files survive a machine that goes down."""

import errno
import os
from pathlib import Path

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot flush a folder


def sync(path: Path) -> None:
    """Returns when the file's bytes, or the folder's names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` for everything below the folder, and for itself."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
