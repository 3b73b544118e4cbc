"""A file of the user is replaced when what takes its place is complete, and else left alone."""

import os

import pytest

from ssp_jax.errors import InputError
from ssp_jax.runtime.files import replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    path.chmod(0o640)
    with replacing(path, "--out") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["out.jsonl"]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_it_alone(tmp_path, error, capsys):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(error), replacing(path, "--out") as file:
        file.write("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["out.jsonl"]
    with pytest.raises(error), replacing(path, "--out", keep=True) as file:
        file.write("half")
        file.flush()
        raise error
    kept = next(tmp_path.glob("*.unfinished"))
    assert kept.read_text() == "half" and str(kept) in capsys.readouterr().err
    assert path.read_text() == "old"


def test_nothing_is_kept_of_nothing(tmp_path):
    with pytest.raises(ValueError), replacing(tmp_path / "out", "--out", keep=True):
        raise ValueError
    assert names(tmp_path) == []


def test_the_files_of_others_beside_it_stay(tmp_path):
    other = tmp_path / f"out.{os.getpid()}-0.unfinished"
    other.write_text("somebody's")
    with replacing(tmp_path / "out", "--out") as file:
        file.write("new")
    assert other.read_text() == "somebody's" and (tmp_path / "out").read_text() == "new"


def test_a_link_stays_a_link(tmp_path):
    target = tmp_path / "far.jsonl"
    target.write_text("old")
    link = tmp_path / "link.jsonl"
    link.symlink_to(target)
    with replacing(link, "--out") as file:
        file.write("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_a_device_is_written_as_it_is(tmp_path):
    with replacing("/dev/null", "--out") as file:
        file.write("lost")
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("make", ["folder", "nowhere"])
def test_what_cannot_be_written_is_told_at_once(tmp_path, make):
    path = tmp_path if make == "folder" else tmp_path / "nowhere" / "out"
    with (
        pytest.raises(InputError, match="--out: expected a file that can be written"),
        replacing(path, "--out"),
    ):
        raise AssertionError("the body must not begin")
