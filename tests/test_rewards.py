"""Rewards made of rewards: values, what is not finite, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import rewards

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 1), np.float32))
SIGMA = jnp.array([0.2, 0.5, 0.9])
BIAS = jnp.array([1.0, -2.0, 3.0])


def brightness(inputs, x, sigma):
  """inputs (n,)."""
  return jnp.mean(x, axis=(1, 2, 3)) + inputs


def contrast(inputs, x, sigma):
  """inputs {"gain": (n,)}; reads sigma."""
  return inputs["gain"] * jnp.std(x, axis=(1, 2, 3)) * (1 - sigma)


def in_bfloat16(inputs, x, sigma):
  return jnp.full(x.shape[:1], 1.0 + 2**-7, jnp.bfloat16)


def missing(inputs, x, sigma):
  """NaN or infinite where the inputs (n,) say so."""
  return inputs


BOTH = {"bright": (0.25, brightness), "contrast": (-3.0, contrast)}
BOTH_INPUTS = {"contrast": {"gain": BIAS + 1}, "bright": BIAS}


def numpy_scores():
  """brightness and contrast of BOTH_INPUTS, (n,) each."""
  x, bias = np.float64(X), np.float64(BIAS)
  contrasts = (bias + 1) * x.std(axis=(1, 2, 3)) * (1 - np.float64(SIGMA))
  return x.mean(axis=(1, 2, 3)) + bias, contrasts


def test_weighted_sum():
  bright, contrasts = numpy_scores()
  scores = rewards.weighted_sum(BOTH)(BOTH_INPUTS, X, SIGMA)
  assert scores.shape == (3,) and scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, 0.25 * bright - 3 * contrasts, rtol=1e-5)


def test_mean():
  bright, contrasts = numpy_scores()
  ensemble = rewards.mean([brightness, contrast, brightness])
  inputs = (BIAS, {"gain": BIAS + 1}, BIAS)
  scores = ensemble(inputs, X, SIGMA)
  assert scores.shape == (3,) and scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, (2 * bright + contrasts) / 3, rtol=1e-5)
  np.testing.assert_array_equal(ensemble(list(inputs), X, SIGMA), scores)


def test_one_of_one_is_itself():
  want = brightness(BIAS, X, SIGMA)
  alone = rewards.weighted_sum({"only": (1.0, brightness)})
  np.testing.assert_array_equal(alone({"only": BIAS}, X, SIGMA), want)
  np.testing.assert_array_equal(rewards.mean([brightness])([BIAS], X, SIGMA), want)


def test_bfloat16_scores_add_up_in_float32():
  terms = {name: (1.0, in_bfloat16) for name in "abc"}
  total = rewards.weighted_sum(terms)(dict.fromkeys("abc", BIAS), X, SIGMA)
  average = rewards.mean([in_bfloat16] * 3)([BIAS] * 3, X, SIGMA)
  assert total.dtype == average.dtype == jnp.float32
  # 3.0234375 takes more bits than bfloat16 has.
  np.testing.assert_array_equal(total, np.full(3, 3 * (1 + 2**-7), np.float32))
  np.testing.assert_allclose(average, np.full(3, 1 + 2**-7), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_score_that_is_not_finite_spoils_its_row_only(bad, weight):
  """Even with a weight of 0: 0 times NaN is NaN, and a broken reward is reported."""
  scores = BIAS.at[1].set(bad)
  total = rewards.weighted_sum({"a": (1.0, brightness), "b": (weight, missing)})
  average = rewards.mean([brightness, missing])
  for out in (
    total({"a": BIAS, "b": scores}, X, SIGMA),
    average((BIAS, scores), X, SIGMA),
  ):
    np.testing.assert_array_equal(np.isfinite(out), [True, False, True])


def test_infinities_of_both_signs_are_not_a_number():
  average = rewards.mean([missing, missing])
  out = average((jnp.full(3, jnp.inf), jnp.full(3, -jnp.inf)), X, SIGMA)
  assert np.isnan(out).all()


def test_under_jit_with_weights_as_arguments():
  """New weights compile nothing; inputs are any pytrees."""

  @jax.jit
  def score(weights, inputs, x, sigma):
    terms = {"bright": (weights[0], brightness), "contrast": (weights[1], contrast)}
    ensemble = rewards.mean([rewards.weighted_sum(terms), brightness])
    return ensemble((inputs, inputs["bright"]), x, sigma)

  bright, contrasts = numpy_scores()
  for weights in ([0.25, -3.0], [2.0, 0.5]):
    got = score(jnp.array(weights), BOTH_INPUTS, X, SIGMA)
    total = weights[0] * bright + weights[1] * contrasts
    np.testing.assert_allclose(got, (total + bright) / 2, rtol=1e-5)
  assert score._cache_size() == 1


def test_no_rewards():
  with pytest.raises(ValueError, match="a weighted sum of no rewards"):
    rewards.weighted_sum({})
  with pytest.raises(ValueError, match="an ensemble of no rewards"):
    rewards.mean([])


def test_inputs_that_do_not_fit():
  total = rewards.weighted_sum(BOTH)
  names = r"terms \['bright', 'contrast'\], its inputs \['bright', 'sharp'\]"
  with pytest.raises(ValueError, match=names):
    total({"bright": BIAS, "sharp": BIAS}, X, SIGMA)
  with pytest.raises(ValueError, match=r"its inputs \['bright'\]"):
    total({"bright": BIAS}, X, SIGMA)
  with pytest.raises(ValueError, match="2 rewards, but inputs for 1"):
    rewards.mean([brightness, contrast])([BIAS], X, SIGMA)
