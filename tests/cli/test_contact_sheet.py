"""Contact sheets show their images pixel for pixel."""

from __future__ import annotations

from PIL import Image

from qlip.cli.image import contact_sheet


def test_contact_sheet__shows_panels_pixel_for_pixel() -> None:
    original = Image.new("RGB", (8, 8), (100, 50, 0))
    rebuilt = Image.new("RGB", (8, 8), (90, 70, 100))
    exhibit = contact_sheet.comparison(original, rebuilt, "Ünï€ode name that is longer than its cell " * 3, "1.0 dB")
    assert exhibit.panels[2][1].getpixel((0, 0)) == (40, 80, 255)
    sheet = contact_sheet.draw([exhibit])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    factor = 384 // 8
    assert colours[(100, 50, 0)] == colours[(90, 70, 100)] == colours[(40, 80, 255)] == (8 * factor) ** 2


def test_heading__a_very_wide_image_does_not_widen_the_sheet() -> None:
    thin = Image.new("RGB", (20_000, 1), (100, 50, 0))
    strip = contact_sheet.heading("text", "detail", thin)
    assert strip.width < 2000 and strip.getpixel((contact_sheet.MARGIN, contact_sheet.MARGIN)) == (100, 50, 0)
