"""Preference losses: golden values, known answers, extremes, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit, ndtr

from lrm_jax import losses
from tests import helpers

SIGMA = np.float32(0.4)


def bradley_terry(gap, sigma, margin=0.0):
  return -log_expit(gap - margin)


def thurstone(gap, sigma):
  var = 2 * np.float64(sigma) ** 2 + 0.05
  return 1 - np.sqrt(ndtr(gap / np.sqrt(2 * var + 1e-6)) + 1e-6)


def thurstone_constant(gap, sigma):
  return 1 - np.sqrt(ndtr(gap / np.sqrt(2 * 0.5 + 1e-6)) + 1e-6)


# Name: (loss, the same in float64 numpy as a function of the gap).
CASES = {
  "bt": (losses.bradley_terry, bradley_terry),
  "bt-margin": (
    lambda *a: losses.bradley_terry(*a, margin=1.0),
    lambda *a: bradley_terry(*a, margin=1.0),
  ),
  "thurstone": (losses.thurstone, thurstone),
  "thurstone-constant": (losses.thurstone_constant, thurstone_constant),
}
each_loss = pytest.mark.parametrize("name", CASES)


def of_gap(loss):
  return lambda gap: loss(gap, jnp.zeros_like(gap), jnp.full_like(gap, SIGMA))


@each_loss
def test_golden_values(name):
  e = helpers.golden("dina/expected")
  args = e["loss/score_chosen"][:, 0], e["loss/score_reject"][:, 0], e["loss/sigma"]
  values = CASES[name][0](*args)
  assert values.shape == (16,) and values.dtype == jnp.float32
  np.testing.assert_allclose(values.mean(), e[f"loss/{name}"][0], rtol=1e-5)


@each_loss
def test_values_and_gradients(name):
  """Against float64, and against its central differences."""
  loss, reference = CASES[name]
  gap = np.linspace(-3, 3, 13)
  got = of_gap(loss)(jnp.asarray(gap, jnp.float32))
  np.testing.assert_allclose(got, reference(gap, SIGMA), rtol=1e-5, atol=1e-6)
  grad = jax.vmap(jax.grad(of_gap(loss)))(jnp.asarray(gap, jnp.float32))
  h = 1e-5
  slope = (reference(gap + h, SIGMA) - reference(gap - h, SIGMA)) / (2 * h)
  np.testing.assert_allclose(grad, slope, rtol=2e-4, atol=1e-6)


@each_loss
def test_extreme_gaps(name):
  """No overflow: the loss of a hopeless pair is its limit, its gradient finite."""
  f = of_gap(CASES[name][0])
  gap = jnp.array([-1e4, -50.0, 50.0, 1e4])
  value, grad = jax.vmap(jax.value_and_grad(f))(gap)
  worst = (1e4 if "bt" in name else 1 - 1e-3) + (name == "bt-margin")
  np.testing.assert_allclose(value[0], worst, rtol=1e-5)
  np.testing.assert_allclose(value[2:], 0, atol=2e-6)
  assert np.all(np.isfinite(grad)), grad
  assert np.all(np.asarray(grad) <= 0)  # a larger gap is never worse
  if "bt" in name:
    np.testing.assert_allclose(grad[:2], -1)


def test_moderate_losers_still_learn():
  """float32 torch rounds Phi to 0 below -5.5; here its digits survive."""
  grad = jax.grad(of_gap(losses.thurstone_constant))(jnp.float32(-5.6))
  pdf, p = np.exp(-0.5 * 5.6**2) / np.sqrt(2 * np.pi), ndtr(-5.6)
  np.testing.assert_allclose(grad, -pdf / (2 * np.sqrt(p + 1e-6)), rtol=1e-3)


def test_known_answers():
  zero = jnp.zeros(1)
  np.testing.assert_allclose(
    losses.bradley_terry(zero, zero, zero), np.log(2), rtol=1e-6
  )
  half = 1 - np.sqrt(0.5 + 1e-6)
  for loss in (losses.thurstone, losses.thurstone_constant):
    np.testing.assert_allclose(loss(zero, zero, zero), half, rtol=1e-5)


def test_symmetry():
  """Both orders' probabilities sum to 1, whatever the noise level."""
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((2, 32)).astype(np.float32)
  sigma = np.linspace(0, 1, 32, dtype=np.float32)
  there, back = losses.bradley_terry(a, b, sigma), losses.bradley_terry(b, a, sigma)
  np.testing.assert_allclose(np.exp(-there) + np.exp(-back), 1, rtol=1e-5)
  for loss in (losses.thurstone, losses.thurstone_constant):
    p, q = ((1 - np.asarray(v)) ** 2 for v in (loss(a, b, sigma), loss(b, a, sigma)))
    np.testing.assert_allclose(p + q, 1 + 2e-6, rtol=1e-5)


def test_noise_calibration():
  """The noisier the pair, the less a gap says."""
  one = jnp.ones(3)
  clean, middle, noisy = losses.thurstone(one, 0 * one, jnp.array([0.0, 0.5, 1.0]))
  assert clean < middle < noisy
  # sigma and base_var such that the variance is thurstone_constant's.
  same = losses.thurstone(one, 0 * one, one, noise_scale=0.3, base_var=0.2)
  np.testing.assert_allclose(same, losses.thurstone_constant(one, 0 * one, one))


@each_loss
def test_bfloat16_scores_are_compared_in_float32(name):
  a, b = jnp.array([3.0], jnp.bfloat16), jnp.array([1.0], jnp.bfloat16)
  loss = CASES[name][0]
  got = loss(a, b, jnp.array([SIGMA]))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, loss(jnp.array([3.0]), jnp.array([1.0]), jnp.array([SIGMA])), rtol=1e-6
  )


def test_table_names_every_loss():
  for name, loss in losses.LOSSES.items():
    assert loss is getattr(losses, name)


def test_pairwise_cross_entropy_of_ties_and_of_wins():
  """LRM: a win is Bradley-Terry's loss; a tie is least where the scores are equal."""
  gap = jnp.asarray([-3.0, -0.5, 0.0, 0.5, 3.0])
  zero = jnp.zeros_like(gap)
  win = losses.pairwise_cross_entropy(gap, zero, zero, jnp.ones_like(gap))
  np.testing.assert_allclose(win, losses.bradley_terry(gap, zero, zero), rtol=1e-6)
  tie = losses.pairwise_cross_entropy(gap, zero, zero, jnp.full_like(gap, 0.5))
  probability = 1 / (1 + np.exp(-np.asarray(gap, np.float64)))
  want = -0.5 * np.log(probability) - 0.5 * np.log(1 - probability)
  np.testing.assert_allclose(tie, want, rtol=1e-6)
  assert int(np.argmin(tie)) == 2 and np.isclose(tie[2], np.log(2))
  gradient = jax.grad(lambda g: losses.pairwise_cross_entropy(g, 0.0, 0.0, 0.5).sum())(
    jnp.float32(0.0)
  )
  assert float(gradient) == 0.0
  huge = losses.pairwise_cross_entropy(jnp.float32(-1e4), 0.0, 0.0, 0.5)
  assert np.isfinite(huge)
