"""ReFL with a latent reward: its gradient, through one late denoising step.

A sample is rolled out without gradients to a random late step; there the clean latent
is predicted once, with gradients, and a reward model looks at the prediction (Xu et
al. 2023; with a reward on latents no decoder is in the loop, DiNa-LRM).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lrm_jax import flow, sample


def rollout_until(
  velocity_fn: sample.VelocityFn,
  inputs: Any,
  x: Float[Array, "b H W C"],
  schedule: sample.Schedule,
  stop: Int[Array, ""],
  *,
  sampler: sample.Sampler = sample.SAMPLERS["euler"],
  keys: Key[Array, " b"] | None = None,
) -> Float[Array, "b H W C"]:
  """The state before step `stop`, which is traced: one program for all of them.

  Other arguments as of `sample.rollout`. No gradient passes.
  """

  def step(i, x):
    at = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), schedule)
    return sample.rollout(velocity_fn, inputs, x, at, sampler=sampler, keys=keys)[0]

  schedule = jax.tree.map(jnp.asarray, schedule)
  x = jax.lax.fori_loop(0, stop, step, x.astype(jnp.float32))
  return jax.lax.stop_gradient(x)


def loss(
  velocity_fn: sample.VelocityFn,
  reward: Callable[[jax.Array], jax.Array],
  inputs: Any,
  x: Float[Array, "b H W C"],
  sigma: Float[Array, " b"],
  *,
  target: float = 2.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`mean(target - r(x0_hat))`, `x0_hat = x - sigma v`.

  Args:
    velocity_fn: the policy, unguided: only the conditional branch is differentiated.
    reward: `x0 -> (b,)`, on the reported scale.
    x: state at noise level sigma.

  Returns: the loss, and the mean reward as a diagnostic.
  """
  v = velocity_fn(inputs, x, sigma).astype(jnp.float32)
  x0_hat = x - sigma.reshape(-1, *(1,) * (x.ndim - 1)) * v
  r = reward(x0_hat).astype(jnp.float32)
  return jnp.mean(target - r), {"reward": jax.lax.stop_gradient(jnp.mean(r))}


def flow_matching_loss(
  velocity_fn: sample.VelocityFn,
  inputs: Any,
  x0: Float[Array, "b H W C"],
  eps: Float[Array, "b H W C"],
  sigma: Float[Array, " b"],
) -> jax.Array:
  """`mean |v - (eps - x0)|^2` on real data: keeps the policy near them."""
  v = velocity_fn(inputs, flow.add_noise(x0, eps, sigma), sigma)
  return jnp.mean((v.astype(jnp.float32) - (eps - x0)) ** 2)
