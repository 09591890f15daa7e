"""common/files.py: a folder is the old one or the new one, whatever happens while it is replaced."""

import pytest

from common.errors import UserError
from common.files import atomic_folder, exclusive, recover_folder


def write(target, text, **options):
    with atomic_folder(target, **options) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)


def content(target):
    return (target / "sub" / "a.txt").read_text()


def test_a_folder_is_made_and_replaced(tmp_path):
    target = tmp_path / "new" / "model"
    write(target, "one")
    write(target, "two", hidden=False)
    assert content(target) == "two" and [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_failure_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    write(target, "one")
    with pytest.raises(OSError, match="full"), atomic_folder(target) as folder:
        (folder / "half.txt").write_text("half")
        raise OSError("full")
    assert content(target) == "one" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_replacement_that_was_killed_half_way(tmp_path):
    target, old = tmp_path / "model", tmp_path / ".model.old"
    write(target, "one")
    target.rename(old)  # the old folder has given up its name, the new one has not taken it
    recover_folder(target)
    assert content(target) == "one" and not old.exists()
    write(old, "older")  # the new folder has the name, the old one is not yet deleted
    recover_folder(target)
    assert content(target) == "one" and not old.exists()


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "disk" / "model", tmp_path / "model"
    write(real, "one")
    link.symlink_to(real, target_is_directory=True)
    for text in ("two", "three"):
        write(link, text)
        assert link.is_symlink() and content(real) == text


def test_one_holder_of_a_name(tmp_path):
    (tmp_path / ".model.abcdefgh.tmp").mkdir()
    with exclusive(tmp_path, "model", "busy"):
        assert not (tmp_path / ".model.abcdefgh.tmp").exists()  # left by a killed writer
        with exclusive(tmp_path, "other", "busy"):
            pass
        with (
            pytest.raises(UserError, match="another one writes"),
            exclusive(tmp_path, "model", "another one writes", 0),
        ):
            pass
