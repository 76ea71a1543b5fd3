"""Noise schedule and interpolation against the goldens; draws against known laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import flow
from tests import helpers

SHIFT = 3.0


@pytest.fixture(scope="module")
def expected():
  return helpers.golden("dina/expected")


def test_train_table(expected):
  table = flow.train_sigmas(SHIFT)
  np.testing.assert_allclose(table, expected["scheduler/train_sigmas"], atol=1e-6)
  np.testing.assert_allclose(
    1000 * table, expected["scheduler/train_timesteps"], rtol=1e-6
  )
  assert table.dtype == np.float32 and table[0] == 1 and np.all(np.diff(table) < 0)


@pytest.mark.parametrize("num_steps", [1, 4, 10, 28, 40, 50])
def test_sampling_table(expected, num_steps):
  sigmas = flow.sampling_sigmas(num_steps, SHIFT)
  np.testing.assert_allclose(
    sigmas, expected[f"scheduler/sigmas_{num_steps}"], atol=1e-6
  )
  np.testing.assert_allclose(
    1000 * sigmas[:-1], expected[f"scheduler/timesteps_{num_steps}"], rtol=1e-6
  )
  assert sigmas.shape == (num_steps + 1,) and sigmas[-1] == 0


def test_without_shift_the_grid_is_even():
  np.testing.assert_allclose(
    flow.train_sigmas(1.0, 10), np.arange(10, 0, -1) / 10, rtol=1e-6
  )
  np.testing.assert_allclose(
    flow.sampling_sigmas(4, 1.0, 4), [1, 0.75, 0.5, 0.25, 0], rtol=1e-6
  )
  assert flow.shift_sigma(0.5, 3.0) == 0.75  # 1.5 / 2


@pytest.mark.parametrize("num_steps", [0, -3])
def test_sampler_needs_a_step(num_steps):
  with pytest.raises(ValueError, match=f"num_steps={num_steps} must be >= 1"):
    flow.sampling_sigmas(num_steps, SHIFT)


def test_lookup_of_u(expected):
  table = flow.train_sigmas(SHIFT)
  sigma = flow.nearest_sigma(expected["reward/u"], table)
  np.testing.assert_allclose(sigma, expected["reward/sigma_of_u"], atol=1e-6)
  np.testing.assert_allclose(
    1000 * sigma, expected["reward/timestep_of_u"], rtol=1e-5, atol=1e-3
  )
  sigma = flow.nearest_sigma(expected["train/u"], table)
  np.testing.assert_allclose(sigma, expected["train/sigma"], atol=1e-6)


def test_lookup_takes_the_first_of_equals_and_any_shape():
  table = np.array([1.0, 0.5, 0.0], np.float32)
  u = np.array([[0.75, 0.25], [0.9, 0.0]], np.float32)
  np.testing.assert_array_equal(flow.nearest_sigma(u, table), [[1.0, 0.5], [1.0, 0.0]])
  assert flow.nearest_sigma(0.3, table) == 0.5


def test_indexed_lookup():
  table = np.array([1.0, 0.75, 0.5, 0.25], np.float32)
  u = np.array([0.0, 0.24, 0.25, 0.99, 1.0], np.float32)
  np.testing.assert_array_equal(
    flow.indexed_sigma(u, table), [1.0, 1.0, 0.75, 0.25, 0.25]
  )


def test_add_noise():
  rng = np.random.default_rng(0)
  x0, eps = rng.standard_normal((2, 3, 4, 5, 6))
  sigma = np.array([0.0, 0.25, 1.0], np.float32)
  x = flow.add_noise(jnp.asarray(x0), jnp.asarray(eps), sigma)
  np.testing.assert_allclose(x[0], x0[0], rtol=1e-6)
  np.testing.assert_allclose(x[1], 0.75 * x0[1] + 0.25 * eps[1], atol=1e-6)
  np.testing.assert_allclose(x[2], eps[2], rtol=1e-6)


def test_add_noise_is_float32_for_bfloat16_latents():
  x0 = jnp.full((1, 2, 2, 1), 100, jnp.bfloat16)
  x = flow.add_noise(x0, jnp.ones_like(x0), 0.001)
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x, 99.901, rtol=1e-6)


NUM = 20_000
# Quantile functions, increasing in q. `mode` falls with its uniform, hence 1 - q.
QUANTILES = {
  "uniform": ({}, lambda q: q),
  "logit_normal": (dict(mean=-0.5, std=1.5), None),
  "mode": (
    dict(scale=0.8),
    lambda q: q - 0.8 * (np.cos(np.pi * (1 - q) / 2) ** 2 - q),
  ),
  "power": (dict(exponent=3.0), lambda q: q**3),
  "constant": (dict(value=0.3), lambda q: 0.3 + 0 * q),
}
NORMAL_QUANTILES = {0.1: -1.281552, 0.25: -0.674490, 0.5: 0.0, 0.75: 0.674490}


@pytest.mark.parametrize("name", QUANTILES)
def test_quantiles(name):
  options, quantile = QUANTILES[name]
  u = flow.draw_u(jax.random.key(0), (NUM,), name, **options)
  assert u.shape == (NUM,) and u.dtype == jnp.float32
  assert 0 <= u.min() and u.max() <= 1
  for q, z in NORMAL_QUANTILES.items():
    if quantile is None:
      want = 1 / (1 + np.exp(-(options["mean"] + options["std"] * z)))
    else:
      want = quantile(q)
    # A share q of the draws lies below; its standard error is < 0.0036.
    if name != "constant":
      assert abs(float(jnp.mean(u <= want)) - q) < 0.015, (q, want)
    else:
      np.testing.assert_allclose(u, want)


def test_beta_moments():
  a, b = 2.0, 5.0
  u = flow.draw_u(jax.random.key(1), (NUM,), "beta", alpha=a, beta=b)
  assert abs(float(u.mean()) - a / (a + b)) < 0.005
  var = a * b / ((a + b) ** 2 * (a + b + 1))
  assert abs(float(u.var()) / var - 1) < 0.05


@pytest.mark.parametrize("name", flow.U_DISTRIBUTIONS)
def test_draws_under_jit_depend_on_the_key(name):
  draw = jax.jit(lambda key: flow.draw_u(key, (2, 3), name))
  first, again, other = (draw(jax.random.key(i)) for i in (0, 0, 1))
  assert first.shape == (2, 3)
  np.testing.assert_array_equal(first, again)
  assert name == "constant" or not np.any(first == other)


def test_unknown_distribution():
  with pytest.raises(ValueError, match="u distribution 'normal': use one of"):
    flow.draw_u(jax.random.key(0), (1,), "normal")
