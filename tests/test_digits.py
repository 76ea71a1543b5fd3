"""The quickstart's data: splits, prompts, degradations, pairs without leaks, judges."""

import numpy as np
from PIL import Image
import pytest

pytest.importorskip("sklearn")

from lrm_jax.data import digits


@pytest.fixture(scope="module")
def splits():
  return digits.load_splits(0)


@pytest.fixture(scope="module")
def annotator(splits):
  return digits.fit_annotator(splits.train)


def _samples(real, std, seed):
  """Noisy copies of real images stand in for a generator's samples."""
  noise = np.random.default_rng(seed).normal(0, std, real.images.shape)
  return digits.Labelled((real.images + noise).astype(np.float32), real.labels)


def _pairs(real, annotator, seed, num=200):
  return digits.make_pairs(
    real,
    _samples(real, 0.8, seed),
    _samples(real, 0.3, seed + 1),
    annotator=annotator,
    num=num,
    rng=np.random.default_rng(seed),
  )


def test_splits_are_disjoint_complete_and_stratified(splits):
  parts = (splits.train, splits.oracle, splits.held_out)
  assert [len(part) for part in parts] == [900, 497, 400]
  images = np.concatenate([part.images for part in parts]).reshape(1797, 64)
  assert len(np.unique(images, axis=0)) == 1797  # the digits hold no duplicates
  assert images.dtype == np.float32 and images.min() == -1 and images.max() == 1
  share = np.bincount(np.concatenate([part.labels for part in parts])) / 1797
  for part in parts:
    counts = np.bincount(part.labels, minlength=10)
    assert np.abs(counts - share * len(part)).max() < 1.5


def test_splits_follow_the_seed(splits):
  again = digits.load_splits(0)
  np.testing.assert_array_equal(again.train.images, splits.train.images)
  other = digits.load_splits(1)
  assert (other.train.images != splits.train.images).any()


def test_latents_round_trip(splits):
  images = splits.train.images[:5]
  latents = digits.to_latent(images, 4)
  assert latents.shape == (5, 8, 8, 4)
  np.testing.assert_array_equal(digits.from_latent(latents), images)


def test_prompts():
  assert digits.PROMPTS[0] == "" and len(set(digits.PROMPTS)) == 41
  assert "a handwritten digit seven" in digits.prompts_for(7)
  for digit in range(10):
    for template, prompt in enumerate(digits.prompts_for(digit)):
      index = digits.prompt_id(digit, template)
      assert digits.PROMPTS[index] == prompt
      assert digits.PROMPT_DIGITS[index] == digit
  assert digits.PROMPT_DIGITS[0] == -1
  with pytest.raises(ValueError, match="digit 10"):
    digits.prompts_for(10)


def test_word_embedder():
  embedder = digits.WordEmbedder(8, 16)
  context, pooled = embedder.context(digits.PROMPTS), embedder.pooled(digits.PROMPTS)
  assert context.shape == (41, 6, 8) and pooled.shape == (41, 16)
  assert context.dtype == pooled.dtype == np.float32
  assert not context[0].any() and not pooled[0].any()
  assert len(np.unique(context.reshape(41, -1), axis=0)) == 41
  assert len(np.unique(pooled, axis=0)) == 41
  # "the number {}": the first two words are shared, the third is the digit's.
  one, two = digits.prompt_id(1, 1), digits.prompt_id(2, 1)
  np.testing.assert_array_equal(context[one, :2], context[two, :2])
  assert (context[one, 2] != context[two, 2]).all() and not context[one, 3:].any()
  again = digits.WordEmbedder(8, 16)
  np.testing.assert_array_equal(again.context(digits.PROMPTS), context)
  assert 0.7 < pooled[1:].std() < 1.3
  with pytest.raises(ValueError, match="unknown word 'eleven'"):
    embedder.context(["the number eleven"])
  with pytest.raises(ValueError, match="has 7 words"):
    embedder.pooled(["the the the the the the the"])


@pytest.mark.parametrize("kind", [None, *digits.DEGRADATIONS])
def test_strong_degradation_is_farther_than_mild(splits, kind):
  images = splits.train.images[:200]
  mild = digits.degrade(images, "mild", np.random.default_rng(0), kind)
  strong = digits.degrade(images, "strong", np.random.default_rng(0), kind)
  again = digits.degrade(images, "mild", np.random.default_rng(0), kind)
  np.testing.assert_array_equal(mild, again)
  for spoilt in (mild, strong):
    assert spoilt.dtype == np.float32 and np.abs(spoilt).max() <= 1
  far = np.linalg.norm((strong - images).reshape(200, -1), axis=1)
  near = np.linalg.norm((mild - images).reshape(200, -1), axis=1)
  assert near.min() > 0
  assert far.mean() > 1.5 * near.mean()
  if kind is not None:
    assert (far > near).mean() > 0.99


def test_degrade_refuses_unknown_kinds(splits):
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match="unknown kind 'rust'"):
    digits.degrade(splits.train.images[:1], "mild", rng, "rust")


def _find(images, pool):
  """For each image its index in the pool, or -1."""
  index = {image.tobytes(): i for i, image in enumerate(pool)}
  return np.array([index.get(image.tobytes(), -1) for image in images])


def test_pairs_are_of_four_equal_kinds_and_right(splits, annotator):
  real, pairs = splits.train, _pairs(splits.train, annotator, 0)
  assert np.bincount(pairs.kind).tolist() == [50] * 4
  wanted = np.array(digits.PROMPT_DIGITS)[pairs.prompt_id]
  assert wanted.min() >= 0 and len(np.unique(wanted)) == 10

  kind = pairs.kind == digits.KIND_NAMES.index("wrong_digit")
  chosen, rejected = (
    _find(x[kind], real.images) for x in (pairs.chosen, pairs.rejected)
  )
  assert (real.labels[chosen] == wanted[kind]).all()
  assert (real.labels[rejected] != wanted[kind]).all() and rejected.min() >= 0

  kind = pairs.kind == digits.KIND_NAMES.index("early_sample")
  early = _samples(real, 0.8, 0)
  rejected = _find(pairs.rejected[kind], early.images)
  assert (real.labels[_find(pairs.chosen[kind], real.images)] == wanted[kind]).all()
  assert rejected.min() >= 0 and (early.labels[rejected] == wanted[kind]).all()

  kind = pairs.kind == digits.KIND_NAMES.index("ranked_samples")
  samples = _samples(real, 0.3, 1)
  for images in (pairs.chosen, pairs.rejected):
    found = _find(images[kind], samples.images)
    assert found.min() >= 0 and (samples.labels[found] == wanted[kind]).all()
  better = annotator(pairs.chosen[kind], wanted[kind])
  assert (better > annotator(pairs.rejected[kind], wanted[kind])).all()

  again = _pairs(real, annotator, 0)
  np.testing.assert_array_equal(again.chosen, pairs.chosen)
  np.testing.assert_array_equal(again.prompt_id, pairs.prompt_id)


def test_held_out_pairs_contain_no_training_image(splits, annotator):
  train = _pairs(splits.train, annotator, 0)
  held_out = _pairs(splits.held_out, annotator, 10)
  digits.check_no_leak(train, held_out)
  both = np.concatenate([held_out.chosen, held_out.rejected])
  assert (_find(both, splits.train.images) == -1).all()
  with pytest.raises(ValueError, match="in both the training and held-out"):
    digits.check_no_leak(train, _pairs(splits.train, annotator, 0, num=4))


def test_make_pairs_refuses_what_it_cannot_use(splits, annotator):
  with pytest.raises(ValueError, match="num=10 does not split"):
    _pairs(splits.train, annotator, 0, num=10)
  sevens = splits.train.labels != 7
  lacking = digits.Labelled(splits.train.images[sevens], splits.train.labels[sevens])
  with pytest.raises(ValueError, match="real: 0 images of 7"):
    _pairs(lacking, annotator, 0)
  with pytest.raises(ValueError, match="score the same"):
    _pairs(splits.train, lambda images, _: np.zeros(len(images)), 0)


def test_annotator_and_oracle_read_held_out_digits(splits, annotator):
  images, labels = splits.held_out.images, splits.held_out.labels
  scores = np.stack([annotator(images, np.full(400, d)) for d in range(10)], axis=1)
  assert (scores.argmax(1) == labels).mean() > 0.93
  np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-9)

  oracle = digits.Oracle(splits.oracle)
  assert oracle.correct(images, labels).mean() > 0.96
  assert oracle.correct(images, (labels + 1) % 10).mean() < 0.04
  probs = np.stack([oracle.prob(images, np.full(400, d)) for d in range(10)], axis=1)
  np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-9)
  assert (probs.argmax(1) == labels).mean() > 0.95
  assert probs[np.arange(400), labels].mean() > 0.85


def test_annotator_does_not_saturate(annotator, splits):
  # A probability would round to 1 for both; the ranking must survive.
  image = splits.train.images[splits.train.labels == 0][:1]
  images = np.concatenate([image * 30, image * 31]).astype(np.float32)
  scores = annotator(images, np.zeros(2, np.int64))
  assert (np.exp(scores) == 1).all() and scores[0] != scores[1]


def test_frechet_distance_of_gaussians():
  rng = np.random.default_rng(0)
  a = rng.standard_normal((500, 8, 8))
  assert digits.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
  # A shift by s in each of 64 pixels: 64 s^2, whatever the covariance.
  assert digits.frechet_distance(a, a + 0.5) == pytest.approx(16)
  # Stretching by 3: tr(S + 9 S - 6 S) = 4 tr S, plus the mean's 4 |mu|^2.
  flat = a.reshape(500, 64)
  stretched = 4 * (np.trace(np.cov(flat, rowvar=False)) + flat.mean(0) @ flat.mean(0))
  assert digits.frechet_distance(a, 3 * a) == pytest.approx(stretched)
  # A dead pixel (singular covariance) is no obstacle.
  a[:, 0, 0] = 0
  assert digits.frechet_distance(a, a + 0.5) == pytest.approx(16)


def test_diversity():
  images = np.zeros((6, 8, 8), np.float32)
  prompts = np.array([4, 4, 4, 9, 9, 9])
  assert digits.diversity(images, prompts) == 0
  images[0] += 1  # prompt 4: distances 8, 8, 0
  assert digits.diversity(images, prompts) == pytest.approx(8 / 3)
  with pytest.raises(ValueError, match="prompt 5 has one sample"):
    digits.diversity(images, np.array([4, 4, 4, 9, 9, 5]))


def test_save_grid(tmp_path, splits):
  digits.save_grid(tmp_path / "grid.png", splits.train.images[:12])
  grid = np.asarray(Image.open(tmp_path / "grid.png")) / 255
  assert grid.shape == (2 * 9 * 6, 10 * 9 * 6)
  # Paper (-1) is white, ink dark.
  pixels = splits.train.images[0]
  top_left = grid[:48:6, :48:6]
  np.testing.assert_allclose(top_left, (1 - pixels) / 2, atol=0.01)


# --- pictures ----------------------------------------------------------------------


def test_pixels_are_pictures_of_latents(splits):
  latents = digits.to_latent(np.full((1, 8, 8), -1, np.float32), 4)
  latents[0, 0, :4, 0] = (1, 2, 3, 99)  # channels are averaged, and cut at 1
  latents[0, 1, 0] = 1
  latents[0, 2, 0] = 0
  pixels = digits.to_pixels(latents)
  assert pixels.dtype == np.uint8 and pixels.shape == (1, 8, 8, 3)
  assert np.all(pixels == pixels[..., :1])  # grey
  grey = pixels[0, ..., 0]
  # (1 - 3) / 4 = -0.5 is 191.25; then -0.25, 0, and 24, which is ink.
  assert grey[0, :5].tolist() == [191, 159, 128, 0, 255]
  assert grey[1, 0] == 0 and grey[2, 0] == 128 and grey[7, 7] == 255

  images = splits.held_out.images
  back = digits.from_pixels(digits.to_pixels(digits.to_latent(images, 4)))
  assert back.dtype == np.float32
  np.testing.assert_allclose(back, images, atol=1.001 / 255)


def test_the_oracle_as_a_reward_on_pixels(splits):
  images, labels = splits.held_out.images[:60], splits.held_out.labels[:60]
  pixels = digits.to_pixels(digits.to_latent(images, 1))
  asked = [digits.PROMPTS[digits.prompt_id(d, i % 4)] for i, d in enumerate(labels)]
  right = digits.oracle_probability(pixels, asked)
  others = [digits.PROMPTS[digits.prompt_id((d + 1) % 10, 0)] for d in labels]
  wrong = digits.oracle_probability(pixels, others)
  assert right.shape == (60,) and right.mean() > 0.8 and wrong.mean() < 0.1
  oracle = digits._default_oracle()  # of split 0, which `splits` is
  np.testing.assert_allclose(right, oracle.prob(images, labels), atol=0.02)
  for prompt in ("", "a cat"):
    with pytest.raises(ValueError, match="the oracle knows no digit of the prompts"):
      digits.oracle_probability(pixels[:1], [prompt])
