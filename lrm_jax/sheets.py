"""Contact sheets: images of prompts, side by side."""

from collections.abc import Sequence
import pathlib
import textwrap

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

THUMBNAIL = 160  # pixels of the longer side
LABEL_WIDTH, CAPTION_HEIGHT, FONT_SIZE, MARGIN = 220, 18, 12, 6


def draw(
  rows: Sequence[tuple[str, Sequence[tuple[Image.Image, str]]]],
  titles: Sequence[str] = (),
  *,
  columns: int | None = None,
) -> Image.Image:
  """One picture.

  Args:
    rows: a label, and images with their captions; images of one size.
    titles: of the columns.
    columns: room for so many; None: as many as the longest row has.

  Raises:
    ValueError: no images.
  """
  if not any(cells for _, cells in rows):
    raise ValueError("a contact sheet without images")
  # Pillow's own font has little more than English letters.
  fonts = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
  font = ImageFont.truetype(fonts / "DejaVuSans.ttf", FONT_SIZE)
  first = next(cells[0][0] for _, cells in rows if cells)
  cell_width, cell_height = thumbnail(first).size
  cell_width = max(cell_width, THUMBNAIL // 2)  # captions need some room
  step_x, step_y = cell_width + MARGIN, cell_height + CAPTION_HEIGHT + MARGIN
  columns = columns or max(len(cells) for _, cells in rows)
  top = MARGIN + (CAPTION_HEIGHT if titles else 0)
  size = (LABEL_WIDTH + columns * step_x, top + len(rows) * step_y)
  sheet = Image.new("RGB", size, "white")
  pen = ImageDraw.Draw(sheet)
  for x, title in enumerate(titles):
    pen.text((LABEL_WIDTH + x * step_x, MARGIN), title, "black", font)
  for y, (label, cells) in enumerate(rows):
    wrapped = textwrap.wrap(
      label,
      int(LABEL_WIDTH / (0.6 * FONT_SIZE)),  # a wide average letter
      max_lines=max(1, step_y // (FONT_SIZE + 4)),
      placeholder=" ...",
    )
    pen.multiline_text((MARGIN, top + y * step_y), "\n".join(wrapped), "black", font)
    for x, (image, caption) in enumerate(cells):
      left = LABEL_WIDTH + x * step_x
      sheet.paste(thumbnail(image), (left, top + y * step_y))
      pen.text((left, top + y * step_y + cell_height + 2), caption, "black", font)
  return sheet


def thumbnail(image: Image.Image) -> Image.Image:
  """The image in RGB, its longer side THUMBNAIL pixels."""
  # Enlarged pixels stay pixels.
  method = Image.NEAREST if max(image.size) < THUMBNAIL else Image.BICUBIC
  return ImageOps.contain(image.convert("RGB"), (THUMBNAIL, THUMBNAIL), method)
