"""Image files to arrays."""

from collections.abc import Iterator, Sequence
import contextlib
import os
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import ExifTags, Image, ImageOps

# What Pillow turns into 8-bit RGB without losing the meaning of the values.
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# Pillow's decoders let through whatever their parsing of damaged files runs into.
DECODER_ERRORS = (
  EOFError,
  LookupError,
  MemoryError,
  OSError,
  RuntimeError,
  SyntaxError,
  TypeError,
  ValueError,
  struct.error,
  zlib.error,
  Image.DecompressionBombError,
)
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width

ImageLike = Image.Image | str | os.PathLike


class ImageError(ValueError):
  """An image that is missing, unreadable or of an unsupported kind."""


@contextlib.contextmanager
def _reading(path: str | os.PathLike) -> Iterator[None]:
  """Whatever a decoder stumbles over in a damaged file becomes an ImageError."""
  try:
    yield
  except ImageError:
    raise
  except FileNotFoundError as e:
    raise ImageError(f"image {path} does not exist") from e
  except DECODER_ERRORS as e:
    raise ImageError(f"image {path} cannot be read: {e or type(e).__name__}") from e


def open_image(image: ImageLike) -> Image.Image:
  """An image as upright 8-bit RGB: EXIF rotation applied, transparency on white.

  Raises:
    ImageError: missing, corrupt, or not an image of 8 bits per channel.
  """
  is_path = not isinstance(image, Image.Image)
  path = image if is_path else getattr(image, "filename", "") or "given as an object"
  with _reading(path):
    if is_path:
      image = Image.open(path)
    image.load()
    if image.mode not in IMAGE_MODES:
      raise ImageError(
        f"image {path} has mode {image.mode!r}: save it with 8 bits per channel first"
      )
    image = ImageOps.exif_transpose(image)
  if image.has_transparency_data:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    image = Image.alpha_composite(white, rgba)
  return image.convert("RGB")


def image_size(path: str | os.PathLike) -> tuple[int, int]:
  """(height, width) that `open_image` will find, from the head of the file alone.

  Raises:
    ImageError: missing, or no image. Damage behind the head is not found here.
  """
  with _reading(path), Image.open(path) as image:
    # Asked for the EXIF data of a PNG that has none in its head, Pillow decodes it all.
    looked_up = image.format != "PNG" or "exif" in image.info
    orientation = image.getexif().get(ExifTags.Base.Orientation) if looked_up else None
    width, height = image.size
  return (width, height) if orientation in SIDEWAYS else (height, width)


def to_array(image: Image.Image) -> np.ndarray:
  """8-bit RGB -> (height width 3) float32 in [-1, 1]."""
  return np.asarray(image, np.float32) / 127.5 - 1.0


def as_batch(
  images: Sequence[ImageLike] | np.ndarray | jax.Array,
) -> np.ndarray | jax.Array:
  """Images of one size as (b height width 3) floats in [-1, 1].

  Args:
    images: images or paths, or such an array, which is checked.

  Raises:
    ImageError: missing, corrupt, or not an image of 8 bits per channel.
    ValueError: no images, different sizes, or an array of another kind.
  """
  if not isinstance(images, np.ndarray | jax.Array):
    images = [open_image(image) for image in images]
    if not images:
      raise ValueError("images is empty")
    sizes = sorted({(image.height, image.width) for image in images})
    if len(sizes) > 1:
      listed = ", ".join(f"{h}x{w}" for h, w in sizes)
      raise ValueError(
        f"images of different sizes (height x width): {listed}. Encode each size on "
        "its own, or use score_images"
      )
    return np.stack([to_array(image) for image in images])
  if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
    raise ValueError(f"images of shape {images.shape} must be (b, height, width, 3)")
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images are {images.dtype}; they must be floats in [-1, 1]")
  low, high = float(images.min()), float(images.max())
  if not -1.001 <= low <= high <= 1.001:
    raise ValueError(f"images have values in [{low:g}, {high:g}], not in [-1, 1]")
  return images.astype(np.float32)
