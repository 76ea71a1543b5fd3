"""Image sizes that reward models are trained and asked at, and how to get there.

Sizes are (height, width) in pixels; Pillow's own order is the other one.
"""

import math

from PIL import Image

# DiNa-LRM's aspect-ratio buckets (arXiv 2602.11146).
BUCKETS = (
  (256, 256),
  (512, 512),
  (1024, 1024),
  (1248, 832),
  (1344, 896),
  (832, 1248),
  (896, 1344),
  (1024, 768),
  (768, 1024),
  (1472, 832),
  (832, 1472),
  (1152, 832),
  (832, 1152),
)
MAX_LOG_ASPECT_GAP = 0.03
# How much the two images of a pair may differ and still share one bucket.
MAX_LOG_PAIR_GAP = 0.05
# A smaller image is not blown up to its bucket: that would be a score of the blur.
MAX_ENLARGEMENT = 1.25  # along a side
MAX_AREA = max(height * width for height, width in BUCKETS)
# Eight pixels per latent cell, two cells per patch of SD3.5's transformer.
MULTIPLE = 16


def nearest_bucket(height: int, width: int) -> tuple[int, int] | None:
  """The bucket for an image: of nearest area among those of about its aspect ratio.

  "About" is within 3 % on the log scale; of equally near ones the first counts.
  Returns None where no bucket has such an aspect ratio (see `target_size`).

  Raises:
    ValueError: a side below 1.
  """
  if height < 1 or width < 1:
    raise ValueError(f"image size {height}x{width} must be at least 1x1")
  log_aspect = math.log(height / width)
  fitting = [
    (h, w)
    for h, w in BUCKETS
    if abs(math.log(h / w) - log_aspect) <= MAX_LOG_ASPECT_GAP
  ]
  if not fitting:
    return None
  return min(fitting, key=lambda size: abs(size[0] * size[1] - height * width))


def pair_size(
  first: tuple[int, int], second: tuple[int, int]
) -> tuple[int, int] | None:
  """The bucket that both images of a training pair are resized to.

  Each image has its own (`nearest_bucket`). Where these differ, but the aspect ratios
  by less than 5 % (on the log scale), the smaller one of the two is shared: neither
  image is enlarged for the other's sake, so that sharpness does not tell them apart.

  Returns None where a bucket is missing or the aspect ratios differ too much: the pair
  is not used.

  Raises:
    ValueError: a side below 1.
  """
  own = nearest_bucket(*first), nearest_bucket(*second)
  if None in own:
    return None
  gap = abs(math.log(first[0] / first[1]) - math.log(second[0] / second[1]))
  if own[0] != own[1] and gap >= MAX_LOG_PAIR_GAP:
    return None
  return min(own, key=lambda size: size[0] * size[1])


def target_size(
  height: int, width: int, *, multiple: int = MULTIPLE, resize: bool = True
) -> tuple[int, int]:
  """The size at which an image is scored.

  With `resize`, its bucket; where it fits none, or only one that is more than
  MAX_ENLARGEMENT larger, its own size, scaled down (never up) to the largest bucket's
  area, and rounded down to multiples of `multiple`. Without `resize`, its own size
  rounded down.

  Raises:
    ValueError: a side shorter than `multiple`.
  """
  scale = 1.0
  if resize:
    bucket = nearest_bucket(height, width)
    if bucket is not None and bucket[0] <= MAX_ENLARGEMENT * height:
      return bucket
    scale = min(1.0, math.sqrt(MAX_AREA / (height * width)))
  # The tiny addition keeps rounding from losing a whole multiple.
  down = lambda side: int(side * scale + 1e-6) // multiple * multiple  # noqa: E731
  size = down(height), down(width)
  if 0 in size:
    raise ValueError(
      f"an image of {height}x{width} pixels (height x width) is too small or too "
      f"narrow: a side would be shorter than {multiple}"
    )
  return size


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  """Scales an image to cover `size` and cuts what stands over, equally on both sides.

  Lanczos with Pillow's antialiasing; an image that already has the size is returned
  as it is.
  """
  height, width = size
  if image.size == (width, height):
    return image
  scale = max(width / image.width, height / image.height)
  w, h = width / scale, height / scale
  left, top = (image.width - w) / 2, (image.height - h) / 2
  box = (
    max(0.0, left),
    max(0.0, top),
    min(float(image.width), left + w),
    min(float(image.height), top + h),
  )
  return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  """Cuts `size` out of the middle, without resampling.

  Raises:
    ValueError: the image is smaller.
  """
  height, width = size
  if height > image.height or width > image.width:
    raise ValueError(
      f"cannot crop {height}x{width} out of {image.height}x{image.width} pixels"
    )
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))


def prepare(
  image: Image.Image, *, multiple: int = MULTIPLE, resize: bool = True
) -> Image.Image:
  """An image at its `target_size`: resampled for a bucket, else only cropped.

  Raises:
    ValueError: a side shorter than `multiple`.
  """
  own = (image.height, image.width)
  size = target_size(*own, multiple=multiple, resize=resize)
  only_crop = not resize or (
    nearest_bucket(*own) is None and own[0] * own[1] <= MAX_AREA
  )
  return center_crop(image, size) if only_crop else resize_and_crop(image, size)
