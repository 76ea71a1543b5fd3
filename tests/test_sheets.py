"""Contact sheets: every image where it belongs."""

import numpy as np
from PIL import Image
import pytest

from lrm_jax import sheets

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def plain(colour, size=(8, 8)) -> Image.Image:
  return Image.new("RGB", size, colour)


def centre(x: int, y: int, *, titled: bool) -> tuple[int, int]:
  """Of the cell in column x and row y, for square images."""
  step = sheets.THUMBNAIL + sheets.MARGIN
  top = sheets.MARGIN + sheets.CAPTION_HEIGHT * titled
  half = sheets.THUMBNAIL // 2
  return (
    sheets.LABEL_WIDTH + x * step + half,
    top + y * (step + sheets.CAPTION_HEIGHT) + half,
  )


@pytest.mark.parametrize("titled", [False, True])
def test_images_and_text_are_in_their_places(titled):
  rows = [
    ("a long prompt " * 90, [(plain(COLOURS[0]), "1.0"), (plain(COLOURS[1]), "")]),
    ("Fluß, 犬", [(plain(COLOURS[2]), "")]),
  ]
  sheet = sheets.draw(rows, ("0", "20") if titled else ())
  pixels = np.asarray(sheet)
  assert sheet.getpixel(centre(0, 0, titled=titled)) == COLOURS[0]
  assert sheet.getpixel(centre(1, 0, titled=titled)) == COLOURS[1]
  assert sheet.getpixel(centre(0, 1, titled=titled)) == COLOURS[2]
  assert sheet.getpixel(centre(1, 1, titled=titled)) == (255, 255, 255)
  x, y = centre(0, 0, titled=titled)
  half = sheets.THUMBNAIL // 2
  dark = (pixels < 128).all(axis=-1)
  # The caption, the labels; none of them in an image.
  assert dark[y + half : y + half + sheets.CAPTION_HEIGHT, x - half : x + half].any()
  for row in range(2):
    middle = centre(0, row, titled=titled)[1]
    assert dark[middle - half : middle + half, : sheets.LABEL_WIDTH].any()
  assert not dark[y - half : y + half, x - half : x + half].any()
  assert dark[: y - half, sheets.LABEL_WIDTH :].any() == titled


def test_large_images_shrink_and_small_ones_stay_sharp():
  wide = sheets.draw([("", [(plain(COLOURS[0], (640, 320)), "")])])
  assert wide.height == (
    sheets.THUMBNAIL // 2 + sheets.CAPTION_HEIGHT + 2 * sheets.MARGIN
  )
  board = Image.fromarray(np.indices((8, 8)).sum(axis=0).astype(np.uint8) % 2 * 255)
  sheet = np.asarray(sheets.draw([("", [(board, "")])]))
  x, y = centre(0, 0, titled=False)
  half = sheets.THUMBNAIL // 2
  cell = sheet[y - half : y + half, x - half : x + half]
  assert set(np.unique(cell)) == {0, 255}  # nothing in between


def test_no_images():
  with pytest.raises(ValueError, match="a contact sheet without images"):
    sheets.draw([("a cat", [])])
