"""Result files in the format that their name asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qlip.cli.console import UsageError
from qlip.cli.outputs import check_image_name, image_file, write_new
from qlip.errors import QLIPError


@pytest.mark.parametrize("name", ["x.png", "x.JPG", "x.webp", "x.tiff", "x.gif", "x.pdf"])
def test_check_image_name__formats_that_can_be_written(name: str) -> None:
    check_image_name(Path(name))


@pytest.mark.parametrize("name", ["x.blp", "x.txt", "x", "x.qlip", "x.xbm"])
def test_check_image_name__others_are_refused_before_any_work(name: str) -> None:
    with pytest.raises(UsageError, match="use .png"):
        check_image_name(Path(name))


@pytest.mark.parametrize("name", ["tall.webp", "tall.jpg"])
def test_image_file__size_limit_of_a_format_is_one_line(name: str) -> None:
    with pytest.raises(QLIPError, match=r"^tall\.\w+: \w+ cannot hold an image of 1 x 70000 pixels \(.*\); use .png$"):
        image_file(Path(name), Image.new("RGB", (1, 70_000)))


def test_write_new__symbolic_links_below_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sea").symlink_to("../elsewhere")
    (tmp_path / "named").symlink_to("out")  # a link that the user named is followed
    for folder in (tmp_path / "out", tmp_path / "named"):
        with pytest.raises(
            QLIPError, match=r"ship\.png: .*sea is a symbolic link, which is not followed; give another"
        ):
            write_new(folder / "sea" / "far" / "ship.png", b"1", True, folder=folder)
        write_new(folder / "land" / "cat.png", b"1", False, folder=folder)
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "out" / "dog.png").symlink_to("../elsewhere/dog.png")
    with pytest.raises(QLIPError, match="exists with other content"):
        write_new(tmp_path / "out" / "dog.png", b"1", False, folder=tmp_path / "out")
    write_new(tmp_path / "out" / "dog.png", b"1", True, folder=tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "out" / "dog.png").read_bytes() == b"1"
