"""What a policy learns from: states, the next states drawn from them, and rewards.

`candidates`: k next states of each state, each scored at its own noise level (Step-GRPO
of DRM, LPO). `samples`: finished samples, compared within their prompt (Flow-GRPO).
Either is one program when called inside jit. A policy is a velocity_fn; nothing here
knows a model.

Axes: T steps, b samples, k next states of a state, p prompts, g samples of a prompt, H
W latent pixels, C latent channels.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lrm_jax import explore, sample
from lrm_jax.align import policy_gradient

FinalReward = Callable[[Any, jax.Array], jax.Array]


@struct.dataclass
class Experience:
  """T steps of b samples.

  Attributes:
    at: (T,) the schedule's steps, a sample.Schedule.
    x: (T b H W C) states.
    x_next: (T b k H W C) next states drawn from them.
    log_prob: (T b k) under the policy that drew them.
    chosen: (T b) int32, the next state that carried on.
    scores: name of a reward -> (T b k), or (b,) of finished samples; NaN where
      nothing was scored.
  """

  # Any, because the same tree holds shapes or shardings as well.
  at: Any
  x: Any
  x_next: Any
  log_prob: Any
  chosen: Any
  scores: dict[str, Any]


def candidates(
  velocity_fn: sample.VelocityFn,
  rewards: Mapping[str, explore.RewardFn],
  inputs: Any,
  reward_inputs: Mapping[str, Any],
  x: Float[Array, "b H W C"],
  schedule: sample.Schedule,
  options: explore.Explore,
  *,
  keys: Key[Array, " b"],
  sampler: sample.Sampler = sample.SDE,
) -> tuple[Float[Array, "b H W C"], Experience]:
  """k candidates at every exploring step; a random one carries on.

  Args:
    rewards: by name; `reward_inputs` has their inputs by the same names.
    x: noise.
    schedule: `explore` marks the steps to learn from.
    options: `candidates` and `chunk` are read, the choice is random.

  Returns: the finished samples, and the experience.

  Raises:
    ValueError: fewer than two candidates.
  """
  if options.candidates < 2:
    raise ValueError(f"candidates={options.candidates}: a comparison needs two or more")
  random = explore.Explore(options.candidates, select="random")
  # The choice does not look at scores, so that all candidates can be scored behind it.
  blind = explore.Apart(velocity_fn, lambda inputs, x, sigma: jnp.zeros(len(x)))
  x, steps = explore.explore(
    blind, inputs, (), x, schedule, random, keys=keys, sampler=sampler, trajectory=True
  )
  scored = {
    name: explore.repeat_rows(reward_inputs[name], options.chunk or options.num)
    for name in rewards
  }

  def score(step):
    candidates, sigma, explored = step

    def of(name):
      networks = explore.Apart(velocity_fn, rewards[name])
      return explore.score_candidates(
        networks, scored[name], candidates, sigma, options
      )[0]

    nothing = jnp.full(candidates.shape[:2], jnp.nan, jnp.float32)
    return jax.lax.cond(
      explored,
      lambda: {name: of(name) for name in rewards},
      lambda: dict.fromkeys(rewards, nothing),
    )

  explored = jnp.isfinite(steps.scores).all(axis=(1, 2))
  scores = jax.lax.map(score, (steps.candidates, schedule.sigma_next, explored))
  made = Experience(
    schedule,
    steps.x[:, :, 0],
    steps.candidates,
    steps.log_prob,
    steps.chosen[:, :, 0],
    scores,
  )
  return x, jax.lax.stop_gradient(made)


def samples(
  velocity_fn: sample.VelocityFn,
  rewards: Mapping[str, FinalReward],
  inputs: Any,
  reward_inputs: Mapping[str, Any],
  x: Float[Array, "b H W C"],
  schedule: sample.Schedule,
  *,
  keys: Key[Array, " b"],
  sampler: sample.Sampler = sample.SDE,
) -> tuple[Float[Array, "b H W C"], Experience]:
  """Whole rollouts, scored at their end: k = 1 next state per state.

  Args:
    rewards: by name, `(inputs, x0) -> (b,)` of finished samples: at which noise level
      they are looked at, and with which noise, is theirs to say.
    others: as `candidates`.
  """
  x, seen = sample.rollout(
    velocity_fn, inputs, x, schedule, sampler=sampler, keys=keys, trajectory=True
  )
  scores = {
    name: reward(reward_inputs[name], x).astype(jnp.float32)
    for name, reward in rewards.items()
  }
  made = Experience(
    schedule,
    seen.x[:-1],
    seen.x[1:, :, None],
    seen.log_prob[..., None],
    jnp.zeros(seen.log_prob.shape, jnp.int32),
    scores,
  )
  return x, jax.lax.stop_gradient(made)


def take_steps(experience: Experience, steps: Any) -> Experience:
  """Some steps (S,) of an experience."""
  rest = experience.replace(scores={})
  rest = jax.tree.map(lambda a: a[jnp.asarray(steps)], rest)
  scores = {
    name: s[jnp.asarray(steps)] if s.ndim == 3 else s
    for name, s in experience.scores.items()
  }
  return rest.replace(scores=scores)


def advantages(
  experience: Experience,
  weights: Mapping[str, float],
  *,
  group_size: int | None = None,
  global_std: bool = False,
) -> Float[Array, "T b k"]:
  """Of every transition: the weighted sum of each reward's own advantages.

  Rewards are normalised before they are added (DiNa-LRM mixes 0.2 of a second one), so
  their scales do not matter. What has no finite score gets none. A reward of finished
  samples counts for the transitions that led to them; candidates that were not carried
  on have no part in it.

  Args:
    weights: reward's name -> weight; rewards not named do not count.
    group_size: g; samples of a prompt are neighbours. Only of finished samples, whose
      advantage is that of all their steps.
    global_std: divide by the std of all finished samples, not of their prompt's.

  Raises:
    ValueError: samples that do not make whole groups.
  """
  total = jnp.zeros(experience.log_prob.shape, jnp.float32)
  for name, weight in weights.items():
    scores = experience.scores[name]
    if scores.ndim == 1:
      if not group_size or len(scores) % group_size:
        raise ValueError(f"{len(scores)} samples are not groups of {group_size}")
      groups = scores.reshape(-1, group_size)
      finite = jnp.isfinite(groups)
      each = policy_gradient.group_advantages(groups, finite, global_std=global_std)
      total = total + weight * _of_carried(experience, each.reshape(-1))
    else:
      finite = jnp.isfinite(scores)
      total = total + weight * policy_gradient.group_advantages(scores, finite)
  return total


def _of_carried(
  experience: Experience, advantages: Float[Array, " b"]
) -> Float[Array, "T b k"]:
  """A finished sample's advantage, given to every transition that led to it."""
  k = experience.log_prob.shape[-1]
  return jax.nn.one_hot(experience.chosen, k) * advantages[None, :, None]
