"""Rectified flow: noise schedule, interpolation, and draws of the noise level.

`x = (1 - sigma) x0 + sigma eps`, `v = eps - x0`, t = 1000 sigma (METHODS: SD3.5).
Everything here is float32, whatever the model computes in.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

NUM_TRAIN_STEPS = 1000
U_DISTRIBUTIONS = ("uniform", "logit_normal", "mode", "power", "beta", "constant")


def shift_sigma(sigma, shift: float):
  """`shift sigma / (1 + (shift - 1) sigma)`: Esser et al. 2024, eq. 23."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def train_sigmas(shift: float, num: int = NUM_TRAIN_STEPS) -> np.ndarray:
  """The shifted training table, (num,) float32 from 1 down to about shift / num."""
  t = np.linspace(1, num, num, dtype=np.float32)[::-1]
  return shift_sigma(t / np.float32(num), shift).astype(np.float32)


def sampling_sigmas(
  num_steps: int, shift: float, num: int = NUM_TRAIN_STEPS
) -> np.ndarray:
  """Noise levels of a sampler with `num_steps` steps: (num_steps + 1,), ends in 0.

  diffusers' FlowMatchEulerDiscreteScheduler: the grid is even in t between the ends
  of the *shifted* training table, and is then shifted once more.

  Raises:
    ValueError: num_steps < 1.
  """
  if num_steps < 1:
    raise ValueError(f"num_steps={num_steps} must be >= 1")
  ends = train_sigmas(shift, num)[[0, -1]].astype(np.float64) * num
  t = np.linspace(ends[0], ends[1], num_steps)
  sigmas = shift_sigma(t / num, shift)
  return np.append(sigmas, 0.0).astype(np.float32)


def nearest_sigma(u: ArrayLike, table: ArrayLike) -> jax.Array:
  """The table's entry nearest to each u; the first of equals. DiNa-LRM's lookup."""
  table = jnp.asarray(table)
  return table[jnp.argmin(jnp.abs(table[None] - jnp.asarray(u)[..., None]), axis=-1)]


def indexed_sigma(u: ArrayLike, table: ArrayLike) -> jax.Array:
  """The table's entry at index floor(u * len): DRM's lookup (u = 0 is pure noise)."""
  table = jnp.asarray(table)
  index = jnp.floor(jnp.asarray(u) * len(table)).astype(jnp.int32)
  return table[jnp.clip(index, 0, len(table) - 1)]


def add_noise(x0: ArrayLike, eps: ArrayLike, sigma: ArrayLike) -> jax.Array:
  """`(1 - sigma) x0 + sigma eps` for sigma (b,), in float32."""
  x0, eps, sigma = (jnp.asarray(a, jnp.float32) for a in (x0, eps, sigma))
  sigma = sigma.reshape(-1, *(1,) * (x0.ndim - 1))
  return (1 - sigma) * x0 + sigma * eps


def draw_u(
  key: jax.Array,
  shape: tuple[int, ...],
  distribution: str,
  *,
  mean: float = 0.0,
  std: float = 1.0,
  scale: float = 1.29,
  exponent: float = 1.0,
  alpha: float = 1.0,
  beta: float = 1.0,
  value: float = 0.0,
) -> jax.Array:
  """Draws u in [0, 1], from which a noise level is looked up.

  Args:
    distribution: `uniform`; `logit_normal` (sigmoid of N(mean, std)); `mode` (Esser et
      al. 2024, eq. 20, with `scale`); `power` (uniform ** exponent); `beta`
      (alpha, beta); `constant` (value).

  Raises:
    ValueError: an unknown distribution.
  """
  if distribution == "uniform":
    return jax.random.uniform(key, shape)
  if distribution == "logit_normal":
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))
  if distribution == "mode":
    u = jax.random.uniform(key, shape)
    return 1 - u - scale * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u)
  if distribution == "power":
    return jax.random.uniform(key, shape) ** exponent
  if distribution == "beta":
    return jax.random.beta(key, alpha, beta, shape)
  if distribution == "constant":
    return jnp.full(shape, value, jnp.float32)
  raise ValueError(f"u distribution {distribution!r}: use one of {U_DISTRIBUTIONS}")
