"""Files that survive a machine that goes down, and are replaced as a whole when complete."""

import contextlib
import errno
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ssp_jax.errors import InputError, printable

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot flush a folder


@contextlib.contextmanager
def replacing(path: str | Path, name: str, *, keep: bool = False) -> Iterator[IO[str]]:
    """A text file that replaces `path` when the body ends; an error leaves `path` as it was.

    name: of the file in messages. keep: after an error the unfinished file stays beside it, and a
    message says where. A device or a pipe is written directly. Raises InputError where `path`
    cannot be written.
    """
    target = Path(path).resolve()  # the target of a link is replaced, not the link
    if target.exists() and not target.is_file() and not target.is_dir():
        with open(target, "w", encoding="utf-8") as device:
            yield device
        return
    fresh, file = _open_beside(target, name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            fresh.chmod(target.stat().st_mode)
        fresh.replace(target)
        sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            if keep and fresh.stat().st_size:
                print(f"what was written so far is in {printable(str(fresh))}", file=sys.stderr)
            else:
                fresh.unlink()
        raise


def _open_beside(target: Path, name: str) -> tuple[Path, IO[str]]:
    """A new file beside `target`, under a name of this process."""
    if target.is_dir() or (target.exists() and not os.access(target, os.W_OK)):
        raise InputError(f"{name}: expected a file that can be written")
    for number in itertools.count():
        fresh = target.with_name(f"{target.name}.{os.getpid()}-{number}.unfinished")
        try:
            return fresh, open(fresh, "x", encoding="utf-8")
        except FileExistsError:  # somebody else's
            continue
        except OSError as error:
            expected = f"{name}: expected a file that can be written"
            raise InputError(f"{expected} ({error.strerror})") from None
    raise AssertionError("an endless count has ended")


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
