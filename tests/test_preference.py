"""The two programs of reward training on a model small enough to know the answers."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrm_jax import losses, optim, preference, train_state, weights

B, LATENT, TEXT, POOLED = 8, (4, 4, 2), (3, 5), 4


class Linear(nnx.Module):
  """Scores are linear in the noisy latent, the noise level and the prompt."""

  def __init__(self, rngs: nnx.Rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), LATENT))
    self.c = nnx.Param(jax.random.normal(rngs.params(), (POOLED,)))

  def __call__(self, x, sigma, cond, *, key=None):
    return (
      jnp.einsum("bhwc,hwc->b", x, self.w[...]) / 10 + cond.pooled @ self.c[...] + sigma
    )


def batch_of(seed: int = 0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  return {
    "chosen": normal(B, *LATENT),
    "rejected": normal(B, *LATENT),
    "context": normal(B, *TEXT),
    "pooled": normal(B, POOLED),
    "preference": jnp.asarray([1.0, 0.5] * (B // 2)),
    "kind": jnp.arange(B) % 2,
    "index": jnp.arange(100, 100 + B),
    "weight": jnp.ones(B),
  }


@dataclasses.dataclass
class Setup:
  graphdef: nnx.GraphDef
  state: train_state.TrainState
  tx: optax.GradientTransformation

  def step(self, **options):
    options = (
      dict(
        sigma_fn=lambda key, b: jax.random.uniform(key, (b,)),
        loss_fn=losses.pairwise_cross_entropy,
        learning_rate=optax.constant_schedule(0.1),
        shared_noise=False,
        ema_decay=None,
      )
      | options
    )
    return jax.jit(preference.make_train_step(self.graphdef, self.tx, **options))


@pytest.fixture(scope="module")
def setup():
  graphdef, params = weights.split(Linear(nnx.Rngs(0)))
  params = weights.flatten(params)
  schedule = optax.constant_schedule(0.1)
  tx = optim.make_tx(schedule, weight_decay=0.0, clip_norm=1e9)
  return Setup(graphdef, train_state.create(params, tx, use_ema=False), tx)


def scores_by_hand(params, x, sigma, pooled):
  w, c = np.asarray(params["w"]), np.asarray(params["c"])
  return np.einsum("bhwc,hwc->b", x, w) / 10 + pooled @ c + sigma


@pytest.mark.parametrize("shared", [True, False])
def test_loss_is_that_of_the_scores(setup, shared):
  """Recomputed by hand from the same random draws."""
  batch, key = batch_of(), jax.random.key(3)
  _, metrics = setup.step(shared_noise=shared)(setup.state, {}, batch, key)
  keys = jax.random.split(jax.random.fold_in(key, 0), 3)
  sigma = np.asarray(jax.random.uniform(keys[0], (B,)))
  eps = np.asarray(jax.random.normal(keys[1], (B, 1 if shared else 2, *LATENT)))
  s = sigma[:, None, None, None]
  r = [
    scores_by_hand(
      setup.state.params,
      (1 - s) * np.asarray(batch[side]) + s * eps[:, 0 if shared else i],
      sigma,
      np.asarray(batch["pooled"]),
    )
    for i, side in enumerate(("chosen", "rejected"))
  ]
  want = losses.pairwise_cross_entropy(*r, sigma, batch["preference"])
  np.testing.assert_allclose(metrics["train/loss"], np.mean(want), rtol=1e-5)
  np.testing.assert_allclose(metrics["train/acc"], np.mean(r[0] > r[1]))
  np.testing.assert_allclose(
    metrics["train/score_gap"], np.mean(r[0] - r[1]), rtol=1e-4
  )


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_change_nothing_but_rounding(setup, accumulate):
  batch, key = batch_of(), jax.random.key(1)
  whole, metrics = setup.step()(setup.state, {}, batch, key)
  parts, again = setup.step(accumulate=accumulate)(setup.state, {}, batch, key)
  for name, value in metrics.items():
    np.testing.assert_allclose(again[name], value, rtol=2e-5, err_msg=name)
  for path, leaf in whole.params.items():
    np.testing.assert_allclose(parts.params[path], leaf, rtol=1e-4, atol=1e-6)


def test_steps_draw_anew_and_repeat_from_the_same_state(setup):
  batch, key = batch_of(), jax.random.key(1)
  step = setup.step()
  first = step(setup.state, {}, batch, key)
  again = step(setup.state, {}, batch, key)
  np.testing.assert_array_equal(first[1]["train/loss"], again[1]["train/loss"])
  later = dataclasses.replace(setup.state, step=jnp.int32(1))
  other = step(later, {}, batch, key)
  assert float(other[1]["train/loss"]) != float(first[1]["train/loss"])


def test_evaluation_noise_belongs_to_the_pair(setup):
  """Not to its place in a batch; and each noise level has its own."""
  step = jax.jit(preference.make_eval_step(setup.graphdef, shared_noise=False))
  key, sigmas = jax.random.key(0), jnp.asarray([0.0, 0.5, 0.5])
  batch = batch_of()
  out = step(setup.state.params, {}, batch, sigmas, key)
  order = jnp.asarray([3, 1, 0, 2, 7, 6, 5, 4])
  moved = step(
    setup.state.params, {}, jax.tree.map(lambda a: a[order], batch), sigmas, key
  )
  for name in ("r_chosen", "r_rejected"):
    np.testing.assert_allclose(moved[name], out[name][:, order], rtol=1e-5)
    assert out[name].shape == (3, B)
    assert np.any(out[name][1] != out[name][2])
  np.testing.assert_array_equal(moved["kind"], batch["kind"][order])
  pooled = np.asarray(batch["pooled"])
  clean = scores_by_hand(setup.state.params, batch["chosen"], 0.0, pooled)
  np.testing.assert_allclose(out["r_chosen"][0], clean, rtol=1e-4, atol=1e-5)
