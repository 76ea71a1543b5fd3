"""The programs of alignment: collect experience of a policy, and learn from it.

Two programs per iteration, `collect` and `update` (ReFL has one), pure functions to be
jitted: parameters, prompts, schedules and keys are their arguments, and what one hands
to the other stays on the devices. `align/` has the mathematics, `policy.py` the
generator that is trained.

Axes: p prompts, g samples of a prompt, b = p g samples (those of a prompt are
neighbours), T steps, S steps that are trained on, k candidates, H W C the latent.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from lrm_jax import denoiser as denoiser_lib
from lrm_jax import explore, optim, sample, scorer, train_state
from lrm_jax import policy as policy_lib
from lrm_jax.align import experience, lpo, policy_gradient, refl
from lrm_jax.models import features

METHODS = ("step_grpo", "flow_grpo", "lpo")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the programs of a method are compiled for.

  Attributes:
    method: of METHODS. Flow-GRPO-Fast is flow_grpo with an SDE window in the schedule.
    weights: name of a reward -> weight of its advantage (LPO: of its score). Rewards
      that are not named are only reported.
    group_size: g.
    guidance_scale: of rollouts and updates; 1 is none.
    sampler: of `sample.SAMPLERS`, a stochastic one.
    candidates, chunk: of step_grpo and lpo, see `explore.Explore`.
    clip_range, max_advantage: of the policy gradient.
    kl_coef: weight of the KL divergence from the generator without adapters; 0 leaves
      its computation out.
    micro_batches: parts of the samples, whose gradients are added up.
    threshold: of LPO, (at sigma 0, at sigma 1).
    beta, ratio_clip: of LPO.
  """

  method: str
  weights: Mapping[str, float]
  group_size: int = 24
  guidance_scale: float = 4.5
  sampler: str = "sde"
  candidates: int = 6
  chunk: int | None = None
  clip_range: float = 1e-4
  max_advantage: float = 5.0
  kl_coef: float = 0.01
  micro_batches: int = 1
  threshold: tuple[float, float] = (0.35, 0.5)
  beta: float = 500.0
  ratio_clip: float = 0.1

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f"method={self.method!r}: use one of {', '.join(METHODS)}")
    if not any(self.weights.values()):
      raise ValueError(f"weights={dict(self.weights)} optimise nothing")
    for name in ("group_size", "micro_batches"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
    if self.method == "flow_grpo" and self.group_size < 2:
      raise ValueError("group_size=1: flow_grpo compares the samples of a prompt")
    if self.method != "flow_grpo" and self.candidates < 2:
      raise ValueError(f"candidates={self.candidates}: {self.method} compares them")
    if sample.find_sampler(self.sampler).log_prob is None:
      raise ValueError(f"sampler={self.sampler!r} has no log-probabilities")


@struct.dataclass
class Prompts:
  """What a policy is asked for: cond (p ...), and uncond (1 ...) for guidance."""

  cond: features.Cond
  uncond: features.Cond


@struct.dataclass
class Collected:
  """Of one iteration.

  Attributes:
    x0: (b H W C) the finished samples.
    final: name of a reward -> (b,) their raw scores, as published for generated
      latents.
    experience: without scores.
    signal: (T b k) what is learnt from: advantages, or scores (LPO).
    inputs: the policy's, of all samples; `(cond, uncond)` under guidance.
  """

  x0: jax.Array
  final: dict[str, jax.Array]
  experience: experience.Experience
  signal: jax.Array
  inputs: Any


def make_collect(
  policy: policy_lib.Policy,
  recipe: Recipe,
  levels: Mapping[str, scorer.Level],
  latent: tuple[int, int, int],
) -> Callable:
  """`collect(params, adapters, prompts, schedule, key) -> (Collected, metrics)`, pure.

  Every sample's randomness comes from the key and its number, not from the devices.
  Metrics: `reward/<name>`, the mean raw score of finished samples, and
  `collect/zero_std`, the share of groups that teach nothing.

  Args:
    levels: of each of the denoiser's rewards: where finished samples are scored.
    latent: (H, W, C).

  Raises:
    ValueError: weights of rewards that the denoiser does not have.
  """
  model, sampler = policy.denoiser, sample.find_sampler(recipe.sampler)
  if unknown := sorted(set(recipe.weights) - set(model.rewards)):
    raise ValueError(
      f"weights of {unknown}, but the rewards are {sorted(model.rewards)}"
    )

  def collect(params, adapters, prompts: Prompts, schedule, key):
    inputs, reward_inputs = _inputs(
      model, params, prompts, recipe.group_size, recipe.guidance_scale
    )
    b = len(jax.tree.leaves(inputs)[0])
    keys = _keys(key, b)
    velocity = _guided(policy.velocity_fn(params, adapters), recipe.guidance_scale)
    score = {name: model.reward_fn(params, name) for name in model.rewards}

    def final(name):
      def of_samples(inputs, x0):
        return score[name](inputs, *scorer.at_level(levels[name], x0, keys))

      return of_samples

    finals = {name: final(name) for name in model.rewards}
    x = sample.initial_noise(keys, latent)
    common = dict(keys=keys, sampler=sampler)
    if recipe.method == "flow_grpo":
      x0, made = experience.samples(
        velocity, finals, inputs, reward_inputs, x, schedule, **common
      )
      scores = made.scores
      groups = {
        name: r.reshape(-1, recipe.group_size) for name, r in made.scores.items()
      }
      signal = experience.advantages(made, recipe.weights, group_size=recipe.group_size)
    else:
      x0, made = experience.candidates(
        velocity,
        {name: score[name] for name in recipe.weights},
        inputs,
        {name: reward_inputs[name] for name in recipe.weights},
        x,
        schedule,
        explore.Explore(recipe.candidates, chunk=recipe.chunk),
        **common,
      )
      scores = {name: finals[name](reward_inputs[name], x0) for name in finals}
      groups = made.scores
      if recipe.method == "lpo":
        signal = sum(w * made.scores[name] for name, w in recipe.weights.items())
      else:
        signal = experience.advantages(made, recipe.weights)
    idle = [policy_gradient.zero_std_ratio(groups[name]) for name in recipe.weights]
    metrics = {f"reward/{name}": jnp.mean(r) for name, r in scores.items()}
    metrics["collect/zero_std"] = jnp.mean(jnp.stack(idle))
    made = made.replace(scores={})
    return Collected(x0, scores, made, signal, inputs), metrics

  return collect


def make_update(
  policy: policy_lib.Policy,
  recipe: Recipe,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float | None,
) -> Callable:
  """`update(state, params, collected, steps) -> (state, metrics)`, pure.

  One optimizer step on the mean loss over `steps` (S,) of the schedule and over all
  samples; gradients are added up one step and one micro-batch at a time. `state.params`
  are the adapters.

  Raises (when called):
    ValueError: samples that do not make equal micro-batches.
  """
  sampler, parts = sample.find_sampler(recipe.sampler), recipe.micro_batches

  def loss_at(velocity, reference, inputs, x, x_next, log_prob, signal, at):
    if recipe.method == "lpo":
      return lpo.step_loss(
        velocity,
        reference,
        inputs,
        x,
        x_next,
        signal,
        at,
        sampler=sampler,
        threshold=lpo.threshold_at(at.sigma, *recipe.threshold),
        beta=recipe.beta,
        ratio_clip=recipe.ratio_clip,
      )
    return policy_gradient.step_loss(
      velocity,
      reference if recipe.kl_coef else None,
      inputs,
      x,
      x_next,
      log_prob,
      signal,
      at,
      sampler=sampler,
      clip_range=recipe.clip_range,
      kl_coef=recipe.kl_coef,
      max_advantage=recipe.max_advantage,
    )

  def update(state, params, collected: Collected, steps):
    made = experience.take_steps(collected.experience, steps)
    num_steps, b = made.x.shape[:2]
    if b % parts:
      raise ValueError(f"{b} samples do not make {parts} equal micro-batches")

    def split(a, axis):  # sample i goes to part i % parts: no data moves
      shape = (*a.shape[:axis], b // parts, parts, *a.shape[axis + 1 :])
      return jnp.moveaxis(a.reshape(shape), axis + 1, axis)

    inputs = jax.tree.map(lambda a: split(a, 0), collected.inputs)
    rows = (made.x, made.x_next, made.log_prob, collected.signal[jnp.asarray(steps)])
    rows = jax.tree.map(lambda a: split(a, 1), rows)  # (S parts b/parts ...)
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rows)
    at = jax.tree.map(lambda a: jnp.repeat(a, parts), made.at)
    part = jnp.tile(jnp.arange(parts), num_steps)
    reference = _guided(policy.denoiser.velocity_fn(params), recipe.guidance_scale)

    def loss_fn(adapters, item):
      rows, at, part = item
      velocity = _guided(policy.velocity_fn(params, adapters), recipe.guidance_scale)
      mine = jax.tree.map(lambda a: a[part], inputs)
      return loss_at(velocity, reference, mine, *rows, at)

    loss, metrics, grads = optim.mean_gradients(loss_fn, state.params, (rows, at, part))
    return _step(state, grads, loss, metrics, tx, ema_decay)

  return update


def make_refl_update(
  policy: policy_lib.Policy,
  reward: str,
  level: scorer.Level,
  tx: optax.GradientTransformation,
  latent: tuple[int, int, int],
  *,
  guidance_scale: float,
  window: tuple[int, int],
  target: float,
  ema_decay: float | None,
) -> Callable:
  """`update(state, params, prompts, schedule, key) -> (state, metrics)`, pure.

  ReFL: the gradient of one reward, through one late step of the ODE.

  Args:
    level: where the prediction of the clean latent is scored.
    guidance_scale: of the rollout; the step with gradients is unguided.
    window: that step is one of `start <= i < stop`, drawn evenly.
    target: of the loss, on the reported scale.

  Raises:
    ValueError: an empty window, or (when called) one outside the schedule.
  """
  start, stop = window
  if not 0 <= start < stop:
    raise ValueError(f"the window {start}:{stop} of ReFL is empty")
  model = policy.denoiser
  scoring = model.rewards[reward].scoring

  def update(state, params, prompts: Prompts, schedule, key):
    if stop > len(schedule):
      raise ValueError(
        f"the window {start}:{stop} of ReFL is outside the {len(schedule)} steps"
      )
    inputs, reward_inputs = _inputs(model, params, prompts, 1, guidance_scale)
    cond = inputs if guidance_scale == 1 else inputs[0]
    keys = _keys(key, len(cond.pooled))
    at = jax.random.randint(key, (), start, stop)
    x = refl.rollout_until(
      _guided(policy.velocity_fn(params, state.params), guidance_scale),
      inputs,
      sample.initial_noise(keys, latent),
      schedule,
      at,
    )
    sigma = jnp.broadcast_to(jnp.asarray(schedule.sigma)[at], keys.shape)

    def score(x0):
      noisy = scorer.at_level(level, x0, keys)
      raw = model.reward_fn(params, reward)(reward_inputs[reward], *noisy)
      return (raw + scoring.offset) / scoring.scale

    def loss_fn(adapters):
      velocity = policy.velocity_fn(params, adapters)
      return refl.loss(velocity, score, cond, x, sigma, target=target)

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return _step(state, grads, loss, metrics, tx, ema_decay)

  return update


def _step(state, grads, loss, metrics, tx, ema_decay):
  """The optimizer step, and its metrics: means over micro-batches."""
  metrics = {f"train/{name}": jnp.mean(value) for name, value in metrics.items()}
  metrics |= {"train/loss": loss, "train/grad_norm": optax.tree.norm(grads)}
  return train_state.apply_gradients(state, grads, tx, ema_decay=ema_decay), metrics


def _keys(key: jax.Array, num: int) -> jax.Array:
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num))


def _guided(velocity: sample.VelocityFn, scale: float) -> sample.VelocityFn:
  return velocity if scale == 1 else sample.guide(velocity, scale)


def _inputs(
  model: denoiser_lib.Denoiser,
  params: Any,
  prompts: Prompts,
  group_size: int,
  guidance_scale: float,
) -> tuple[Any, dict[str, Any]]:
  """The policy's inputs and each reward's, g rows in a row for each prompt."""
  embedded = model.embed(params, prompts.cond)
  embedded = explore.repeat_rows(embedded, group_size)
  inputs = embedded[denoiser_lib.GENERATOR]
  if guidance_scale != 1:
    uncond = model.embed(params, prompts.uncond)[denoiser_lib.GENERATOR]
    shape = lambda a, like: jnp.broadcast_to(a, like.shape)  # noqa: E731
    inputs = inputs, jax.tree.map(shape, uncond, inputs)
  return inputs, model.reward_inputs(embedded)
