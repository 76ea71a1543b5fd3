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
import numpy as np
import optax

from lrm_jax import denoiser as denoiser_lib
from lrm_jax import explore, optim, sample, scorer, train_state
from lrm_jax import policy as policy_lib
from lrm_jax.align import experience, lpo, policy_gradient, refl
from lrm_jax.models import features

METHODS = ("step_grpo", "flow_grpo", "lpo")
# Folded into an iteration's key, beyond all numbers of samples.
LATE_STEP, REAL = 2**31, 2**31 + 1
# Pins arrays whose first axis is samples to their devices.
Constrain = Callable[[Any], Any]


def _same(tree: Any) -> Any:
  return tree


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the programs of a method are compiled for.

  Attributes:
    method: of METHODS. Flow-GRPO-Fast is flow_grpo with an SDE window in the schedule.
    weights: name of a reward -> weight of its advantage (LPO: of its score). Rewards
      that are not named are only reported.
    finished: the same of rewards that the denoiser does not have, whose scores of
      finished samples come from elsewhere: see `with_finished`.
    group_size: g.
    global_std: finished samples' advantages are in units of all their rewards' std,
      not of their prompt's.
    guidance_scale: of rollouts and updates; 1 is none.
    sampler: of `sample.SAMPLERS`, a stochastic one.
    candidates, chunk: of step_grpo and lpo, see `explore.Explore`.
    clip_range, max_advantage: of the policy gradient.
    kl_coef: weight of the KL divergence from the generator without adapters; 0 leaves
      its computation out.
    rollout_parts: of the samples, which are rolled out one after another. Changes
      memory only, as micro_batches and chunk.
    minibatches: parts of the samples; each makes an optimizer step.
    micro_batches: parts of a minibatch, whose gradients are added up.
    threshold: of LPO, (at sigma 0, at sigma 1).
    beta, ratio_clip: of LPO.
  """

  method: str
  weights: Mapping[str, float]
  finished: Mapping[str, float] = dataclasses.field(default_factory=dict)
  group_size: int = 24
  global_std: bool = False
  guidance_scale: float = 4.5
  sampler: str = "sde"
  candidates: int = 6
  chunk: int | None = None
  clip_range: float = 1e-4
  max_advantage: float = 5.0
  kl_coef: float = 0.01
  rollout_parts: int = 1
  minibatches: int = 1
  micro_batches: int = 1
  threshold: tuple[float, float] = (0.35, 0.5)
  beta: float = 500.0
  ratio_clip: float = 0.1

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f"method={self.method!r}: use one of {', '.join(METHODS)}")
    if not any([*self.weights.values(), *self.finished.values()]):
      raise ValueError(f"weights={dict(self.weights)} optimise nothing")
    for name in ("group_size", "rollout_parts", "minibatches", "micro_batches"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
    if self.method == "lpo" and self.finished:
      raise ValueError(
        f"lpo compares candidates, it cannot learn from {sorted(self.finished)}, "
        "rewards of finished samples"
      )
    if self.group_size < 2 and (self.method == "flow_grpo" or self.finished):
      raise ValueError(
        f"group_size=1: {self.method} compares finished samples of a prompt"
      )
    if self.global_std and self.method != "flow_grpo" and not self.finished:
      raise ValueError(f"global_std=True: {self.method} compares no finished samples")
    if self.method != "flow_grpo" and self.candidates < 2:
      raise ValueError(f"candidates={self.candidates}: {self.method} compares them")
    if self.method != "flow_grpo":
      explore.Explore(self.candidates, chunk=self.chunk)  # says what does not fit
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

  x0: Any  # or shapes, or shardings
  final: Any
  experience: experience.Experience
  signal: Any
  inputs: Any


def make_collect(
  policy: policy_lib.Policy,
  recipe: Recipe,
  levels: Mapping[str, scorer.Level],
  latent: tuple[int, int, int],
  *,
  constrain: Constrain = _same,
) -> Callable:
  """`collect(params, adapters, prompts, schedule, key) -> (Collected, metrics)`, pure.

  Every sample's randomness comes from the key and its number, not from the devices.
  Metrics: `reward/<name>`, the mean raw score of finished samples; of the rewards with
  a weight, `collect/zero_std`, the share of groups that teach nothing, and
  `collect/bad`, the share of scores that are not finite (they teach nothing either).

  Args:
    levels: of each of the denoiser's rewards: where finished samples are scored.
    latent: (H, W, C).
    constrain: pins arrays whose first axis is samples to their devices.

  Raises:
    ValueError: weights of rewards that the denoiser does not have, or (when called)
      samples that do not make equal parts.
  """
  model, sampler = policy.denoiser, sample.find_sampler(recipe.sampler)
  if unknown := sorted(set(recipe.weights) - set(model.rewards)):
    raise ValueError(
      f"weights of {unknown}, but the rewards are {sorted(model.rewards)}"
    )

  def collect(params, adapters, prompts: Prompts, schedule, key):
    inputs, reward_inputs, keys = _inputs(
      model, params, prompts, recipe.group_size, recipe.guidance_scale, key, constrain
    )
    velocity = _guided(policy.velocity_fn(params, adapters), recipe.guidance_scale)
    score = {name: model.reward_fn(params, name) for name in model.rewards}

    def roll_out(inputs, reward_inputs, keys):
      finals = _final_rewards(model, params, levels, keys)
      x = constrain(sample.initial_noise(keys, latent))
      common = dict(keys=keys, sampler=sampler)
      if recipe.method == "flow_grpo":
        x0, made = experience.samples(
          velocity, finals, inputs, reward_inputs, x, schedule, **common
        )
        return (x0, made.scores), made.replace(at=None, scores={})
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
      return (x0, scores), made.replace(at=None)

    (x0, scores), made = _in_parts(
      roll_out, recipe.rollout_parts, inputs, reward_inputs, keys
    )
    made = made.replace(at=jax.tree.map(jnp.asarray, schedule))
    if recipe.method == "flow_grpo":
      groups = {name: r.reshape(-1, recipe.group_size) for name, r in scores.items()}
      signal = experience.advantages(
        made.replace(scores=scores),
        recipe.weights,
        group_size=recipe.group_size,
        global_std=recipe.global_std,
      )
    else:
      groups = made.scores
      if recipe.method == "lpo":
        signal = sum(w * made.scores[name] for name, w in recipe.weights.items())
      else:
        signal = experience.advantages(made, recipe.weights)
    metrics = {f"reward/{name}": _finite_mean(r) for name, r in scores.items()}
    if recipe.weights:
      # Steps outside of the exploring window have no scores at all.
      used = schedule.explore & (jnp.asarray(schedule.noise_level) > 0)
      metrics |= _teaching(groups, recipe.weights, used)
    made = made.replace(scores={})
    return Collected(x0, scores, made, signal, inputs), metrics

  return collect


def _in_parts(function: Callable, parts: int, *rows: Any) -> tuple[Any, Any]:
  """`function(*rows)`, for one part of the rows after another.

  Args:
    function: `rows (b ...) -> (leaves (b ...), leaves (T b ...))`.

  Raises:
    ValueError: rows that do not make equal parts.
  """
  if parts == 1:
    return function(*rows)
  b = len(jax.tree.leaves(rows)[0])
  if b % parts:
    raise ValueError(f"{b} samples do not make {parts} equal parts of a rollout")

  def split(a):  # row i goes to part i % parts: no data moves between devices
    return jnp.moveaxis(a.reshape(b // parts, parts, *a.shape[1:]), 1, 0)

  def join(a, axis):
    a = jnp.moveaxis(a, 0, axis + 1)
    return a.reshape(*a.shape[:axis], b, *a.shape[axis + 2 :])

  first, late = jax.lax.map(lambda rows: function(*rows), jax.tree.map(split, rows))
  return (
    jax.tree.map(lambda a: join(a, 0), first),
    jax.tree.map(lambda a: join(a, 1), late),
  )


def _teaching(groups: Mapping, weights: Mapping, used) -> dict[str, jax.Array]:
  """`collect/zero_std` and `collect/bad`; groups are (..., g) or (T b k)."""
  idle, bad = [], []
  for name in weights:
    scores = groups[name]
    share = 1.0
    if scores.ndim == 3:
      share = jnp.mean(used.astype(jnp.float32))
      scores = jnp.where(used[:, None, None], scores, jnp.arange(scores.shape[-1]))
    idle.append(policy_gradient.zero_std_ratio(scores) / share)
    bad.append(jnp.mean((~jnp.isfinite(scores)).astype(jnp.float32)) / share)
  return {
    "collect/zero_std": jnp.mean(jnp.stack(idle)),
    "collect/bad": jnp.mean(jnp.stack(bad)),
  }


def _finite_mean(scores: jax.Array) -> jax.Array:
  """The mean of what is finite, NaN where nothing is."""
  finite = jnp.isfinite(scores)
  return jnp.sum(jnp.where(finite, scores, 0)) / jnp.sum(finite)


def with_finished(
  recipe: Recipe, collected: Collected, scores: Mapping[str, jax.Array]
) -> tuple[Collected, dict[str, jax.Array]]:
  """Adds the advantages of rewards that looked at finished samples elsewhere.

  For instance at their pixels. Each is normalised within its prompt's group, and
  counts for the transitions that led to the sample. Pure.

  Args:
    scores: name -> (b,), for every name of `recipe.finished`.

  Returns: the experience to learn from, and the metric `collect/zero_std_finished`.
  """
  group_size = recipe.group_size
  made = collected.experience.replace(scores=dict(scores))
  more = experience.advantages(
    made, recipe.finished, group_size=group_size, global_std=recipe.global_std
  )
  idle = [
    policy_gradient.zero_std_ratio(scores[name].reshape(-1, group_size))
    for name in recipe.finished
  ]
  metrics = {"collect/zero_std_finished": jnp.mean(jnp.stack(idle))}
  return collected.replace(signal=collected.signal + more), metrics


def make_evaluate(
  policy: policy_lib.Policy,
  levels: Mapping[str, scorer.Level],
  latent: tuple[int, int, int],
  *,
  num: int,
  guidance_scale: float,
  sampler: str = "euler",
  constrain: Constrain = _same,
) -> Callable:
  """`evaluate(params, adapters, prompts, schedule, key) -> (x0, scores, distance)`.

  Pure. `num` samples of each prompt, neighbours; the same key gives the same noise, so
  that evaluations of a run can be compared. x0 (b H W C), scores name -> (b,) as
  published for generated latents, distance (p,): the root mean square difference of
  two samples of a prompt, per latent value: its diversity.

  Raises:
    ValueError: fewer than two samples.
  """
  if num < 2:
    raise ValueError(f"{num} sample(s) of a prompt have no diversity: use two or more")
  model = policy.denoiser

  def evaluate(params, adapters, prompts: Prompts, schedule, key):
    inputs, reward_inputs, keys = _inputs(
      model, params, prompts, num, guidance_scale, key, constrain
    )
    velocity = _guided(policy.velocity_fn(params, adapters), guidance_scale)
    x = constrain(sample.initial_noise(keys, latent))
    x0, _ = sample.rollout(
      velocity,
      inputs,
      x,
      schedule,
      sampler=sample.find_sampler(sampler),
      keys=keys,
    )
    finals = _final_rewards(model, params, levels, keys)
    scores = {name: finals[name](reward_inputs[name], x0) for name in finals}
    return x0, scores, _distance(x0.reshape(-1, num, *latent))

  return evaluate


def _distance(x: jax.Array) -> jax.Array:
  """(p,) root mean square difference of two of the samples x (p g H W C)."""
  g = x.shape[1]
  # The mean over all pairs is twice the variance, ddof 1.
  variance = jnp.sum((x - x.mean(axis=1, keepdims=True)) ** 2, axis=1) / (g - 1)
  return jnp.sqrt(2 * jnp.mean(variance, axis=(1, 2, 3)))


def _final_rewards(model, params, levels, keys) -> dict[str, Callable]:
  """Each reward, of finished samples at its own level: `(inputs, x0) -> (b,)`."""

  def of(name):
    score = model.reward_fn(params, name)
    return lambda inputs, x0: score(inputs, *scorer.at_level(levels[name], x0, keys))

  return {name: of(name) for name in model.rewards}


def make_update(
  policy: policy_lib.Policy,
  recipe: Recipe,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float | None,
) -> Callable:
  """`update(state, params, collected, steps, minibatch=0) -> (state, metrics)`, pure.

  One optimizer step on the mean loss over `steps` (S,) of the schedule and over the
  samples of a minibatch, one of 0 .. recipe.minibatches - 1; gradients are added up one
  step and one micro-batch at a time. `state.params` are the adapters.

  Raises (when called):
    ValueError: samples that do not make equal parts.
  """
  sampler, micro = sample.find_sampler(recipe.sampler), recipe.micro_batches
  parts = micro * recipe.minibatches

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

  def update(state, params, collected: Collected, steps, minibatch=0):
    made = experience.take_steps(collected.experience, steps)
    num_steps, b = made.x.shape[:2]
    if b % parts:
      raise ValueError(
        f"{b} samples do not make {recipe.minibatches} minibatches of {micro} equal "
        "micro-batches"
      )

    def split(a, axis):  # sample i goes to part i % parts: no data moves
      shape = (*a.shape[:axis], b // parts, parts, *a.shape[axis + 1 :])
      a = a.reshape(shape)
      a = jax.lax.dynamic_slice_in_dim(a, minibatch * micro, micro, axis + 1)
      return jnp.moveaxis(a, axis + 1, axis)

    inputs = jax.tree.map(lambda a: split(a, 0), collected.inputs)
    rows = (made.x, made.x_next, made.log_prob, collected.signal[jnp.asarray(steps)])
    rows = jax.tree.map(lambda a: split(a, 1), rows)  # (S micro b/parts ...)
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rows)
    at = jax.tree.map(lambda a: jnp.repeat(a, micro), made.at)
    part = jnp.tile(jnp.arange(micro), num_steps)
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
  real_weight: float = 0.0,
  constrain: Constrain = _same,
) -> Callable:
  """`update(state, params, prompts, schedule, key, real) -> (state, metrics)`, pure.

  ReFL: the gradient of one reward, through one late step of the ODE. `real` are real
  data, (x0 (n H W C), cond (n ...)), or None.

  Args:
    level: where the prediction of the clean latent is scored.
    guidance_scale: of the rollout; the step with gradients is unguided.
    window: that step is one of `start <= i < stop`, drawn evenly.
    target: of the loss, on the reported scale.
    real_weight: of the flow-matching loss on the real data, which keeps the policy
      near them; noise levels as SD3 draws them, logit-normal(0, 1). 0: none.
    constrain: pins arrays whose first axis is samples to their devices.

  Raises:
    ValueError: an empty window, or (when called) one outside the schedule.
  """
  start, stop = window
  if not 0 <= start < stop:
    raise ValueError(f"the window {start}:{stop} of ReFL is empty")
  model = policy.denoiser
  scoring = model.rewards[reward].scoring

  def real_loss(velocity, params, real, key):
    x0, cond = constrain(real)
    inputs = model.embed(params, cond)[denoiser_lib.GENERATOR]
    sigma_key, eps_key = jax.random.split(jax.random.fold_in(key, REAL))
    sigma = jax.nn.sigmoid(jax.random.normal(sigma_key, (len(x0),)))
    eps = jax.random.normal(eps_key, x0.shape)
    return refl.flow_matching_loss(velocity, inputs, x0, eps, sigma)

  def update(state, params, prompts: Prompts, schedule, key, real=None):
    if (real is None) != (real_weight == 0):
      raise ValueError(f"real_weight={real_weight}, real data: {real is not None}")
    if stop > len(schedule):
      raise ValueError(
        f"the window {start}:{stop} of ReFL is outside the {len(schedule)} steps"
      )
    inputs, reward_inputs, keys = _inputs(
      model, params, prompts, 1, guidance_scale, key, constrain
    )
    cond = inputs if guidance_scale == 1 else inputs[0]
    at = jax.random.randint(jax.random.fold_in(key, LATE_STEP), (), start, stop)
    x = refl.rollout_until(
      _guided(policy.velocity_fn(params, state.params), guidance_scale),
      inputs,
      constrain(sample.initial_noise(keys, latent)),
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
      loss, metrics = refl.loss(velocity, score, cond, x, sigma, target=target)
      if real is not None:
        flow_loss = real_loss(velocity, params, real, key)
        loss = loss + real_weight * flow_loss
        metrics = {**metrics, "flow_loss": jax.lax.stop_gradient(flow_loss)}
      return loss, metrics

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return _step(state, grads, loss, metrics, tx, ema_decay)

  return update


def passes(
  policy: policy_lib.Policy,
  recipe: Recipe | None,
  schedule: sample.Schedule,
  *,
  num_trained: int,
  inner_epochs: int,
  guidance_scale: float,
  refl: tuple[str, tuple[int, int]] | None = None,
) -> dict[str, float]:
  """What an iteration costs per sample, in forward passes of the whole generator.

  Guidance doubles a velocity; a score counts by its blocks; a backward pass counts two
  forward ones; the reference of KL and LPO is one more. Rewards that are only reported
  are left out, and so is recomputation.

  Args:
    recipe: None for ReFL, which `refl` then describes: its reward and its window.
    num_trained: S.

  Returns: `collect`, and `update` (all updates together). ReFL only updates.
  """
  model = policy.denoiser
  blocks = {
    name: part.config.backbone.num_layers / model.config.num_layers
    for name, part in model.rewards.items()
  }
  guided = 1 + (guidance_scale != 1)
  if recipe is None:
    name, (start, stop) = refl
    return {"update": guided * (start + stop - 1) / 2 + 3 * (1 + blocks[name])}
  scoring = sum(blocks[name] for name in recipe.weights)
  if recipe.method != "flow_grpo":
    explored = np.asarray(schedule.explore) & (np.asarray(schedule.noise_level) > 0)
    scoring *= recipe.candidates * explored.sum()
  reference = recipe.method == "lpo" or recipe.kl_coef > 0
  update = inner_epochs * num_trained * guided * (3 + reference)
  return {"collect": float(guided * len(schedule) + scoring), "update": float(update)}


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
  key: jax.Array,
  constrain: Constrain,
) -> tuple[Any, dict[str, Any], jax.Array]:
  """The policy's inputs, each reward's, and keys: g rows in a row for each prompt."""
  embedded = model.embed(params, prompts.cond)
  embedded = constrain(explore.repeat_rows(embedded, group_size))
  inputs = embedded[denoiser_lib.GENERATOR]
  if guidance_scale != 1:
    uncond = model.embed(params, prompts.uncond)[denoiser_lib.GENERATOR]
    shape = lambda a, like: jnp.broadcast_to(a, like.shape)  # noqa: E731
    inputs = inputs, jax.tree.map(shape, uncond, inputs)
  keys = constrain(_keys(key, len(embedded[denoiser_lib.GENERATOR].pooled)))
  return inputs, model.reward_inputs(embedded), keys
