"""Sampling along the flow: a `lax.scan` over noise levels.

Nothing here knows a model: `velocity_fn(inputs, x, sigma) -> v` with any pytree of
inputs, x (b H W C) and sigma (b,).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

VelocityFn = Callable[[Any, jax.Array, jax.Array], jax.Array]


def guide(velocity_fn: VelocityFn, guidance_scale: float | jax.Array) -> VelocityFn:
  """Classifier-free guidance in one batched call.

  The guided function takes inputs `(cond, uncond)`, two pytrees of equal structure
  with leading axis b, and returns `v_uncond + scale (v_cond - v_uncond)` (Ho and
  Salimans 2022, eq. 6, in the convention where 1 is no guidance).
  """

  def guided(inputs, x, sigma):
    cond, uncond = inputs
    both = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, uncond)
    v = velocity_fn(both, jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]))
    v_cond, v_uncond = jnp.split(v.astype(jnp.float32), 2)
    return v_uncond + guidance_scale * (v_cond - v_uncond)

  return guided


def euler(
  velocity_fn: VelocityFn, inputs: Any, x: jax.Array, sigmas: ArrayLike
) -> jax.Array:
  """The probability-flow ODE by Euler steps, in float32.

  Args:
    x: (b H W C) noise at noise level `sigmas[0]`.
    sigmas: (num_steps + 1,) decreasing, as `flow.sampling_sigmas` gives them.

  Returns: (b H W C) float32 at noise level `sigmas[-1]`.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)

  def step(x, pair):
    sigma, sigma_next = pair
    v = velocity_fn(inputs, x, jnp.broadcast_to(sigma, (x.shape[0],)))
    return x + (sigma_next - sigma) * v.astype(jnp.float32), None

  x, _ = jax.lax.scan(step, x.astype(jnp.float32), (sigmas[:-1], sigmas[1:]))
  return x
