"""Writing a folder so that it appears, or replaces an older one, only once it is complete.

`X` is written as `X.building` and renamed when all of it is on the disk; the older `X` is `X.old`
for a moment. A process may be killed between any two system calls. The next one then finds:

| folders                   | meaning                                   | what it does            |
|---------------------------|-------------------------------------------|-------------------------|
| X.building, with or       | half written, or an old X that was being  | removes X.building      |
| without X                 | removed                                   |                         |
| X.old and X.building      | killed between the two renames            | renames X.old back to X |
| X.old and X               | killed after them                         | removes X.old           |

Nothing is removed that this program did not write. X is replaced only if its owner knows every file
in it; X.building and X.old are removed only if they are empty or hold MARKER. Everything else is
refused and left as it is.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ssp_jax.errors import InputError
from ssp_jax.runtime.files import sync

MARKER = ".ssp_jax_leftover"  # in a folder under one of the temporary names

Owned = Callable[[Path], Iterable[str]]  # a folder -> the names in it that its owner has written


class FolderSwap:
    """The swap of one folder; a symbolic link is followed.

    Callers make sure that only one process acts at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        owned: Owned,
        work: str = ".building",
        old: str = ".old",
    ) -> None:
        """kind: of the folder, for messages. work, old: suffixes of the temporary names."""
        self.folder = Path(os.path.realpath(folder))
        if not self.folder.name:
            raise InputError(f"{folder} is {self.folder}; expected a folder that can be replaced")
        self.work = self.folder.with_name(self.folder.name + work)
        self._old = self.folder.with_name(self.folder.name + old)
        self._kind = kind
        self._owned = owned

    def check(self) -> None:
        """InputError if a file or folder of the user is in the way."""
        try:
            self._check_target()
            for leftover in (self.work, self._old):
                if os.path.lexists(leftover) and not _is_leftover(leftover):
                    raise InputError(
                        f"{leftover}: expected no such file or folder while {self.folder.name} "
                        "is written; it is not ours and is left alone"
                    )
        except OSError as error:
            raise self.error(error) from None

    def _check_target(self) -> None:
        if not os.path.lexists(self.folder):
            return
        expected = (
            f"{self.folder}: expected no such folder, or {self._kind} that ssp_jax wrote "
            "and nothing else"
        )
        if not self.folder.is_dir():
            raise InputError(f"{expected}; it is no folder and is left alone")
        if self.folder.is_mount():
            remedy = "it is a mount point, which cannot be renamed: name a folder in it"
            raise InputError(f"{expected}; {remedy}")
        names = written_names(self.folder)
        foreign = sorted(set(names) - set(self._owned(self.folder))) if names else []
        if foreign:
            raise InputError(f"{expected}; found {foreign[0]!r} in it; it is left alone")

    @property
    def is_interrupted(self) -> bool:
        """Whether a swap was killed between its two renames."""
        if os.path.lexists(self.folder):
            return False
        return _is_leftover(self._old) and (self._old / MARKER).is_file()

    def recover(self) -> None:
        """Undoes a swap that was killed between its two renames."""
        if self.is_interrupted:
            self._old.rename(self.folder)
        if (self.folder / MARKER).is_file():
            (self.folder / MARKER).unlink()

    def begin(self) -> None:
        """Removes leftovers of killed processes, and makes `work`: empty but for the marker."""
        self.check()
        try:
            self.recover()
            self.discard()
            self.work.mkdir(parents=True)
            _mark(self.work)
        except OSError as error:
            raise self.error(error) from None

    def commit(self) -> None:
        """`work` becomes the folder."""
        for path in sorted(self.work.rglob("*")):
            sync(path)
        sync(self.work)
        self._check_target()  # somebody may have put something in while `work` was written
        if self.folder.exists():
            _mark(self.folder)
            self.folder.rename(self._old)
        self.work.rename(self.folder)
        sync(self.folder.parent)
        (self.folder / MARKER).unlink()
        self.discard()

    def discard(self) -> None:
        """Removes leftovers.

        X.old is renamed first, so that it is never there in part: it may have to be renamed back.
        """
        self.recover()
        _remove(self.work)
        if _is_leftover(self._old):
            self._old.rename(self.work)
            _remove(self.work)

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """`work`, for the body to fill. It becomes the folder, or is removed after an error."""
        self.begin()
        try:
            yield self.work
            self.commit()
        except OSError as error:
            raise self.error(error) from None
        finally:
            # Such as a disk that is gone: the error before it is the one to report.
            with contextlib.suppress(OSError):
                self.discard()

    def error(self, error: OSError) -> InputError:
        """The sentence for a folder that cannot be written."""
        expected = f"expected a folder where {self._kind} can be written"
        return InputError(f"{self.folder}: {expected} ({error})")


def written_names(folder: Path) -> list[str]:
    """Sorted names of what a folder holds, without the marker."""
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


def listed_names(folder: Path, manifest: str, keys: Iterable[str] = ()) -> list[str]:
    """Names of the files that a folder's manifest lists, and the manifest's own.

    The manifest is a JSON object with the names under "files", in a list or as the keys of an
    object. keys: others that it must have. No names where there is no such manifest.
    """
    try:
        values = json.loads((folder / manifest).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(values, dict) or not {"files", *keys} <= values.keys():
        return []
    files = values["files"]
    return [manifest, *map(str, files)] if isinstance(files, list | dict) else []


def _is_leftover(path: Path) -> bool:
    """Whether it is a folder with our marker, or an empty one."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / MARKER).is_file() or not any(path.iterdir())


def _mark(folder: Path) -> None:
    (folder / MARKER).touch()
    sync(folder)


def _remove(folder: Path) -> None:
    """Removes a leftover, its marker last: what a killed removal leaves is still marked."""
    if not _is_leftover(folder):
        return
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            os.unlink(entry)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()
