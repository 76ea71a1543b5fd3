"""LPO: preference optimisation of single denoising steps (Zhang et al. 2025).

From one state k candidates are drawn and scored at their noise level; the best and
the worst are a pair, if the scores are far enough apart for that noise level.

Axes: b states, k candidates.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lrm_jax import sample


def select_pairs(
  scores: Float[Array, "b k"], threshold: ArrayLike
) -> tuple[Int[Array, "b 2"], Bool[Array, " b"], Float[Array, " b"]]:
  """The best and the worst candidate of each state.

  Scores that are not finite are never part of a pair.

  Args:
    threshold: scalar or (b,), of the gap; grows with the noise level, see
      `threshold_at`.

  Returns: indices (best, worst); whether the gap exceeds the threshold; the gap, the
    difference of the two scores' softmax probabilities, in [0, 1].
  """
  finite = jnp.isfinite(scores)
  scores = scores.astype(jnp.float32)
  best = jnp.argmax(jnp.where(finite, scores, -jnp.inf), axis=1)
  worst = jnp.argmin(jnp.where(finite, scores, jnp.inf), axis=1)
  pairs = jnp.stack([best, worst], axis=1).astype(jnp.int32)
  high, low = jnp.take_along_axis(scores, pairs, axis=1).T
  # softmax(h) - softmax(l) of two = 2 sigmoid(h - l) - 1 = tanh((h - l) / 2)
  gap = jnp.where(finite.any(axis=1), jnp.tanh((high - low) / 2), 0)
  return pairs, gap > threshold, gap


def threshold_at(sigma: ArrayLike, low: float = 0.35, high: float = 0.5) -> jax.Array:
  """The gap that a pair needs: from `low` at sigma 0 to `high` at sigma 1, linearly."""
  return low + (high - low) * jnp.asarray(sigma, jnp.float32)


def step_preference(
  log_prob: Float[Array, "b 2"],
  ref_log_prob: Float[Array, "b 2"],
  *,
  beta: float = 500.0,
  ratio_clip: float = 0.1,
) -> Float[Array, " b"]:
  """`-log sigmoid(beta log clip(r_best) - beta log clip(r_worst))`, r = pi / pi_ref.

  Written through log-sigmoid of clipped log-ratios: with beta = 500 the powers of the
  published form overflow.

  Args:
    log_prob, ref_log_prob: of the (best, worst) next states, averages over latent axes.
    ratio_clip: ratios are clipped to 1 +- this.
  """
  log_ratio = log_prob.astype(jnp.float32) - ref_log_prob.astype(jnp.float32)
  log_ratio = jnp.clip(log_ratio, jnp.log1p(-ratio_clip), jnp.log1p(ratio_clip))
  return -jax.nn.log_sigmoid(beta * (log_ratio[:, 0] - log_ratio[:, 1]))


def step_loss(
  velocity_fn: sample.VelocityFn,
  reference_fn: sample.VelocityFn,
  inputs: Any,
  x: Float[Array, "b H W C"],
  x_next: Float[Array, "b k H W C"],
  scores: Float[Array, "b k"],
  at: sample.Schedule,
  *,
  sampler: sample.Sampler = sample.SDE,
  threshold: ArrayLike,
  beta: float = 500.0,
  ratio_clip: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean loss over the valid pairs of one step; 0 where there are none.

  Args:
    velocity_fn, reference_fn: the policy, now and before training.
    x_next, scores: candidates and their scores, as `experience.candidates` gives them.
    at: one step of the schedule: scalars.
    others: of `select_pairs` and `step_preference`.

  Returns: the loss, and diagnostics `valid` (share of states with a pair), `gap`,
    `margin` (mean log-ratio of the best less that of the worst).
  """
  b = len(x)
  pairs, valid, gap = select_pairs(scores, threshold)
  valid = valid & (at.noise_level > 0)
  nexts = jnp.take_along_axis(x_next, pairs[:, :, None, None, None], axis=1)
  sigma = jnp.broadcast_to(at.sigma, (b,))

  def log_prob(v):
    mean, std = sampler.transition(x, v, at.sigma, at.sigma_next, at.noise_level)
    flat = nexts.reshape(2 * b, *x.shape[1:])
    return sampler.log_prob(flat, jnp.repeat(mean, 2, axis=0), std).reshape(b, 2)

  ours = log_prob(velocity_fn(inputs, x, sigma))
  theirs = jax.lax.stop_gradient(log_prob(reference_fn(inputs, x, sigma)))
  losses = step_preference(ours, theirs, beta=beta, ratio_clip=ratio_clip)
  count = jnp.maximum(valid.sum(), 1)
  margin = (ours - theirs) @ jnp.array([1.0, -1.0])
  metrics = {
    "valid": jnp.mean(valid.astype(jnp.float32)),
    "gap": jnp.mean(gap),
    "margin": jnp.sum(jnp.where(valid, margin, 0)) / count,
  }
  loss = jnp.sum(jnp.where(valid, losses, 0)) / count
  return loss, jax.tree.map(jax.lax.stop_gradient, metrics)
