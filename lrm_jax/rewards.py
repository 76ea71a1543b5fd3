"""Rewards made of rewards: `reward_fn(inputs, x, sigma) -> (n,)` from several such.

For `explore.explore`, which takes any function of this kind: a model's, one of these,
or a user's own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

RewardFn = Callable[[Any, jax.Array, jax.Array], jax.Array]


def weighted_sum(
  terms: Mapping[str, tuple[float | jax.Array, RewardFn]],
) -> RewardFn:
  """`sum of weight * reward` over named terms, in float32.

  The terms should be on comparable scales (a DiNa-LRM score is ten times its reported
  value). Inputs are a mapping with the same names. A term that is not finite makes the
  sum not finite.

  Raises:
    ValueError: no terms, or (when called) inputs of other names.
  """
  if not terms:
    raise ValueError("a weighted sum of no rewards")

  def reward(inputs, x, sigma):
    if set(inputs) != set(terms):
      raise ValueError(
        f"the reward has the terms {sorted(terms)}, its inputs {sorted(inputs)}"
      )
    total = jnp.zeros(x.shape[:1], jnp.float32)
    for name, (weight, reward_fn) in terms.items():
      total = total + weight * reward_fn(inputs[name], x, sigma).astype(jnp.float32)
    return total

  return reward


def mean(reward_fns: Sequence[RewardFn]) -> RewardFn:
  """The mean of an ensemble's members; inputs are a sequence, one for each.

  Raises:
    ValueError: no members, or (when called) another number of inputs.
  """
  if not reward_fns:
    raise ValueError("an ensemble of no rewards")

  def reward(inputs, x, sigma):
    if len(inputs) != len(reward_fns):
      raise ValueError(f"{len(reward_fns)} rewards, but inputs for {len(inputs)}")
    scores = [
      reward_fn(i, x, sigma).astype(jnp.float32)
      for reward_fn, i in zip(reward_fns, inputs, strict=True)
    ]
    return jnp.mean(jnp.stack(scores), axis=0)

  return reward
