"""Clipped policy gradients on denoising steps: Flow-GRPO, and Step-GRPO of DRM.

A denoising step is a Gaussian policy (`sample.py`). Flow-GRPO compares finished
samples of one prompt and gives every step of a sample the same advantage; Step-GRPO
compares the k candidates of one step. Everything is float32, per example; the caller
averages.

Axes: n transitions, g members of a group, b states, k next states of a state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from lrm_jax import sample

STD_EPS = 1e-4  # Flow-GRPO's; also what makes advantages of equal rewards 0


def group_advantages(
  rewards: Float[Array, "*groups g"],
  valid: Bool[Array, "*groups g"] | None = None,
  *,
  global_std: bool = False,
) -> Float[Array, "*groups g"]:
  """`(r - mean) / (std + 1e-4)` within each group, the last axis; std with ddof 0.

  Step-GRPO: the k candidates of one state (DRM). Flow-GRPO: the samples of one prompt.

  Args:
    valid: members that count; the others, whose reward may be anything, get 0. None:
      all.
    global_std: divide by the std of all rewards, not of the group's.
  """
  rewards = rewards.astype(jnp.float32)
  if valid is None:
    valid = jnp.ones(rewards.shape, bool)

  def centre(axis):
    count = jnp.maximum(valid.sum(axis=axis, keepdims=True), 1)
    kept = jnp.where(valid, rewards, 0)
    mean = kept.sum(axis=axis, keepdims=True) / count
    centred = jnp.where(valid, kept - mean, 0)
    return centred, jnp.sqrt((centred**2).sum(axis=axis, keepdims=True) / count)

  centred, std = centre(-1)
  if global_std:
    _, std = centre(None)
  return centred / (std + STD_EPS)


def prompt_advantages(
  rewards: Float[np.ndarray, " n"],
  prompts: Int[np.ndarray, " n"],
  *,
  global_std: bool = False,
) -> Float[np.ndarray, " n"]:
  """Flow-GRPO's advantages of samples whose groups differ in size, float64 on the host.

  Args:
    prompts: which prompt each sample has; any integers.
    global_std: divide by the std of all rewards, not of the prompt's.
  """
  rewards = np.asarray(rewards, np.float64)
  advantages = np.zeros_like(rewards)
  for prompt in np.unique(prompts):
    group = prompts == prompt
    std = rewards.std() if global_std else rewards[group].std()
    advantages[group] = (rewards[group] - rewards[group].mean()) / (std + STD_EPS)
  return advantages


def zero_std_ratio(rewards: Float[Array, "*groups g"]) -> jax.Array:
  """Share of groups whose rewards are all equal: they teach nothing."""
  return jnp.mean(jnp.max(rewards, axis=-1) == jnp.min(rewards, axis=-1))


def clipped_objective(
  log_prob: Float[Array, " n"],
  old_log_prob: Float[Array, " n"],
  advantages: Float[Array, " n"],
  *,
  clip_range: ArrayLike,
  max_advantage: ArrayLike = 5.0,
) -> tuple[Float[Array, " n"], dict[str, jax.Array]]:
  """PPO's loss `max(-A ratio, -A clip(ratio, 1 - c, 1 + c))` of each transition.

  At the first update of a rollout the ratio is exactly 1, and the gradient that of the
  vanilla policy gradient, `-A grad log_prob`.

  Args:
    log_prob, old_log_prob: averages over latent axes, as `sample.likelihood` gives
      them; the clip range presumes that.
    max_advantage: advantages are clipped to +- this.

  Returns: the loss (n,), and diagnostics: `ratio` mean, `approx_kl`
    (`0.5 mean (log ratio)^2`), `clip_frac`.
  """
  a = jnp.clip(advantages.astype(jnp.float32), -max_advantage, max_advantage)
  log_ratio = log_prob.astype(jnp.float32) - old_log_prob.astype(jnp.float32)
  ratio = jnp.exp(log_ratio)
  loss = jnp.maximum(-a * ratio, -a * jnp.clip(ratio, 1 - clip_range, 1 + clip_range))
  diagnostics = {
    "ratio": jnp.mean(ratio),
    "approx_kl": 0.5 * jnp.mean(log_ratio**2),
    "clip_frac": jnp.mean((jnp.abs(ratio - 1) > clip_range).astype(jnp.float32)),
  }
  return loss, jax.tree.map(jax.lax.stop_gradient, diagnostics)


def transition_kl(
  mean: Float[Array, "n H W C"], mean_ref: Float[Array, "n H W C"], std: ArrayLike
) -> Float[Array, " n"]:
  """`(mean - mean_ref)^2 / (2 std^2)`, averaged over the latent's axes.

  The KL divergence of two Gaussian steps of equal deviation. Flow-GRPO puts s there,
  the deviation without the step's `sqrt(-dt)`.

  Args:
    std: a scalar, (n,), or anything that broadcasts against mean; > 0.
  """
  mean, mean_ref = mean.astype(jnp.float32), mean_ref.astype(jnp.float32)
  std = jnp.asarray(std, jnp.float32)
  if std.ndim == 1:
    std = std.reshape(-1, *(1,) * (mean.ndim - 1))
  kl = (mean - mean_ref) ** 2 / (2 * std**2)
  return jnp.mean(kl, axis=tuple(range(1, kl.ndim)))


def step_loss(
  velocity_fn: sample.VelocityFn,
  reference_fn: sample.VelocityFn | None,
  inputs: Any,
  x: Float[Array, "b H W C"],
  x_next: Float[Array, "b k H W C"],
  old_log_prob: Float[Array, "b k"] | None,
  advantages: Float[Array, "b k"],
  at: sample.Schedule,
  *,
  sampler: sample.Sampler = sample.SDE,
  clip_range: ArrayLike,
  kl_coef: ArrayLike = 0.0,
  max_advantage: ArrayLike = 5.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean loss of one step's transitions: clipped objective, and KL to a reference.

  The k next states of a state share one velocity, so that Step-GRPO's update costs no
  more than Flow-GRPO's, which has k = 1.

  Args:
    velocity_fn: the policy.
    reference_fn: the policy before training; None without a KL term.
    old_log_prob: under the policy that drew x_next. None: that is the present one, and
      the ratio is 1 to the last bit.
    at: one step of the schedule: scalars.

  Returns: the loss, and diagnostics as of `clipped_objective`, with `kl`.
  """
  b, k = x_next.shape[:2]
  sigma = jnp.broadcast_to(at.sigma, (b,))
  v = velocity_fn(inputs, x, sigma)
  mean, std = sampler.transition(x, v, at.sigma, at.sigma_next, at.noise_level)
  log_prob = sampler.log_prob(
    x_next.reshape(b * k, *x.shape[1:]), jnp.repeat(mean, k, axis=0), std
  )
  if old_log_prob is None:
    old = jax.lax.stop_gradient(log_prob)
  else:
    old = old_log_prob.reshape(b * k)
  loss, metrics = clipped_objective(
    log_prob,
    old,
    advantages.reshape(b * k),
    clip_range=clip_range,
    max_advantage=max_advantage,
  )
  loss = jnp.mean(loss)
  if reference_fn is not None:
    v_ref = jax.lax.stop_gradient(reference_fn(inputs, x, sigma))
    mean_ref, _ = sampler.transition(x, v_ref, at.sigma, at.sigma_next, at.noise_level)
    kl_std = sampler.kl_std(std, at.sigma, at.sigma_next)
    drawn = kl_std > 0  # a step without noise is no policy
    kl = transition_kl(mean, mean_ref, jnp.where(drawn, kl_std, 1))
    kl = jnp.mean(jnp.where(drawn, kl, 0))
    loss = loss + kl_coef * kl
    metrics = {**metrics, "kl": jax.lax.stop_gradient(kl)}
  return loss, metrics
