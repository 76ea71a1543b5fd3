"""Rollouts: golden latents, known answers of a Gaussian, schedules, keys."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import flow, sample
from lrm_jax.models import features
from tests import golden_models, helpers

EULER = sample.SAMPLERS["euler"]
SDE = sample.SAMPLERS["sde"]
CPS = sample.SAMPLERS["cps"]
each_sampler = pytest.mark.parametrize("name", sample.SAMPLERS)
each_stochastic = pytest.mark.parametrize("name", ["sde", "cps"])


@pytest.mark.parametrize("num_steps", [1, 7])
def test_exact_velocity_of_a_point_lands_on_it(num_steps):
  # All data at x0: v(x, sigma) = (x - x0) / sigma, along which Euler is exact.
  x0 = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  noise = jax.random.normal(jax.random.key(1), x0.shape)

  def velocity(inputs, x, sigma):
    return (x - inputs) / sigma[:, None, None, None]

  schedule = sample.make_schedule(flow.sampling_sigmas(num_steps, 3.0))
  out, _ = sample.rollout(velocity, x0, noise, schedule, sampler=EULER)
  np.testing.assert_allclose(out, x0, atol=2e-5)


def test_guidance_is_one_call_and_extrapolates():
  calls = []

  def velocity(inputs, x, sigma):
    calls.append(x.shape)
    return inputs[:, None, None, None] * jnp.ones_like(x)

  guided = sample.guide(velocity, 4.5)
  x = jnp.zeros((2, 2, 2, 1))
  v = guided((jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])), x, jnp.ones(2))
  assert calls == [(4, 2, 2, 1)]
  np.testing.assert_allclose(v[:, 0, 0, 0], [0.5 + 4.5 * 0.5, 3.0 - 4.5])


def test_golden_latents_six_steps_cfg():
  expected = helpers.golden("dina/expected")
  model = golden_models.transformer()
  cond = features.Cond(expected["prompt_embeds"], expected["pooled_prompt_embeds"])
  count = len(expected["prompt_embeds"])
  uncond = features.Cond(
    np.repeat(expected["negative_prompt_embeds"], count, axis=0),
    np.repeat(expected["negative_pooled_prompt_embeds"], count, axis=0),
  )

  @jax.jit
  def run(params, inputs, noise):
    def velocity(cond, x, sigma):
      return nnx.merge(model.graphdef, params)(x, 1000.0 * sigma, cond)[0]

    schedule = sample.make_schedule(flow.sampling_sigmas(6, 3.0))
    guided = sample.guide(velocity, 4.5)
    return sample.rollout(guided, inputs, noise, schedule, sampler=EULER)[0]

  with jax.default_matmul_precision("highest"):
    out = run(model.params, (cond, uncond), helpers.nhwc(expected["euler/init_noise"]))
  assert (
    helpers.rel_err(helpers.nchw(out), expected["euler/latents_6steps_cfg4.5"]) < 1e-4
  )


# --- a Gaussian, whose velocity is known -------------------------------------------
# With data N(mu, s0^2), x is N((1 - sigma) mu, var) and the velocity is linear in it.
# So is a step, and the sampler's mean and variance follow exactly.

MU = np.float32([[0.8, -0.5], [0.0, 2.0]])[..., None]  # (H W C)
S0 = np.float32([[0.3, 0.5], [1.0, 1.5]])[..., None]
NUM_SAMPLES = 4096


def gaussian_velocity(inputs, x, sigma):
  """E[eps - x0 | x] for data of mean and deviation `inputs`, per pixel."""
  mu, s0 = inputs
  sigma = sigma[:, None, None, None]
  excess = x - (1 - sigma) * mu
  var = (1 - sigma) ** 2 * s0**2 + sigma**2
  return sigma * excess / var - (mu + (1 - sigma) * s0**2 * excess / var)


@functools.partial(jax.jit, static_argnums=0)
def affine(transition, sigma, sigma_next, noise_level):
  """`x' = slope x + offset + std noise` of every step, read off the transition."""

  def mean_and_std(x):
    v = gaussian_velocity((MU, S0), x, sigma)
    return transition(x, v, sigma, sigma_next, noise_level)

  zeros = jnp.zeros((len(sigma), *MU.shape))
  offset, std = mean_and_std(zeros)
  return mean_and_std(zeros + 1)[0] - offset, offset, std


def exact_moments(sampler, schedule):
  """Mean and deviation (H W C) of what a sampler draws, without drawing."""
  at = schedule.sigma, schedule.sigma_next, schedule.noise_level
  steps = map(np.float64, affine(sampler.transition, *map(jnp.asarray, at)))
  mean, var = np.zeros(MU.shape), np.ones(MU.shape)
  for slope, offset, std in zip(*steps, strict=True):
    mean, var = slope * mean + offset, slope**2 * var + std**2
  return mean, np.sqrt(var)


def gaussian_schedule(num_steps, noise_level, shift=1.0):
  sigmas = flow.sampling_sigmas(num_steps, shift)
  return sample.make_schedule(sigmas, noise_level=noise_level)


@functools.cache
def gaussian_rollout(name):
  """Jitted `schedule -> (NUM_SAMPLES H W C)`."""

  @jax.jit
  def run(schedule, inputs, keys):
    x = sample.initial_noise(keys, MU.shape)
    return sample.rollout(
      gaussian_velocity, inputs, x, schedule, sampler=sample.SAMPLERS[name], keys=keys
    )[0]

  keys = jax.random.split(jax.random.key(0), NUM_SAMPLES)
  return lambda schedule: np.asarray(run(schedule, (MU, S0), keys))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
  "name, noise_level, bias",
  [
    ("euler", 0.0, 0.022),
    ("sde", 0.2, 0.021),
    ("sde", 0.7, 0.013),
    ("sde", 1.0, 0.010),
    ("cps", 0.3, None),
    ("cps", 0.7, None),
  ],
)
def test_samples_of_a_gaussian(name, noise_level, bias, shift):
  """200 steps end at mean mu and deviation s0, but for what discretisation costs.

  Samples against the exact moments within 5 standard errors of 4096 samples; the
  exact moments against mu and s0 within `bias`, relative. CPS is biased, see below.
  """
  schedule = gaussian_schedule(200, noise_level, shift)
  x = gaussian_rollout(name)(schedule)
  mean, std = exact_moments(sample.SAMPLERS[name], schedule)
  error = 5 * std / NUM_SAMPLES**0.5
  assert np.all(np.abs(x.mean(axis=0) - mean) < error)
  assert np.all(np.abs(x.std(axis=0, ddof=1) - std) < error / 2**0.5)

  np.testing.assert_allclose(mean, MU, atol=1e-4)
  if bias is None:
    assert np.all((std / S0 < 1) & (std / S0 > np.cos(noise_level * np.pi / 4) - 0.04))
  else:
    np.testing.assert_allclose(std, S0, rtol=bias)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("noise_level", [0.0, 0.2, 0.7, 1.0])
def test_discretisation_error_falls_with_the_steps(noise_level, shift):
  errors = []
  for num_steps in (25, 100, 400, 1600):
    mean, std = exact_moments(SDE, gaussian_schedule(num_steps, noise_level, shift))
    np.testing.assert_allclose(mean, MU, atol=1e-4)
    errors.append(np.max(np.abs(std / S0 - 1)))
  assert np.all(np.diff(errors) < 0), errors
  # First order, but for the first step of the SDE, where its noise is singular: that
  # one is wrong by a^4 / 8 at any number of steps, and more steps forget it better.
  assert errors[-1] < errors[0] / 8, errors
  assert errors[-1] < 0.005, errors


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_cps_does_not_keep_the_marginals(noise_level):
  """Its deviation converges to cos(a pi / 4) s0 instead: less diverse samples.

  The fresh noise has the variance sigma'^2 sin^2(a pi / 2) at any number of steps,
  against a pull of sigma^2 (1 - cos(a pi / 2)) towards the mean; of many steps with
  small slopes these balance at s0^2 sin^2 / (2 (1 - cos)) = s0^2 (1 + cos) / 2.
  """
  limit = np.cos(noise_level * np.pi / 4)
  errors = []
  for num_steps in (25, 100, 400, 1600):
    mean, std = exact_moments(CPS, gaussian_schedule(num_steps, noise_level))
    np.testing.assert_allclose(mean, MU, atol=1e-4)
    errors.append(np.max(np.abs(std / S0 - limit)))
  assert np.all(np.diff(errors) < 0), errors
  assert errors[-1] < 0.005, errors


# --- windows and trajectories ------------------------------------------------------


def toy_velocity(inputs, x, sigma):
  """Of x, of its neighbours, of sigma and of the inputs (b,): nothing special."""
  wave = jnp.sin(3 * x + inputs[:, None, None, None]) + 0.3 * jnp.roll(x, 1, axis=2)
  return wave * (0.5 + sigma[:, None, None, None])


def assert_close(got, want):
  """Equal up to rounding: other programs sum in another order."""
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


LATENT = (3, 4, 2)
NUM_STEPS = 6


def toy_inputs(b=3, seed=5):
  """keys (b,), noise (b H W C), the velocity's inputs (b,)."""
  keys = jax.random.split(jax.random.key(seed), b)
  return keys, sample.initial_noise(keys, LATENT), jnp.linspace(-1, 1, b)


@functools.cache
def toy_rollout(name):
  """Jitted `(schedule, keys, x, inputs) -> (x, Trajectory)`."""
  return jax.jit(
    lambda schedule, keys, x, inputs: sample.rollout(
      toy_velocity,
      inputs,
      x,
      schedule,
      sampler=sample.SAMPLERS[name],
      keys=keys,
      trajectory=True,
    )
  )


def toy_schedule(**options):
  return sample.make_schedule(flow.sampling_sigmas(NUM_STEPS, 3.0), **options)


@each_stochastic
def test_sde_window(name):
  keys, noise, inputs = toy_inputs()
  x, seen = toy_rollout(name)(toy_schedule(sde_window=(2, 4)), keys, noise, inputs)
  _, ode = toy_rollout("euler")(toy_schedule(), keys, noise, inputs)
  assert_close(seen.x[:3], ode.x[:3])
  assert np.abs(seen.x[3] - ode.x[3]).max() > 0.1

  # Behind the window the ODE goes on, from elsewhere.
  rest = toy_schedule()[4:]
  _, ode = toy_rollout("euler")(rest, keys, seen.x[4], inputs)
  assert_close(seen.x[4:], ode.x)
  np.testing.assert_array_equal(seen.x[-1], x)

  inside = np.array([False, False, True, True, False, False])
  np.testing.assert_array_equal(np.all(seen.log_prob != 0, axis=1), inside)
  assert np.all(seen.log_prob[~inside] == 0)


@each_stochastic
def test_noise_level_0_is_the_ode(name):
  keys, noise, inputs = toy_inputs()
  x, seen = toy_rollout(name)(toy_schedule(noise_level=0.0), keys, noise, inputs)
  want, ode = toy_rollout("euler")(toy_schedule(), keys, noise, inputs)
  assert ode.log_prob is None
  assert_close(x, want)
  np.testing.assert_array_equal(seen.log_prob, np.zeros((NUM_STEPS, 3)))


@each_stochastic
def test_stored_log_probs_are_the_likelihood(name):
  """Of the stored states, under the same velocity; with a noise level per step."""
  keys, noise, inputs = toy_inputs()
  schedule = toy_schedule(noise_level=np.linspace(0.9, 0.2, NUM_STEPS))
  x, seen = toy_rollout(name)(schedule, keys, noise, inputs)
  assert seen.x.shape == (NUM_STEPS + 1, 3, *LATENT)
  assert seen.log_prob.shape == (NUM_STEPS, 3)
  np.testing.assert_array_equal(seen.x[0], noise)
  np.testing.assert_array_equal(seen.x[-1], x)
  for i in range(NUM_STEPS):
    at = schedule.sigma[i], schedule.sigma_next[i], schedule.noise_level[i]
    v = toy_velocity(inputs, seen.x[i], jnp.full(3, at[0]))
    log_prob, mean, std = sample.likelihood(
      sample.SAMPLERS[name], seen.x[i], seen.x[i + 1], v, *at
    )
    np.testing.assert_allclose(seen.log_prob[i], log_prob, rtol=1e-4, atol=1e-6)
    if std > 0:
      drawn = (seen.x[i + 1] - mean) / std
      want = sample.step_noise(keys, i, jnp.arange(1), LATENT)[:, 0]
      np.testing.assert_allclose(drawn, want, atol=1e-4)


def test_draws_are_standard_normal_and_independent():
  """Per sample, step, candidate and use: no stream repeats another."""
  keys = jax.random.split(jax.random.key(1), 64)
  streams = [sample.initial_noise(keys, LATENT)]
  for i in range(3):
    streams += list(
      jnp.swapaxes(sample.step_noise(keys, i, jnp.arange(3), LATENT), 0, 1)
    )
  flat = np.stack([np.ravel(a) for a in streams])  # (10, 64 * 24)
  count = flat.shape[1]
  assert abs(flat.mean()) < 5 / flat.size**0.5
  assert abs(flat.var() - 1) < 5 * (2 / flat.size) ** 0.5
  correlation = np.corrcoef(flat) - np.eye(len(flat))
  assert np.abs(correlation).max() < 5 / count**0.5


def test_a_candidates_noise_does_not_depend_on_how_many_there_are():
  keys = jax.random.split(jax.random.key(1), 2)
  few = sample.step_noise(keys, 3, jnp.arange(2), LATENT)
  many = sample.step_noise(keys, 3, jnp.arange(5), LATENT)
  np.testing.assert_array_equal(few, many[:, :2])
  np.testing.assert_array_equal(
    sample.step_noise(keys, 3, jnp.array([4]), LATENT), many[:, 4:]
  )


def test_rollout_without_a_trajectory_is_the_same():
  keys, noise, inputs = toy_inputs()
  want, _ = toy_rollout("sde")(toy_schedule(), keys, noise, inputs)
  x, none = jax.jit(
    lambda schedule, keys, x, inputs: sample.rollout(
      toy_velocity, inputs, x, schedule, keys=keys
    )
  )(toy_schedule(), keys, noise, inputs)
  assert none is None
  assert_close(x, want)


def test_bfloat16_noise_and_velocity_give_float32_states():
  keys, noise, inputs = toy_inputs()
  low = noise.astype(jnp.bfloat16)

  def velocity(inputs, x, sigma):
    assert x.dtype == sigma.dtype == jnp.float32
    return toy_velocity(inputs, x, sigma).astype(jnp.bfloat16)

  x, seen = sample.rollout(
    velocity, inputs, low, toy_schedule(), keys=keys, trajectory=True
  )
  assert x.dtype == seen.x.dtype == seen.log_prob.dtype == jnp.float32
  np.testing.assert_array_equal(seen.x[0], low.astype(jnp.float32))


# --- a sample's key is all that its noise depends on -------------------------------


ORDER = np.random.default_rng(0).permutation(8)
SOME = (np.array([5]), np.arange(5), ORDER)  # rows of 8 samples


def on_8_devices(*arrays):
  """Their rows, one on each."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("data")
  return jax.device_put(arrays, jax.sharding.NamedSharding(mesh, spec))


def test_a_draw_depends_on_its_samples_key_only():
  """Not on the batch, the order in it, or the devices: bit for bit."""
  keys, noise, _ = toy_inputs(b=8)
  steps = sample.step_noise(keys, 2, jnp.arange(3), LATENT)
  assert len(np.unique(np.concatenate([noise[:, None], steps], axis=1))) == 4 * 8 * 24
  for rows in SOME:
    np.testing.assert_array_equal(sample.initial_noise(keys[rows], LATENT), noise[rows])
    np.testing.assert_array_equal(
      sample.step_noise(keys[rows], 2, jnp.arange(3), LATENT), steps[rows]
    )

  @jax.jit
  def draw(keys):
    return sample.initial_noise(keys, LATENT), sample.step_noise(
      keys, 2, jnp.arange(3), LATENT
    )

  out = draw(*on_8_devices(keys))
  assert all(len(a.sharding.device_set) == 8 for a in out)
  np.testing.assert_array_equal(out[0], noise)
  np.testing.assert_array_equal(out[1], steps)


@each_sampler
def test_a_sample_depends_on_its_own_key_only(name):
  run = toy_rollout(name)
  args = toy_inputs(b=8)
  schedule = toy_schedule()
  x, seen = run(schedule, *args)
  distances = np.abs(x[:, None] - x[None]).max(axis=(2, 3, 4))
  assert np.all(distances + np.eye(8) > 0.1)

  def check(out, rows):
    assert_close(out[0], x[rows])
    assert_close(out[1].x, seen.x[:, rows])
    if name != "euler":
      assert_close(out[1].log_prob, seen.log_prob[:, rows])

  for rows in SOME:
    check(run(schedule, *(a[rows] for a in args)), rows)
  out = run(schedule, *on_8_devices(*args))
  assert len(out[0].sharding.device_set) == 8
  check(out, np.arange(8))


# --- schedules ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "sde", "cps"])
def test_new_values_of_a_schedule_compile_nothing(name):
  traces = []

  def velocity(inputs, x, sigma):
    traces.append(x.shape)
    return toy_velocity(inputs, x, sigma)

  @jax.jit
  def run(schedule, keys, x, inputs):
    return sample.rollout(
      velocity, inputs, x, schedule, sampler=sample.SAMPLERS[name], keys=keys
    )[0]

  args = toy_inputs()
  outs = [
    run(sample.make_schedule(flow.sampling_sigmas(NUM_STEPS, shift), **options), *args)
    for shift in (3.0, 1.0)
    for options in (
      dict(noise_level=0.7),
      dict(noise_level=0.2, sde_window=(1, 3)),
      dict(noise_level=np.linspace(0, 1, NUM_STEPS), explore_window=(0, 2)),
    )
  ]
  assert run._cache_size() == 1 and len(traces) == 1
  distinct = {np.asarray(x).tobytes() for x in outs}
  assert len(distinct) == (2 if name == "euler" else 6)  # an ODE has only the sigmas


def test_schedule():
  sigmas = np.float32([1.0, 0.75, 0.5, 0.1, 0.0])
  schedule = sample.make_schedule(
    sigmas, noise_level=0.5, sde_window=(1, 3), explore_window=(0, 2)
  )
  assert len(schedule) == 4
  want = dict(
    sigma=sigmas[:-1],
    sigma_next=sigmas[1:],
    noise_level=np.float32([0, 0.5, 0.5, 0]),
    explore=np.array([True, True, False, False]),
    index=np.arange(4, dtype=np.int32),
  )
  part = schedule[2:4]
  assert len(part) == 2
  for name, value in want.items():
    assert getattr(schedule, name).dtype == value.dtype, name
    np.testing.assert_array_equal(getattr(schedule, name), value)
    np.testing.assert_array_equal(getattr(part, name), value[2:4])
  everywhere = sample.make_schedule(sigmas, noise_level=np.arange(1, 5) / 8)
  np.testing.assert_array_equal(
    everywhere.noise_level, np.float32([0.125, 0.25, 0.375, 0.5])
  )
  assert everywhere.explore.all()
  assert not sample.make_schedule(sigmas, explore_window=(2, 2)).explore.any()


def test_parts_of_a_schedule_are_the_whole():
  keys, noise, inputs = toy_inputs()
  run, schedule = toy_rollout("sde"), toy_schedule()
  want, _ = run(schedule, keys, noise, inputs)
  half, _ = run(schedule[:2], keys, noise, inputs)
  x, _ = run(schedule[2:], keys, half, inputs)
  np.testing.assert_array_equal(x, want)


def test_window_of():
  sigmas = np.array([1.0, 0.75, 0.5, 0.125, 0.0])
  assert sample.window_of(sigmas, 0.4, 0.8) == (0, 2)
  assert sample.window_of(sigmas, 0.5, 1.0) == (0, 2)
  assert sample.window_of(sigmas, 0.0, 0.125) == (2, 4)
  assert sample.window_of([1.0, 0.5, 0.0], 0.5, 0.5) == (0, 1)
  with pytest.raises(ValueError, match=r"no step arrives in \[0.2, 0.4\]"):
    sample.window_of(sigmas, 0.2, 0.4)


LINE = [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
  "sigmas, options, message",
  [
    ([[1.0, 0.0]], {}, r"sigmas of shape \(1, 2\)"),
    ([1.0], {}, r"sigmas of shape \(1,\)"),
    ([1.0, 0.25, 0.5], {}, r"decrease within \[0, 1\], got \[1.0, 0.25, 0.5\]"),
    ([0.5, 0.5], {}, r"decrease within \[0, 1\], got \[0.5, 0.5\]"),
    ([1.5, 0.5, 0.0], {}, r"decrease within \[0, 1\], got \[1.5, 0.5, 0.0\]"),
    ([1.0, 0.5, -0.5], {}, r"decrease within \[0, 1\], got \[1.0, 0.5, -0.5\]"),
    ([1.0, float("nan"), 0.0], {}, r"decrease within \[0, 1\], got \[1.0, nan, 0.0\]"),
    (LINE, dict(noise_level=1.5), r"noise_level=1.5 must be in \[0, 1\]"),
    (LINE, dict(noise_level=-0.5), r"noise_level=-0.5 must be in \[0, 1\]"),
    (LINE, dict(noise_level=float("nan")), r"noise_level=nan must be in \[0, 1\]"),
    (
      LINE,
      dict(noise_level=np.array([0.5] * 3)),
      r"noise_level=\[0.5, 0.5, 0.5\].*one or 2",
    ),
    (LINE, dict(sde_window=(1, 3)), "the SDE window 1:3 is outside .* 2 steps"),
    (LINE, dict(sde_window=(-1, 1)), "the SDE window -1:1 is outside .* 2 steps"),
    (LINE, dict(explore_window=(2, 1)), "the exploring window 2:1 is outside"),
    (LINE, dict(explore_window=(0, 9)), "the exploring window 0:9 is outside"),
  ],
)
def test_impossible_schedules(sigmas, options, message):
  with pytest.raises(ValueError, match=message):
    sample.make_schedule(np.array(sigmas), **options)


@each_stochastic
def test_a_stochastic_sampler_needs_keys(name):
  _, noise, inputs = toy_inputs()
  with pytest.raises(ValueError, match="draws noise: pass keys, one per sample"):
    sample.rollout(
      toy_velocity, inputs, noise, toy_schedule(), sampler=sample.SAMPLERS[name]
    )
