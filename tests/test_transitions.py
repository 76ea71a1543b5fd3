"""Transitions and their log-probabilities: golden steps, float64, gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import flow, sample
from tests import helpers

RL = helpers.golden("rl/expected")
SIGMAS, NOISE_LEVEL = RL["sigmas"], float(RL["noise_level"][0])
STEPS = range(len(SIGMAS) - 1)
# The original's CPS ends in a step without noise, of which no values are stored.
GOLDEN_STEPS = [("sde", i) for i in STEPS] + [("cps", i) for i in STEPS[:-1]]

each_sampler = pytest.mark.parametrize("name", ["sde", "cps"])
each_golden_step = pytest.mark.parametrize("name, i", GOLDEN_STEPS)


def golden_step(name: str, i: int) -> dict:
  """One step of a sampler, NHWC; both share `sample`, `velocity` and `noise`."""
  step = {
    key.split("/")[2]: jnp.asarray(helpers.nhwc(a)) if a.ndim == 4 else a
    for prefix in ("sde", name)
    for key, a in RL.items()
    if key.startswith(f"{prefix}/{i:02d}/")
  }
  if name == "sde":  # the original's std_dev_t; a Gaussian's deviation has the dt too
    step["std"] = step["std"][:1] * math.sqrt(SIGMAS[i] - SIGMAS[i + 1])
  return step


def levels(i: int, b: int | None = None):
  """sigma, sigma_next and noise level of a golden step: scalars, or (b,)."""
  values = np.float32([SIGMAS[i], SIGMAS[i + 1], NOISE_LEVEL])
  return values if b is None else np.repeat(values[:, None], b, axis=1)


@functools.cache
def jitted(name: str):
  return jax.jit(functools.partial(sample.likelihood, sample.SAMPLERS[name]))


# --- golden steps ------------------------------------------------------------------


def test_golden_schedule():
  sigmas = flow.sampling_sigmas(10, 3.0)
  assert helpers.rel_err(sigmas, SIGMAS) < 1e-6
  assert helpers.rel_err(1000 * sigmas[:-1], RL["timesteps"]) < 1e-6


@each_golden_step
def test_golden_transition(name, i):
  want = golden_step(name, i)
  mean, std = sample.SAMPLERS[name].transition(
    want["sample"], want["velocity"], *levels(i)
  )
  assert mean.dtype == std.dtype == jnp.float32
  assert helpers.rel_err(mean, want["mean"]) < 1e-5
  assert helpers.rel_err(std[None], want["std"]) < 1e-5
  x_next = mean + std * want["noise"]
  assert helpers.rel_err(x_next, want["prev_sample"]) < 1e-5


@each_golden_step
def test_golden_log_prob(name, i):
  """Of the stored draw, under the velocity that drew it and (SDE) under another."""
  want = golden_step(name, i)
  for suffix in ("", "_new") if name == "sde" else ("",):
    log_prob, mean, std = jitted(name)(
      want["sample"], want["prev_sample"], want["velocity" + suffix], *levels(i)
    )
    assert log_prob.shape == (3,) and log_prob.dtype == jnp.float32
    assert helpers.rel_err(mean, want["mean" + suffix]) < 1e-5
    assert helpers.rel_err(std[None], want["std"]) < 1e-5
    np.testing.assert_allclose(log_prob, want["log_prob" + suffix], rtol=1e-5)


@each_sampler
@pytest.mark.parametrize("i", [0, 4])
def test_scalar_and_vector_noise_levels_agree(name, i):
  want = golden_step(name, i)
  states = want["sample"], want["prev_sample"], want["velocity"]
  sampler = sample.SAMPLERS[name]
  one = sample.likelihood(sampler, *states, *levels(i))
  each = sample.likelihood(sampler, *states, *levels(i, b=3))
  assert one[2].shape == () and each[2].shape == (3, 1, 1, 1)
  for a, b in zip(one, each, strict=True):
    np.testing.assert_array_equal(*np.broadcast_arrays(a, b))


@each_sampler
def test_every_row_has_its_own_noise_levels(name):
  """Rows of different steps in one call, sigma = 1 among them."""
  rows = [golden_step(name, i) for i in (0, 3, 8)]
  at = np.stack([levels(i) for i in (0, 3, 8)], axis=1)
  states = [
    jnp.stack([row[key][j] for j, row in enumerate(rows)])
    for key in ("sample", "prev_sample", "velocity")
  ]
  log_prob, mean, std = jitted(name)(*states, *at)
  for j, row in enumerate(rows):
    assert helpers.rel_err(mean[j], row["mean"][j]) < 1e-5
    assert helpers.rel_err(std[j].reshape(1), row["std"]) < 1e-5
    np.testing.assert_allclose(log_prob[j], row["log_prob"][j], rtol=1e-5)


# --- what follows from the formulas ------------------------------------------------


def random_step(seed: int = 0, shape=(2, 3, 4, 2)):
  """x, v and the noise of a draw."""
  return jnp.asarray(
    np.random.default_rng(seed).standard_normal((3, *shape), np.float32)
  )


@each_sampler
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.6, 0.3), (0.2, 0.0)])
def test_without_noise_it_is_the_euler_step(name, sigma, sigma_next):
  x, v, _ = random_step()
  mean, std = sample.SAMPLERS[name].transition(x, v, sigma, sigma_next, 0.0)
  want, zero = sample.euler(x, v, sigma, sigma_next)
  np.testing.assert_allclose(want, x + v * np.float32(sigma_next - sigma), rtol=1e-6)
  np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)
  assert std == zero == 0


@pytest.mark.parametrize("name", sample.SAMPLERS)
def test_bfloat16_is_computed_in_float32(name):
  x, v, _ = random_step()
  low = [a.astype(jnp.bfloat16) for a in (x, v)]
  transition = sample.SAMPLERS[name].transition
  mean, std = transition(*low, jnp.bfloat16(0.75), jnp.bfloat16(0.5), 0.7)
  want, want_std = transition(*(a.astype(jnp.float32) for a in low), 0.75, 0.5, 0.7)
  assert mean.dtype == std.dtype == jnp.float32
  np.testing.assert_array_equal(mean, want)
  np.testing.assert_array_equal(std, want_std)


@each_sampler
def test_log_prob_of_bfloat16_is_computed_in_float32(name):
  mean, v, noise = random_step()
  x_next = (mean + 0.3 * noise).astype(jnp.bfloat16)
  log_prob = sample.SAMPLERS[name].log_prob
  low = log_prob(x_next, mean.astype(jnp.bfloat16), jnp.bfloat16(0.25))
  up = mean.astype(jnp.bfloat16).astype(jnp.float32)
  assert low.dtype == jnp.float32
  np.testing.assert_array_equal(
    low, log_prob(x_next.astype(jnp.float32), up, jnp.float32(0.25))
  )


def test_a_deterministic_sampler_has_no_likelihood():
  x, v, _ = random_step()
  with pytest.raises(ValueError, match="deterministic sampler has no log-prob"):
    sample.likelihood(sample.SAMPLERS["euler"], x, x, v, 0.5, 0.4)


def test_unknown_sampler():
  assert sample.find_sampler("cps") is sample.SAMPLERS["cps"]
  with pytest.raises(ValueError, match="'ddim': use one of euler, sde, cps"):
    sample.find_sampler("ddim")


# --- gradients ---------------------------------------------------------------------


def reference_log_prob(name, x, x_next, v, sigma, sigma_next, a):
  """What METHODS says, in float64 numpy; sigma < 1. Returns (b,)."""
  dt = sigma_next - sigma
  if name == "sde":
    s = a * math.sqrt(sigma / (1 - sigma))
    mean = x * (1 + s**2 / (2 * sigma) * dt)
    mean = mean + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * math.sqrt(-dt)
    density = np.exp(-((x_next - mean) ** 2) / (2 * std**2))
    values = np.log(density / (std * math.sqrt(2 * math.pi)))
  else:
    s = sigma_next * math.sin(a * math.pi / 2)
    noise_hat = x + (1 - sigma) * v
    mean = (1 - sigma_next) * (x - sigma * v)
    mean = mean + math.sqrt(sigma_next**2 - s**2) * noise_hat
    values = -((x_next - mean) ** 2)
  return values.mean(axis=(1, 2, 3))


def central_differences(f, at: np.ndarray, h: float = 1e-5) -> np.ndarray:
  """Gradient of a scalar function of a float64 array, element by element."""
  slope = np.zeros_like(at)
  for i in np.ndindex(at.shape):
    up, down = at.copy(), at.copy()
    up[i] += h
    down[i] -= h
    slope[i] = (f(up) - f(down)) / (2 * h)
  return slope


LEVELS = [(0.9, 0.7, 0.7), (0.5, 0.45, 1.0), (0.3, 0.1, 0.2)]
WEIGHT = np.array([1.0, -2.0])  # of the batch's rows, as advantages weigh them


@each_sampler
@pytest.mark.parametrize("at", LEVELS)
def test_gradient_with_respect_to_the_velocity(name, at):
  x, v, noise = random_step()
  sampler = sample.SAMPLERS[name]
  mean, std = sampler.transition(x, v + 0.1, *at)  # drawn under another velocity
  x_next = mean + std * noise

  def loss(v):
    return jnp.sum(WEIGHT * sample.likelihood(sampler, x, x_next, v, *at)[0])

  def reference(v):
    states = np.float64(x), np.float64(x_next)
    return np.sum(WEIGHT * reference_log_prob(name, *states, v, *at))

  value, slope = jax.value_and_grad(loss)(v)
  np.testing.assert_allclose(value, reference(np.float64(v)), rtol=1e-4)
  want = central_differences(reference, np.float64(v))
  assert np.linalg.norm(want) > 1e-3
  assert helpers.rel_err(slope, want) < 1e-4


@each_sampler
def test_gradient_with_respect_to_a_policys_parameters(name):
  """Through the network and one step: what a policy gradient follows."""
  x, _, noise = random_step()
  at, sampler = (0.6, 0.5, 0.7), sample.SAMPLERS[name]
  params = np.array([0.8, -0.3, 0.2])

  def policy(w, x, sigma, tanh):
    return tanh(w[0] * x + w[1] * sigma) + w[2] * x

  mean, std = sampler.transition(x, policy(params, x, at[0], np.tanh), *at)
  x_next = mean + std * noise

  @jax.jit
  def loss(w):
    v = policy(w, x, at[0], jnp.tanh)
    return jnp.sum(WEIGHT * sample.likelihood(sampler, x, x_next, v, *at)[0])

  def reference(w):
    states = np.float64(x), np.float64(x_next)
    v = policy(w, states[0], at[0], np.tanh)
    return np.sum(WEIGHT * reference_log_prob(name, *states, v, *at))

  want = central_differences(reference, params)
  assert np.linalg.norm(want) > 1e-3
  assert helpers.rel_err(jax.grad(loss)(np.float32(params)), want) < 1e-4


@each_sampler
def test_a_deterministic_step_has_no_gradient(name):
  """Zero, not NaN: of the velocity that took the step, and of another."""
  x, v, other = random_step()
  sampler = sample.SAMPLERS[name]
  mean, std = sampler.transition(x, v, 0.5, 0.4, 0.0)
  assert std == 0

  def loss(v, noise_level):
    return jnp.sum(sample.likelihood(sampler, x, mean, v, 0.5, 0.4, noise_level)[0])

  for velocity in (v, other):
    value, slope = jax.jit(jax.value_and_grad(loss))(velocity, 0.0)
    assert value == 0
    np.testing.assert_array_equal(slope, np.zeros_like(v))


@each_sampler
def test_deterministic_rows_beside_others(name):
  """A noise level of 0 in one row leaves the other rows as they are."""
  x, v, noise = random_step()
  sampler, a = sample.SAMPLERS[name], np.float32([0.0, 0.7])
  mean, std = sampler.transition(x, v, 0.5, 0.4, a)
  x_next = mean + std * noise

  def loss(v):
    return jnp.sum(sample.likelihood(sampler, x, x_next, v, 0.5, 0.4, a)[0])

  def alone(v):
    rows = x[1:], x_next[1:], v
    return jnp.sum(sample.likelihood(sampler, *rows, 0.5, 0.4, 0.7)[0])

  slope = jax.grad(loss)(v)
  np.testing.assert_array_equal(slope[0], np.zeros_like(v[0]))
  np.testing.assert_allclose(slope[1:], jax.grad(alone)(v[1:]), rtol=1e-5)
