"""Code and configuration come only from files that no other user can change."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from symmem.config import owned_files
from symmem.config.cluster import read_file
from symmem.config.kernel_tables import read_algorithms
from symmem.config.owned_files import UntrustedFileError, check_folder, make_folder, open_file, private_folder
from symmem.errors import ConfigError

NOBODY = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file below two folders, with modes that do not depend on the umask."""
    path = tmp_path / "a" / "b" / "file"
    path.parent.mkdir(parents=True)
    path.write_text("text")
    for each in (path, *path.parents[:2]):
        each.chmod(0o755)
    return path


def content(path: Path) -> str:
    with open(open_file(path)) as stream:
        return stream.read()


def test_a_file_of_this_user_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert content(file) == "text"
    descriptor = open_file(file)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    monkeypatch.chdir(file.parent)
    for relative in ("file", "./file", "../b/file", "..//b/./../b/file"):
        assert content(Path(relative)) == "text"


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775, 0o722, 0o702])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_others_can_write_is_refused(mode: int, depth: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file itself, its folder, and the folder above; owner and mode are in the text."""
    monkeypatch.setattr(owned_files, "_is_private_group", lambda group, user: False)
    changed = (file, *file.parents)[depth]
    changed.chmod(mode)
    expected = f"{changed} belongs to user {os.geteuid()} and has mode {mode:o}: other users can write to it"
    with pytest.raises(UntrustedFileError, match=re.escape(expected)):
        open_file(file)


def test_a_group_of_this_user_alone_can_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many systems make files with mode 664, and give every user a private group."""
    file.chmod(0o664)
    monkeypatch.setattr(owned_files, "_is_private_group", lambda group, user: True)
    assert content(file) == "text"
    file.chmod(0o666)
    with pytest.raises(UntrustedFileError):
        open_file(file)


@pytest.mark.parametrize(
    ("group", "members", "private"),
    [("me", [], True), ("me", ["me"], True), ("me", ["me", "other"], False), ("staff", [], False)],
)
def test_a_private_group(group: str, members: list[str], private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = owned_files.grp.struct_group((group, "x", 7, members))  # type: ignore[attr-defined]
    owner = owned_files.pwd.struct_passwd(("me", "x", 5, 7, "", "/", "/bin/sh"))  # type: ignore[attr-defined]
    monkeypatch.setattr(owned_files.grp, "getgrgid", lambda number: entry)  # type: ignore[attr-defined]
    monkeypatch.setattr(owned_files.pwd, "getpwuid", lambda number: owner)  # type: ignore[attr-defined]
    owned_files._is_private_group.cache_clear()
    assert owned_files._is_private_group(7, 5) is private
    owned_files._is_private_group.cache_clear()


@root
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_another_user_owns_is_refused(depth: int, file: Path) -> None:
    changed = (file, *file.parents)[depth]
    os.chown(changed, NOBODY, NOBODY)
    with pytest.raises(UntrustedFileError, match=re.escape(f"{changed} belongs to user {NOBODY} and has mode 755")):
        open_file(file)


def test_a_folder_with_the_sticky_bit_can_be_on_the_way(file: Path) -> None:
    file.parents[1].chmod(0o1777)
    assert content(file) == "text"
    check_folder(file.parent)
    with pytest.raises(UntrustedFileError):
        check_folder(file.parents[1])


@root
def test_below_a_sticky_folder_another_user_cannot_plant(file: Path) -> None:
    file.parents[1].chmod(0o1777)
    for planted in (file.parents[1] / "file", file.parents[1] / "link"):
        if planted.name == "link":
            planted.symlink_to(file)
        else:
            planted.write_text("planted")
        os.chown(planted, NOBODY, NOBODY, follow_symlinks=False)
        with pytest.raises(UntrustedFileError, match=f"{planted} belongs to user {NOBODY}"):
            open_file(planted)


def test_links_are_followed_and_checked(file: Path, tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (tmp_path / "folder").symlink_to("a/b")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    (open_to_all / "link").symlink_to(file)
    (open_to_all / "loop").symlink_to("loop")
    assert content(tmp_path / "link") == content(open_to_all / "link") == "text"
    with pytest.raises(OSError, match="symbolic links"):
        open_file(open_to_all / "loop")
    open_to_all.chmod(0o777)
    with pytest.raises(UntrustedFileError, match="mode 777"):
        open_file(open_to_all / "link")


def test_nothing_stays_open(file: Path) -> None:
    def number() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = number()
    for path in (file.parent, file / "x", file.parent / "missing", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"directory|regular"):
            open_file(path)
    os.close(open_file(file))
    check_folder(file.parent)
    with pytest.raises(NotADirectoryError):
        check_folder(file)
    assert number() == before


def test_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_folder(tmp_path / "x" / "y")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("x", "x/y")] == [0o700, 0o700]
    make_folder(tmp_path / "x" / "y")


def test_a_temporary_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_folder() as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    tmp_path.chmod(0o777)
    with pytest.raises(UntrustedFileError, match="mode 777"), private_folder():
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("read", "kind"), [(read_file, "cluster file"), (read_algorithms, "table of algorithms")])
def test_a_configuration_file_that_others_can_write_is_a_config_error(
    read: Callable[[str], object], kind: str, file: Path
) -> None:
    file.chmod(0o646)
    expected = f"cannot trust the {kind} '{file}': {file} belongs to user {os.geteuid()} and has mode 646"
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        read(str(file))
    assert "chmod go-w" in (caught.value.hint or "")
