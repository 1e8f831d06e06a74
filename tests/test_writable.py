"""What cannot be written is refused before anything is compiled or read."""

import errno
import os
import tempfile

import pytest

from nanochat_jax import cli
from nanochat_jax.lm.runtime import new_folder, require_writable
from tiny import write_config


@pytest.fixture
def file(tmp_path):
    """A regular file, below which nothing can be written."""
    path = tmp_path / "file"
    path.touch()
    return path


def test_all_paths_that_cannot_be_written_are_named_and_nothing_is_made(file):
    folder = file.parent
    require_writable(folders=[folder, folder / "a" / "b"], files=[folder / "c", file])
    assert [*folder.iterdir()] == [file]
    with pytest.raises(ValueError, match="cannot be written") as error:
        require_writable(folders=[file / "x"], files=[folder, file / "y.png"])
    assert sorted(str(error.value).splitlines()) == sorted(
        f"{path}: cannot be written: {why}. Give another path."
        for path, why in {
            file / "x": f"{file} is a file",
            file / "y.png": f"{file} is a file",
            folder: "it is a folder",
        }.items()
    )


def test_the_reason_of_the_system_is_told(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for check in (new_folder, lambda path: require_writable(folders=[path])):
        with pytest.raises(ValueError, match=f"Read-only file system: {tmp_path}"):
            check(tmp_path / "new")


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--checkpoint-dir"),
        ("compare", "--output"),
        ("export", "--checkpoint", "RUN", "--output"),
        ("plot", "RUN", "--output"),
    ],
    ids=lambda words: words[0],
)
def test_commands_refuse_them_at_once(words, file, capsys):
    if words[0] in ("compare", "plot"):
        pytest.importorskip("matplotlib")
    end = {"export": "x.safetensors", "plot": "x.png"}.get(words[0], "x")
    settings = ("--config-file", write_config(file.parent))
    given = settings if words[0] in ("train", "compare") else ()
    with pytest.raises(SystemExit) as error:
        cli.main([*map(str, (*words, file / end, *given))])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert f"cannot be written: {file} is a file" in message
    assert "Traceback" not in message
