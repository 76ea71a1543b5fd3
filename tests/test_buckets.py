"""Buckets: the published rule, and that every image ends at its target size."""

import math

import numpy as np
from PIL import Image
import pytest

from lrm_jax.data import buckets


def gradient(height: int, width: int) -> Image.Image:
  """Red is the column, green the row, both 0..1 over the image."""
  y, x = np.mgrid[:height, :width]
  rgb = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x], axis=-1)
  return Image.fromarray(rgb.round().astype(np.uint8))


@pytest.mark.parametrize("size", buckets.BUCKETS)
def test_a_bucket_is_its_own_bucket(size):
  assert buckets.nearest_bucket(*size) == size
  assert size[0] % buckets.MULTIPLE == size[1] % buckets.MULTIPLE == 0


def test_nearest_area_among_the_aspect_ratio():
  assert buckets.nearest_bucket(300, 300) == (256, 256)
  assert buckets.nearest_bucket(700, 700) == (512, 512)
  assert buckets.nearest_bucket(4000, 4000) == (1024, 1024)
  # 2:3 exists twice per orientation, with different areas.
  assert buckets.nearest_bucket(1248, 832) == (1248, 832)
  assert buckets.nearest_bucket(1300, 867) == (1344, 896)
  assert buckets.nearest_bucket(3000, 4000) == (768, 1024)


def test_three_percent_of_log_aspect_ratio():
  inside, outside = (round(10000 * math.exp(gap)) for gap in (0.0299, 0.0301))
  assert buckets.nearest_bucket(inside, 10000) == (1024, 1024)
  assert buckets.nearest_bucket(10000, inside) == (1024, 1024)
  assert buckets.nearest_bucket(outside, 10000) is None
  assert buckets.nearest_bucket(10000, outside) is None


def test_a_pair_shares_the_smaller_bucket():
  assert buckets.pair_size((1024, 1024), (900, 900)) == (1024, 1024)
  assert buckets.pair_size((1024, 1024), (512, 512)) == (512, 512)
  assert buckets.pair_size((512, 512), (1024, 1024)) == (512, 512)
  # Two buckets of one aspect ratio, and two of neighbouring ones (log gap 0.038).
  assert buckets.pair_size((1344, 896), (1248, 832)) == (1248, 832)
  assert buckets.pair_size((1152, 832), (1024, 768)) == (1024, 768)
  assert buckets.pair_size((832, 1152), (768, 1024)) == (768, 1024)


def test_pairs_that_share_no_bucket():
  assert buckets.pair_size((1024, 768), (768, 1024)) is None
  # An image without a bucket, even beside one of about the same aspect ratio.
  assert buckets.pair_size((1000, 1032), (1024, 1024)) is None
  # Within one bucket the aspect ratios may differ by up to 6 %.
  tall, wide = (round(1024 * math.exp(0.029)), 1024), (1024, round(1024 / 0.9714))
  assert buckets.pair_size(tall, wide) == (1024, 1024)
  # With two buckets, by less than 5 %.
  side = lambda gap: (round(100 * 1152 / math.exp(gap)), 83200)  # noqa: E731
  assert buckets.pair_size((1152, 832), side(0.0499)) == (1024, 768)
  assert buckets.pair_size((1152, 832), side(0.0501)) is None


def test_small_images_are_not_blown_up():
  assert buckets.target_size(240, 240) == (256, 256)
  assert buckets.target_size(840, 560) == (832, 560)  # its bucket is 1248 x 832
  assert buckets.target_size(64, 96, multiple=4) == (64, 96)


def test_without_a_bucket():
  # Its own size, rounded down; never enlarged.
  assert buckets.target_size(500, 1001) == (496, 992)
  # Scaled down to the largest bucket's area.
  height, width = buckets.target_size(2000, 4000)
  assert height * width <= buckets.MAX_AREA < (height + 16) * (width + 16)
  assert abs(width / height - 2) < 0.05
  assert buckets.target_size(33, 50, multiple=4, resize=False) == (32, 48)
  with pytest.raises(ValueError, match="10x900 pixels.*shorter than 16"):
    buckets.target_size(10, 900)
  with pytest.raises(ValueError, match="0x5"):
    buckets.target_size(0, 5)


@pytest.mark.parametrize(
  "size", [(300, 300), (512, 512), (900, 1345), (1000, 300), (2100, 4400), (35, 100)]
)
def test_prepare_gives_the_target_size(size):
  image = buckets.prepare(gradient(*size))
  assert (image.height, image.width) == buckets.target_size(*size)


def test_crops_are_central():
  # A 2:1 image covers a square: a quarter of its width goes on each side.
  out = np.asarray(buckets.resize_and_crop(gradient(400, 800), (256, 256)))
  assert abs(out[:, 0, 0].mean() - 63.75) < 1.5
  assert abs(out[:, -1, 0].mean() - 191.25) < 1.5
  assert out[0, 0, 1] < 2 and out[-1, 0, 1] > 253  # all of its height is there

  # Without resampling pixels are copied.
  image = gradient(35, 101)
  out = np.asarray(buckets.prepare(image, resize=False))
  np.testing.assert_array_equal(out, np.asarray(image)[1:33, 2:98])
  with pytest.raises(ValueError, match="cannot crop 64x64 out of 35x101"):
    buckets.center_crop(image, (64, 64))


def test_an_image_of_the_right_size_is_left_alone():
  image = gradient(512, 512)
  np.testing.assert_array_equal(np.asarray(buckets.prepare(image)), np.asarray(image))
