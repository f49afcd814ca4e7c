"""Result files in the format that their name asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qlip.cli.console import UsageError
from qlip.cli.outputs import check_image_name, image_file
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
