"""Files that are replaced whole: nothing but files is ever replaced."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from mambakit.errors import UsageError
from mambakit.writing import replaceable, replacing


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(str(1 // 0))
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


def test_what_is_no_file_stays(tmp_path):
    """A rename over /dev/null, as root, would take it from every program. (Here pipes and sockets stand for
    devices.)"""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to(tmp_path / "pipe")
        for name in ("pipe", "socket", "link"):
            kind = stat.S_IFMT((tmp_path / name).lstat().st_mode)
            with pytest.raises(UsageError, match="is a device, a pipe or a socket"), replacing(tmp_path / name):
                raise AssertionError("written before it was refused")
            assert stat.S_IFMT((tmp_path / name).lstat().st_mode) == kind
    with pytest.raises(UsageError, match="is a device"):
        replaceable(os.devnull)


def test_a_link_goes_on_pointing_at_the_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "f")
    for content in ("one", "two"):
        with replacing(tmp_path / "link") as temporary:
            temporary.write_text(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "f").read_text() == content


@pytest.mark.parametrize("kind", ["State", "MambaCache"])
def test_saved_states_replace_no_device(kind, tmp_path):
    import torch

    from mambakit.generation.state import State
    from tests.models.configurations import pair

    model = pair("plain")[0]
    state = State.read(model, torch.tensor([1, 2, 3]))
    os.mkfifo(tmp_path / "pipe")
    save = (lambda path: state.save(path, model)) if kind == "State" else state.cache.save
    with pytest.raises(UsageError, match="is a device, a pipe or a socket"):
        save(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(UsageError, match=r"is a folder; give the name of a file"), replacing(tmp_path):
        raise AssertionError("written before it was refused")


def test_models_are_saved_in_folders(tmp_path):
    """transformers' own `save_pretrained` writes nothing to a file's name, and raises nothing."""
    from tests.models.configurations import pair

    model = pair("plain")[0]
    (tmp_path / "f").write_text("mine")
    for save in (model.save_pretrained, model.save_original):
        for place in (tmp_path / "f", tmp_path / "f" / "deeper"):
            with pytest.raises(UsageError, match=r"f is a file.*; name another folder"):
                save(place)
    with pytest.raises(UsageError, match="is a folder; give the name of a file"):
        model.save_gguf(tmp_path)
    assert (tmp_path / "f").read_text() == "mine"
