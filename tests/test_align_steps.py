"""Experience of a toy policy, and the losses that learn from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import explore, flow, optim, sample
from lrm_jax.align import experience, lpo, policy_gradient, refl

LATENT = (4, 4, 2)
SCHEDULE = sample.make_schedule(flow.sampling_sigmas(5, 3.0), explore_window=(0, 4))
INPUTS = jnp.linspace(0.5, 1.5, 6)
KEYS = jax.vmap(jax.random.key)(jnp.arange(6))
X = sample.initial_noise(KEYS, LATENT)


def rows(a, x):
  return jnp.asarray(a).reshape(-1, *(1,) * (x.ndim - 1))


def policy(theta):
  """A velocity_fn with two parameters."""

  def velocity(inputs, x, sigma):
    return theta["a"] * jnp.tanh(x * rows(inputs, x)) + theta["b"] * x

  return velocity


THETA = {"a": jnp.float32(0.7), "b": jnp.float32(0.4)}


def bright(inputs, x, sigma):
  return 3.0 * x.mean(axis=(1, 2, 3)) - sigma


def sharp(inputs, x, sigma):
  return x.std(axis=(1, 2, 3)) * inputs


REWARDS = {"bright": bright, "sharp": sharp}
REWARD_INPUTS = {"bright": INPUTS, "sharp": INPUTS}


@functools.cache
def stepwise(chunk=None):
  run = jax.jit(
    lambda theta: experience.candidates(
      policy(theta),
      REWARDS,
      INPUTS,
      REWARD_INPUTS,
      X,
      SCHEDULE,
      explore.Explore(4, chunk=chunk),
      keys=KEYS,
    )
  )
  return run(THETA)


@functools.cache
def whole():
  finals = {
    name: functools.partial(lambda f, i, x: f(i, x, 0.0), REWARDS[name])
    for name in REWARDS
  }
  run = jax.jit(
    lambda theta: experience.samples(
      policy(theta), finals, INPUTS, REWARD_INPUTS, X, SCHEDULE, keys=KEYS
    )
  )
  return run(THETA)


def at_step(made, t):
  return jax.tree.map(lambda a: a[t], made.replace(scores={}))


# --- experience --------------------------------------------------------------------


def test_candidates_are_scored_at_their_own_noise_level():
  _, made = stepwise()
  assert made.x_next.shape == (5, 6, 4, *LATENT)
  for t in range(5):
    for name, reward in REWARDS.items():
      got = np.asarray(made.scores[name][t])
      if t == 4:  # outside the window
        assert np.isnan(got).all()
        continue
      flat = made.x_next[t].reshape(24, *LATENT)
      sigma = jnp.full(24, SCHEDULE.sigma_next[t])
      want = reward(jnp.repeat(INPUTS, 4), flat, sigma).reshape(6, 4)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_random_candidate_carries_on():
  x, made = stepwise()
  nexts = np.concatenate([made.x[1:], x[None]])
  distance = np.abs(made.x_next - nexts[:, :, None]).max(axis=(3, 4, 5))
  picked = distance.argmin(axis=2)
  np.testing.assert_allclose(distance.min(axis=2), 0, atol=1e-5)
  assert len(set(picked[:4].ravel())) > 1
  scores = np.asarray(made.scores["bright"])[:4]
  best = scores.argmax(axis=2)
  assert 0.05 < (picked[:4] == best).mean() < 0.7  # blind to the score


def test_chunks_change_nothing():
  for a, b in zip(
    jax.tree.leaves(stepwise()), jax.tree.leaves(stepwise(2)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_samples_are_rollouts():
  x, made = whole()
  want, _ = jax.jit(
    lambda: sample.rollout(policy(THETA), INPUTS, X, SCHEDULE, keys=KEYS)
  )()
  np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(made.x_next[:-1, :, 0], made.x[1:])
  np.testing.assert_allclose(made.scores["sharp"], sharp(INPUTS, x, 0.0), rtol=1e-5)


def test_advantages_are_normalised_before_they_are_added():
  _, made = stepwise()
  got = experience.advantages(made, {"bright": 1.0, "sharp": 0.2})
  want = sum(
    weight * policy_gradient.group_advantages(made.scores[name][:4])
    for name, weight in (("bright", 1.0), ("sharp", 0.2))
  )
  np.testing.assert_allclose(got[:4], want, rtol=1e-5)
  np.testing.assert_array_equal(got[4], 0)
  scaled = made.replace(scores={**made.scores, "sharp": 1e3 * made.scores["sharp"]})
  again = experience.advantages(scaled, {"bright": 1.0, "sharp": 0.2})
  np.testing.assert_allclose(again[:4], got[:4], atol=2e-3)


def test_advantages_of_samples_are_broadcast_over_their_steps():
  _, made = whole()
  got = experience.advantages(made, {"bright": 1.0}, group_size=3)
  want = policy_gradient.prompt_advantages(
    np.asarray(made.scores["bright"], np.float64), np.repeat([0, 1], 3)
  )
  np.testing.assert_allclose(got, np.broadcast_to(want[:, None], (5, 6, 1)), rtol=1e-3)
  with pytest.raises(ValueError, match="6 samples are not groups of 4"):
    experience.advantages(made, {"bright": 1.0}, group_size=4)


def test_taking_steps():
  _, made = stepwise()
  some = experience.take_steps(made, np.array([2, 0]))
  np.testing.assert_array_equal(some.x, made.x[jnp.array([2, 0])])
  np.testing.assert_array_equal(some.at.index, [2, 0])
  assert some.scores["bright"].shape == (2, 6, 4)
  assert experience.take_steps(whole()[1], [1]).scores["bright"].shape == (6,)


def test_one_candidate_teaches_nothing():
  with pytest.raises(ValueError, match="candidates=1"):
    experience.candidates(
      policy(THETA), {}, INPUTS, {}, X, SCHEDULE, explore.Explore(1), keys=KEYS
    )


# --- policy gradient ---------------------------------------------------------------


def objective(theta, made, t, advantages, *, reference=None, old=True, kl_coef=0.1):
  step = at_step(made, t)
  return policy_gradient.step_loss(
    policy(theta),
    None if reference is None else policy(reference),
    INPUTS,
    step.x,
    step.x_next,
    step.log_prob if old else None,
    advantages[t],
    step.at,
    clip_range=1e-2,
    kl_coef=kl_coef,
  )


@pytest.mark.parametrize("collect", [stepwise, whole], ids=["step", "flow"])
def test_first_ratio_is_one_and_the_kl_has_no_gradient(collect):
  _, made = collect()
  zeros = jnp.zeros(made.log_prob.shape)
  for t in range(5):
    run = jax.jit(
      jax.value_and_grad(
        lambda th, t=t: objective(th, made, t, zeros, reference=THETA), has_aux=True
      )
    )
    (_, metrics), gradient = run(THETA)
    assert abs(metrics["ratio"] - 1) < 2e-6 and metrics["clip_frac"] == 0
    assert metrics["kl"] < 1e-12
    for g in gradient.values():
      assert abs(g) < 1e-6


def test_without_old_log_probs_the_ratio_is_one_to_the_last_bit():
  _, made = stepwise()
  advantages = experience.advantages(made, {"bright": 1.0})
  _, metrics = jax.jit(lambda theta: objective(theta, made, 1, advantages, old=False))(
    THETA
  )
  assert metrics["ratio"] == 1 and metrics["approx_kl"] == 0


@pytest.mark.parametrize("collect", [stepwise, whole], ids=["step", "flow"])
def test_gradient_against_finite_differences(collect):
  _, made = collect()
  advantages = experience.advantages(
    made, {"bright": 1.0}, group_size=3 if collect is whole else None
  )

  # Away from the old policy and within the clip range, where the loss is smooth.
  def loss(theta, t):
    return objective(
      theta, made, t, advantages, reference={"a": 0.2, "b": 0.5}, kl_coef=0.3
    )[0]

  theta = jax.tree.map(lambda v: v + 1e-4, THETA)
  for t in (0, 2):
    value = jax.jit(functools.partial(loss, t=t))
    gradient = jax.grad(value)(theta)
    for name in theta:
      h = 5e-3
      up, down = ({**theta, name: theta[name] + s * h} for s in (1, -1))
      want = (float(value(up)) - float(value(down))) / (2 * h)
      np.testing.assert_allclose(gradient[name], want, rtol=0.03, atol=2e-4)


# --- learning ----------------------------------------------------------------------


def offset_policy(theta):
  return lambda inputs, x, sigma: jnp.tanh(x) + theta["a"]


def collect(theta, keys):
  x = sample.initial_noise(keys, LATENT)
  _, made = experience.candidates(
    offset_policy(theta),
    {"bright": bright},
    INPUTS,
    {"bright": INPUTS},
    x,
    SCHEDULE,
    explore.Explore(4),
    keys=keys,
  )
  return experience.take_steps(made, jnp.arange(4))


def grpo_gradient(theta, keys):
  made = collect(theta, keys)
  advantages = experience.advantages(made, {"bright": 1.0})

  def loss(theta, item):
    step, advantages = item
    return policy_gradient.step_loss(
      offset_policy(theta),
      None,
      INPUTS,
      step.x,
      step.x_next,
      step.log_prob,
      advantages,
      step.at,
      clip_range=1e-2,
    )

  return optim.mean_gradients(loss, theta, (made.replace(scores={}), advantages))[2]


def lpo_gradient(theta, keys):
  made = collect(theta, keys)

  def loss(theta, item):
    step, scores = item
    return lpo.step_loss(
      offset_policy(theta),
      offset_policy({"a": 0.0}),
      INPUTS,
      step.x,
      step.x_next,
      scores,
      step.at,
      threshold=0.05,
      beta=20.0,
    )

  items = (made.replace(scores={}), made.scores["bright"])
  return optim.mean_gradients(loss, theta, items)[2]


def refl_gradient(theta, keys):
  x = sample.initial_noise(keys, LATENT)
  stop = jax.random.randint(keys[0], (), 2, 5)
  velocity = offset_policy(theta)
  x = refl.rollout_until(velocity, INPUTS, x, SCHEDULE, stop)
  sigma = jnp.full(len(x), jnp.asarray(SCHEDULE.sigma)[stop])

  def loss(theta):
    return refl.loss(
      offset_policy(theta), lambda x0: bright(INPUTS, x0, 0.0), INPUTS, x, sigma
    )[0]

  return jax.grad(loss)(theta)


@pytest.mark.parametrize(
  ("gradient", "rate"),
  [(grpo_gradient, 2.0), (lpo_gradient, 0.3), (refl_gradient, 0.1)],
)
def test_updates_raise_the_reward(gradient, rate):
  @jax.jit
  def update(theta, keys):
    return jax.tree.map(lambda p, g: p - rate * g, theta, gradient(theta, keys))

  @jax.jit
  def mean_reward(theta):
    x, _ = sample.rollout(offset_policy(theta), INPUTS, X, SCHEDULE, keys=KEYS)
    return bright(INPUTS, x, 0.0).mean()

  theta = {"a": jnp.float32(0.0)}
  before = mean_reward(theta)
  for i in range(15):
    theta = update(theta, jax.random.split(jax.random.key(i), 6))
  # The velocity points from data to noise: brighter data, lower velocity.
  assert theta["a"] < -0.05 and mean_reward(theta) > before + 0.1


# --- LPO and ReFL ------------------------------------------------------------------


def test_first_lpo_gradient():
  """At the start the loss is log 2, its gradient -beta / 2 (grad best - grad worst)."""
  _, made = stepwise()
  step, scores = at_step(made, 1), made.scores["bright"][1]

  def loss(theta):
    return lpo.step_loss(
      policy(theta),
      policy(THETA),
      INPUTS,
      step.x,
      step.x_next,
      scores,
      step.at,
      threshold=-1.0,
      beta=5.0,
    )

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(THETA)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-5)
  assert metrics["valid"] == 1 and abs(metrics["margin"]) < 1e-6

  def margin(theta):
    pairs, _, _ = lpo.select_pairs(scores, 0.0)
    v = policy(theta)(INPUTS, step.x, jnp.full(6, step.at.sigma))
    logs = [
      sample.likelihood(
        sample.SDE,
        step.x,
        step.x_next[jnp.arange(6), pairs[:, i]],
        v,
        step.at.sigma,
        step.at.sigma_next,
        step.at.noise_level,
      )[0]
      for i in range(2)
    ]
    return jnp.mean(logs[0] - logs[1])

  want = jax.grad(margin)(THETA)
  for name in THETA:
    np.testing.assert_allclose(gradient[name], -2.5 * want[name], rtol=1e-4)


def test_lpo_without_valid_pairs_has_no_gradient():
  _, made = stepwise()
  for t, threshold in ((1, 2.0), (4, -1.0)):  # too high; a step that was not scored
    step, scores = at_step(made, t), made.scores["bright"][t]
    value, gradient = jax.value_and_grad(
      lambda theta, step=step, scores=scores, threshold=threshold: lpo.step_loss(
        policy(theta),
        policy({"a": 0.0, "b": 0.0}),
        INPUTS,
        step.x,
        step.x_next,
        scores,
        step.at,
        threshold=jnp.where(jnp.isfinite(scores).all(), threshold, 0.0),
      )[0]
    )(THETA)
    assert value == 0 and all(g == 0 for g in gradient.values())


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_rollout_until_a_step(sampler):
  common = dict(sampler=sample.SAMPLERS[sampler], keys=KEYS)
  _, seen = sample.rollout(
    policy(THETA), INPUTS, X, SCHEDULE, trajectory=True, **common
  )
  run = jax.jit(
    lambda stop: refl.rollout_until(policy(THETA), INPUTS, X, SCHEDULE, stop, **common)
  )
  for stop in (0, 3, 5):
    np.testing.assert_allclose(run(jnp.int32(stop)), seen.x[stop], rtol=1e-5, atol=1e-6)
  assert run._cache_size() == 1


def test_refl_gradient_passes_through_one_prediction():
  x = X + 0.3
  sigma = jnp.full(6, 0.4)
  reward = lambda x0: sharp(INPUTS, x0, 0.0)  # noqa: E731

  def loss(theta):
    return refl.loss(policy(theta), reward, INPUTS, x, sigma, target=1.5)[0]

  v = policy(THETA)(INPUTS, x, sigma)
  np.testing.assert_allclose(loss(THETA), 1.5 - reward(x - 0.4 * v).mean(), rtol=1e-6)
  gradient = jax.grad(loss)(THETA)
  for name in THETA:
    h = 1e-2
    up, down = ({**THETA, name: THETA[name] + s * h} for s in (1, -1))
    want = (float(loss(up)) - float(loss(down))) / (2 * h)
    np.testing.assert_allclose(gradient[name], want, rtol=1e-2)


def test_flow_matching_loss_is_zero_at_the_exact_velocity():
  x0, eps = jax.random.normal(jax.random.key(3), (2, 6, *LATENT))
  sigma = jnp.linspace(0.1, 0.9, 6)
  exact = lambda inputs, x, sigma: eps - x0  # noqa: E731
  assert refl.flow_matching_loss(exact, INPUTS, x0, eps, sigma) < 1e-12
  off = lambda inputs, x, sigma: eps - x0 + 0.5  # noqa: E731
  np.testing.assert_allclose(
    refl.flow_matching_loss(off, INPUTS, x0, eps, sigma), 0.25, rtol=1e-5
  )
