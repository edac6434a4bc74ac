"""A file is written whole or not at all."""

import pytest

from fairseq_stack.errors import InputError
from fairseq_stack.files import CannotWrite, write_whole, written_beside


def test_text_and_bytes_replace_what_is_there_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_whole(path, "first\n")
    write_whole(path, b"second\n")
    assert path.read_bytes() == b"second\n"
    write_whole(path, "not UTF-8: \udcff")
    assert path.read_bytes() == b"not UTF-8: \xff"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("failure", [InputError("of the source"), KeyboardInterrupt()])
def test_work_that_fails_leaves_what_was_there_and_nothing_else(failure, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(type(failure)) as raised:
        with written_beside(path) as beside:
            beside.write_text("half")
            raise failure
    assert raised.value is failure
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_the_message_names_the_field_or_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"^--output x cannot be written \(Not a directory\); make room or choose"):
        write_whole(tmp_path / "file" / "below" / "it", "", "--output x")
    with pytest.raises(InputError, match=rf"^{tmp_path}: cannot be written \(Is a directory\); "):
        with written_beside(tmp_path) as beside:
            beside.mkdir()
            beside.write_text("a folder takes no text")
