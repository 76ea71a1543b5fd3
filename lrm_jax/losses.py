"""Preference losses on pairs of scores, per example and in float32.

Each takes `r_chosen`, `r_rejected`, `sigma` and `preference`, all (b,), and returns
(b,); what a loss does not depend on it ignores. The caller averages. `preference` is
the probability that the first score's side is preferred: 1, or 0.5 for a tie, which
only the losses of TIE_AWARE understand.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jax.typing import ArrayLike

_P_EPS = 1e-6  # inside the root of the fidelity loss, as in DiNa-LRM


def bradley_terry(
  r_chosen: ArrayLike,
  r_rejected: ArrayLike,
  sigma: ArrayLike,
  preference: ArrayLike = 1.0,
  *,
  margin: float = 0.0,
) -> jax.Array:
  """`-log sigmoid(r+ - r- - margin)`."""
  del sigma, preference
  return -jax.nn.log_sigmoid(_gap(r_chosen, r_rejected) - margin)


def thurstone(
  r_chosen: ArrayLike,
  r_rejected: ArrayLike,
  sigma: ArrayLike,
  preference: ArrayLike = 1.0,
  *,
  noise_scale: float = 2.0,
  base_var: float = 0.05,
) -> jax.Array:
  """Noise-calibrated Thurstone model with the fidelity loss (DiNa-LRM).

  `var = noise_scale sigma^2 + base_var`, `p = Phi((r+ - r-) / sqrt(2 var + 1e-6))`,
  `1 - sqrt(p + 1e-6)`.
  """
  del preference
  var = noise_scale * jnp.asarray(sigma, jnp.float32) ** 2 + base_var
  return _fidelity(_gap(r_chosen, r_rejected), var)


def thurstone_constant(
  r_chosen: ArrayLike,
  r_rejected: ArrayLike,
  sigma: ArrayLike,
  preference: ArrayLike = 1.0,
  *,
  var: float = 0.5,
) -> jax.Array:
  """The same with one variance at every noise level."""
  del sigma, preference
  return _fidelity(_gap(r_chosen, r_rejected), jnp.float32(var))


def pairwise_cross_entropy(
  r_chosen: ArrayLike,
  r_rejected: ArrayLike,
  sigma: ArrayLike,
  preference: ArrayLike = 1.0,
) -> jax.Array:
  """Cross-entropy of the softmax over the two scores with the preference (LRM).

  `-p log sigmoid(r+ - r-) - (1 - p) log sigmoid(r- - r+)`: for p = 1 Bradley-Terry; a
  tie, p = 0.5, is least (log 2) where the scores are equal.
  """
  del sigma
  gap = _gap(r_chosen, r_rejected)
  p = jnp.asarray(preference, jnp.float32)
  return -p * jax.nn.log_sigmoid(gap) - (1 - p) * jax.nn.log_sigmoid(-gap)


def _gap(r_chosen: ArrayLike, r_rejected: ArrayLike) -> jax.Array:
  return jnp.asarray(r_chosen, jnp.float32) - jnp.asarray(r_rejected, jnp.float32)


def _fidelity(gap: jax.Array, var: jax.Array) -> jax.Array:
  # jax's ndtr goes through erfc in the tail, so p keeps its digits where torch's
  # Normal.cdf rounds to 0 (below about -5.5).
  p = ndtr(gap / jnp.sqrt(2.0 * var + 1e-6))
  return 1.0 - jnp.sqrt(p + _P_EPS)


LOSSES = {
  "bradley_terry": bradley_terry,
  "thurstone": thurstone,
  "thurstone_constant": thurstone_constant,
  "pairwise_cross_entropy": pairwise_cross_entropy,
}
TIE_AWARE = ("pairwise_cross_entropy",)
