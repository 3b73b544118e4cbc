"""Folders that are replaced as a whole: a kill at any system call loses nothing; nobody else's
files are touched.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssp_jax.errors import InputError
from ssp_jax.runtime import folder_swap
from ssp_jax.runtime.folder_swap import MARKER, FolderSwap

NAMES = ("a", "b")


def make(folder: Path) -> FolderSwap:
    return FolderSwap(folder, "a thing", lambda folder: NAMES)


def write(folder: Path, text: str) -> None:
    for name in NAMES:
        (folder / name).write_text(text)


def replace(folder: Path, text: str) -> None:
    with make(folder).building() as work:
        write(work, text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# For n = 0, 1, 2, ...: a child that dies before the n-th call that changes the disk, and then one
# that is let live.
KILLS = """
import json, os, sys
from pathlib import Path
from tests.runtime.test_folder_swap import content, make, replace

def child(folder, text, kill_at):
    calls = 0
    def count(event, arguments):
        nonlocal calls
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_CREAT))
        if changes:
            if calls == kill_at:
                os._exit(9)
            calls += 1
    pid = os.fork()
    if not pid:
        sys.addaudithook(count)
        replace(folder, text)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

found = []
for with_old in (False, True):
    for n in range(100):
        folder = Path(sys.argv[1], f"{with_old}{n}", "X")
        if with_old:
            folder.parent.mkdir()
            replace(folder, "old")
        code = child(folder, "new", n)
        make(folder).recover()
        there = sorted(set(content(folder).values())) if folder.exists() else []
        again = child(folder, "again", -1)
        files = sorted(path.name for path in folder.parent.iterdir())
        found.append([with_old, code, there, again, content(folder), files])
        if code == 0:
            break
print(json.dumps(found))
"""


def test_a_kill_before_any_system_call_loses_nothing_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 20 and [code for _, code, *_ in found].count(0) == 2
    for with_old, code, there, again, after, files in found:
        whole = [["new"]] if code == 0 else [["new"], ["old"]] if with_old else [[], ["new"]]
        assert there in whole, (with_old, code, there)
        assert again == 0 and after == dict.fromkeys(NAMES, "again") and files == ["X"]


def test_through_a_symbolic_link(tmp_path):
    """The link stays, and what it names is replaced where it lies; a link to nowhere names the
    place for it.
    """
    (tmp_path / "disk").mkdir()
    (tmp_path / "X").symlink_to(tmp_path / "disk" / "far")
    for text in ("first", "second"):
        replace(tmp_path / "X", text)
        assert (tmp_path / "X").is_symlink() and content(
            tmp_path / "disk" / "far"
        ) == dict.fromkeys(NAMES, text)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["X", "a", "b", "disk", "far"]


def test_files_that_are_links_lose_only_the_links(tmp_path):
    (tmp_path / "X").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "X" / "a").symlink_to(tmp_path / "precious")
    replace(tmp_path / "X", "new")
    assert (tmp_path / "precious").read_text() == "mine" and content(
        tmp_path / "X"
    ) == dict.fromkeys(NAMES, "new")


def foreign_file(folder):
    replace(folder / "X", "old")
    (folder / "X" / "notes.txt").write_text("mine")
    return (
        "X: expected no such folder, or a thing that ssp_jax wrote and nothing else; "
        "found 'notes.txt' in it"
    )


def foreign_folder(folder):
    replace(folder / "X", "old")
    (folder / "X" / "more").mkdir()
    return "found 'more' in it; it is left alone"


def file_in_the_way(folder):
    (folder / "X").write_text("mine")
    return "it is no folder"


def leftover_of_somebody(suffix):
    def make(folder):
        (folder / f"X{suffix}").mkdir()
        (folder / f"X{suffix}" / "a").write_text("mine")
        return (
            rf"X\{suffix}: expected no such file or folder while X is written; "
            "it is not ours and is left alone"
        )

    return make


def leftover_that_is_a_link(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / MARKER).touch()
    (folder / "mine" / "a").write_text("mine")
    (folder / "X.building").symlink_to(folder / "mine")
    return r"X\.building: expected no such file"


def no_place_for_it(folder):
    (folder / "Y").write_text("a file")
    (folder / "X").symlink_to(folder / "Y" / "Z")
    return "Z: expected a folder where a thing can be written"


@pytest.mark.parametrize(
    "damage",
    [
        *(foreign_file, foreign_folder, file_in_the_way, leftover_that_is_a_link, no_place_for_it),
        *(leftover_of_somebody(".building"), leftover_of_somebody(".old")),
    ],
)
def test_what_is_not_ours_is_refused_and_left_as_it_is(tmp_path, damage):
    said = damage(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=said):
        replace(tmp_path / "X", "new")
    assert tree(tmp_path) == before


def test_what_comes_while_it_is_written_is_not_replaced_either(tmp_path):
    replace(tmp_path / "X", "old")
    with (
        pytest.raises(InputError, match="found 'notes.txt'"),
        make(tmp_path / "X").building() as work,
    ):
        write(work, "new")
        (tmp_path / "X" / "notes.txt").write_text("mine")
    assert content(tmp_path / "X") == {"a": "old", "b": "old", "notes.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["X"]


def test_the_root_and_a_mount_point_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="/ is /; expected a folder that can be replaced"):
        make(Path("/"))
    replace(tmp_path / "X", "old")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "X")
    with pytest.raises(InputError, match="mount point"):
        replace(tmp_path / "X", "new")
    assert content(tmp_path / "X") == dict.fromkeys(NAMES, "old")


def test_an_error_leaves_the_old_folder_alone(tmp_path):
    replace(tmp_path / "X", "old")
    for error in (KeyboardInterrupt, OSError("disk full"), InputError("line 4")):
        with (
            pytest.raises((KeyboardInterrupt, InputError)),
            make(tmp_path / "X").building() as work,
        ):
            write(work, "half")
            raise error
        assert content(tmp_path / "X") == dict.fromkeys(NAMES, "old")
        assert [path.name for path in tmp_path.iterdir()] == ["X"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    replace(tmp_path / "X", "old")
    done: list[str] = []
    sync, rename = folder_swap.sync, Path.rename

    def synced(path: Path) -> None:
        done.append(path.name)
        sync(path)

    def renamed(path: Path, target: Path) -> None:
        done.append(f"{path.name} -> {target.name}")
        rename(path, target)

    monkeypatch.setattr(folder_swap, "sync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    replace(tmp_path / "X", "new")
    swap = ["X", "X -> X.old", "X.building -> X", tmp_path.name, "X.old -> X.building"]
    assert done == ["X.building", MARKER, "a", "b", "X.building", *swap]
