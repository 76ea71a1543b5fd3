"""Objectives of alignment: golden values, vanilla gradients, degenerate groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import sample
from lrm_jax.align import lpo, policy_gradient
from tests import helpers


@pytest.fixture(scope="module")
def golden():
  return helpers.golden("rl/expected")


@pytest.mark.parametrize("global_std", [False, True])
def test_golden_advantages(golden, global_std):
  got = policy_gradient.prompt_advantages(
    golden["adv/rewards"], golden["adv/prompt_ids"], global_std=global_std
  )
  assert helpers.rel_err(got, golden[f"adv/global_std_{global_std}"]) < 1e-12


@pytest.mark.parametrize("global_std", [False, True])
def test_group_advantages_are_those_of_equal_prompts(global_std):
  rewards = np.random.default_rng(0).normal(size=(5, 4)) * np.arange(1, 6)[:, None]
  want = policy_gradient.prompt_advantages(
    rewards.ravel(), np.repeat(np.arange(5), 4), global_std=global_std
  )
  got = policy_gradient.group_advantages(
    jnp.asarray(rewards, jnp.float32), global_std=global_std
  )
  np.testing.assert_allclose(got.ravel(), want, rtol=1e-4, atol=1e-5)


def test_equal_rewards_have_no_advantage():
  rewards = jnp.array([[1e4, 1e4, 1e4], [0.0, 1.0, 2.0]])
  advantages = policy_gradient.group_advantages(rewards)
  np.testing.assert_array_equal(advantages[0], 0)
  assert policy_gradient.zero_std_ratio(rewards) == 0.5
  gradient = jax.grad(lambda r: policy_gradient.group_advantages(r)[0].sum())(rewards)
  assert gradient.shape == rewards.shape


def test_members_that_do_not_count():
  rewards = jnp.array([[1.0, jnp.nan, 3.0, 2.0]])
  valid = jnp.isfinite(rewards)
  got = policy_gradient.group_advantages(rewards, valid)
  want = policy_gradient.group_advantages(jnp.array([[1.0, 3.0, 2.0]]))
  np.testing.assert_allclose(got[0, [0, 2, 3]], want[0], rtol=1e-6)
  assert got[0, 1] == 0
  nobody = policy_gradient.group_advantages(rewards, jnp.zeros((1, 4), bool))
  np.testing.assert_array_equal(nobody, 0)


def test_golden_clipped_objective(golden):
  loss, diagnostics = policy_gradient.clipped_objective(
    jnp.asarray(golden["ppo/log_prob_new"]),
    jnp.asarray(golden["ppo/log_prob_old"]),
    jnp.asarray(golden["ppo/adv"]),
    clip_range=golden["ppo/clip_range"],
  )
  assert helpers.rel_err(loss.mean(), golden["ppo/policy_loss"][0]) < 1e-5
  ratio = np.exp(golden["ppo/log_prob_new"] - golden["ppo/log_prob_old"])
  outside = np.abs(ratio - 1) > golden["ppo/clip_range"]
  np.testing.assert_allclose(diagnostics["clip_frac"], outside.mean())
  assert 0 < outside.mean() < 1


def test_golden_kl(golden):
  kl = policy_gradient.transition_kl(
    jnp.asarray(golden["ppo/mean"]),
    jnp.asarray(golden["ppo/mean_ref"]),
    golden["ppo/std"],
  )
  assert helpers.rel_err(kl.mean(), golden["ppo/kl_loss"][0]) < 1e-5


def toy_step(theta, x, x_next):
  """Log-probability of a step whose velocity is theta tanh(x)."""
  v = theta * jnp.tanh(x)
  return sample.likelihood(sample.SDE, x, x_next, v, 0.8, 0.7)


def test_first_update_is_the_vanilla_policy_gradient():
  x, x_next = jax.random.normal(jax.random.key(0), (2, 6, 4, 4, 2))
  advantages = jnp.linspace(-2.0, 1.5, 6)
  theta = jnp.float32(0.3)
  old = jax.jit(lambda t: toy_step(t, x, x_next)[0])(theta)

  @jax.jit
  def objective(theta):
    log_prob = toy_step(theta, x, x_next)[0]
    loss, diagnostics = policy_gradient.clipped_objective(
      log_prob, old, advantages, clip_range=1e-4
    )
    return loss.mean(), diagnostics

  @jax.jit
  def vanilla(theta):
    return -jnp.mean(advantages * toy_step(theta, x, x_next)[0])

  (_, diagnostics), gradient = jax.value_and_grad(objective, has_aux=True)(theta)
  assert diagnostics["ratio"] == 1 and diagnostics["clip_frac"] == 0
  np.testing.assert_allclose(gradient, jax.grad(vanilla)(theta), rtol=1e-6)


def test_kl_of_a_policy_with_itself_has_no_gradient():
  x, x_next = jax.random.normal(jax.random.key(0), (2, 6, 4, 4, 2))
  reference = toy_step(0.3, x, x_next)[1]

  def kl(theta):
    mean, std = toy_step(theta, x, x_next)[1:]
    return policy_gradient.transition_kl(mean, reference, std).mean()

  assert kl(0.3) == 0 and jax.grad(kl)(0.3) == 0 and jax.grad(kl)(0.4) > 0


def test_large_advantages_are_clipped():
  zeros = jnp.zeros(3)
  loss, _ = policy_gradient.clipped_objective(
    zeros, zeros, jnp.array([-9.0, 2.0, 9.0]), clip_range=0.1
  )
  np.testing.assert_array_equal(loss, [5.0, -2.0, -5.0])


# --- LPO ---------------------------------------------------------------------------


def test_golden_lpo(golden):
  pairs, valid, gap = lpo.select_pairs(jnp.asarray(golden["lpo/scores"].T), 0.35)
  np.testing.assert_array_equal(pairs.T, golden["lpo/pair_idx"])
  assert helpers.rel_err(gap, golden["lpo/gap"]) < 1e-5
  np.testing.assert_array_equal(valid, golden["lpo/valid_thresh0.35"].astype(bool))
  loss = lpo.step_preference(
    jnp.stack([golden["lpo/logp_win"], golden["lpo/logp_lose"]], axis=1),
    jnp.stack([golden["lpo/logp_ref_win"], golden["lpo/logp_ref_lose"]], axis=1),
    beta=10.0,
  )
  assert helpers.rel_err(loss.mean(), golden["lpo/loss_beta10_eps0.1"][0]) < 1e-5


def test_pairs_below_the_threshold_are_invalid():
  scores = jnp.array([[0.0, 0.1, 0.2], [0.0, 2.0, 5.0]])
  gap = np.tanh(np.array([0.1, 2.5]))
  for threshold, want in ((0.0, [1, 1]), (0.5, [0, 1]), (0.999, [0, 0])):
    _, valid, found = lpo.select_pairs(scores, threshold)
    np.testing.assert_array_equal(valid, want)
    np.testing.assert_allclose(found, gap, rtol=1e-5)
  each = lpo.threshold_at(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(each, [0.35, 0.5])
  np.testing.assert_array_equal(lpo.select_pairs(scores, each)[1], [False, True])


def test_scores_that_are_not_finite_make_no_pairs():
  scores = jnp.array([[jnp.nan, 1.0, jnp.inf, -1.0], [jnp.nan] * 4, [3.0] * 4])
  pairs, valid, gap = lpo.select_pairs(scores, 0.35)
  np.testing.assert_array_equal(pairs[0], [1, 3])
  np.testing.assert_array_equal(valid, [True, False, False])
  np.testing.assert_array_equal(gap[1:], 0)


def test_published_beta_does_not_overflow():
  log_prob = jnp.array([[0.3, -0.3], [-0.3, 0.3], [0.01, 0.0]])
  loss, gradient = jax.value_and_grad(
    lambda p: lpo.step_preference(p, jnp.zeros((3, 2)), beta=500.0).sum()
  )(log_prob)
  assert np.isfinite(loss) and np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[:2], 0)  # clipped ratios
  np.testing.assert_allclose(gradient[2], np.array([-1, 1]) * 500 / (1 + np.exp(5)))
