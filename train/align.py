"""Aligns a generator with reward models: Step-GRPO, Flow-GRPO, LPO, ReFL.

  python train/align.py --config configs/sd35m_step_grpo.py
  python train/align.py --config configs/quickstart_align.py:flow_grpo

On several hosts, the same command on each (`--coordinator auto` on TPU pods and Slurm),
as train/reward.py. Without the devices, how an iteration would fit them:

  python train/align.py --config configs/sd35m_step_grpo.py --aot v5p:2x2x1

Leaves in `workdir`: checkpoints (the same command continues from the newest; SIGTERM
saves one), metrics as JSONL and TensorBoard, `prompts.jsonl` (each prompt's rewards),
`run.json`, `sheets/` (the same prompts and seeds through training), `progress.png`,
`through_training.png`, and the adapters as model folders: `lora`, and `best_lora` where
another step was best. docs/alignment.md.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
from PIL import Image

from lrm_jax import (
  alignment,
  aot,
  build,
  checkpoint,
  denoiser,
  encoders,
  flops,
  flow,
  optim,
  plots,
  policy,
  processes,
  run_log,
  sample,
  scorer,
  sharding,
  sheets,
  train_state,
  trainers,
)
from lrm_jax import folder as folder_lib
from lrm_jax.align import experience
from lrm_jax.data import digits, prompt_cache
from lrm_jax.data import loader as loader_lib
from lrm_jax.data import plan as plan_lib
from lrm_jax.data import prompts as prompts_lib
from lrm_jax.models import attention, features, lora

METHODS = (*alignment.METHODS, "refl")
# Settings that may change between a run and its continuation.
MAY_CHANGE = (
  r"workdir|wandb_project|mesh\..*|aot\..*|compare\..*|eval\.images|golden\..*|"
  r"train\.(num_iterations|rollout_parts|micro_batches|log_every|checkpoint_every|keep_.*)"
)
TARGETS = {"joint_attention": lora.JOINT_ATTENTION, "all_attention": lora.ALL_ATTENTION}
SHEET_ROWS, SHEET_COLUMNS = 10, 8
# What an image's callable is given: (images (b H W 3) uint8, prompts) -> (b,) scores.
PixelReward = Callable[[np.ndarray, Sequence[str]], Any]


# --- a config as objects -----------------------------------------------------------


def make_recipe(config: ConfigDict) -> alignment.Recipe | None:
  """The recipe of a config; None for ReFL, which has none.

  Raises:
    ValueError: an impossible combination; the message names the key.
  """
  if config.method not in METHODS:
    raise ValueError(f"method={config.method!r}: use one of {', '.join(METHODS)}")
  weights, finished = (
    {name: float(term.weight) for name, term in terms.items() if term.weight}
    for terms in (config.rewards, config.pixel_rewards)
  )
  golden = config.golden.metric
  if golden is not None:
    known = {f"reward/{name}": term for name, term in config.rewards.items()}
    known |= {f"pixel/{name}": term for name, term in config.pixel_rewards.items()}
    if golden not in known:
      raise ValueError(f"golden.metric={golden!r}: use one of {sorted(known)} or None")
    if known[golden].weight:
      raise ValueError(
        f"golden.metric={golden!r} has weight {known[golden].weight}: a golden reward "
        "is held out, its weight must be 0"
      )
  if config.method == "refl":
    if len(weights) != 1 or finished:
      raise ValueError(
        f"refl follows the gradient of one latent reward, not of {sorted(weights)} and "
        f"{sorted(finished)}: give one of `rewards` a weight, and no pixel reward"
      )
    start, stop = config.loss.window
    if not 0 <= start < stop <= config.rollout.num_steps:
      raise ValueError(
        f"loss.window={(start, stop)} is not within 0:{config.rollout.num_steps}, the "
        "steps"
      )
    return None
  options = dict(config.loss)
  if "threshold" in options:
    options["threshold"] = tuple(options["threshold"])
  return alignment.Recipe(
    method=config.method,
    weights=weights,
    finished=finished,
    guidance_scale=config.rollout.guidance_scale,
    sampler=config.rollout.sampler,
    rollout_parts=config.train.rollout_parts,
    minibatches=config.train.minibatches,
    micro_batches=config.train.micro_batches,
    **dict(config.group),
    **options,
  )


@dataclasses.dataclass(frozen=True)
class Steps:
  """Which steps of a rollout are stochastic, explored, and trained on.

  Attributes:
    sigmas: (T+1,).
    count: S, how many are trained on.
  """

  sigmas: np.ndarray
  count: int
  noise_level: float
  window_size: int | None
  window_range: tuple[int, int]

  @classmethod
  def of(cls, config: ConfigDict) -> "Steps":
    """Raises ValueError: steps that do not fit the schedule."""
    c = config.rollout
    total, size = c.num_steps, c.sde_window_size
    start, stop = c.sde_window_range or (0, total)
    if not 0 <= start < stop <= total:
      raise ValueError(
        f"rollout.sde_window_range={(start, stop)} is not within 0:{total}, the steps"
      )
    if size is None:
      fraction = config.train.timestep_fraction
      count = int(total * fraction)
      if not 0 < fraction <= 1 or count < 1:
        raise ValueError(
          f"train.timestep_fraction={fraction} leaves {count} of {total} steps"
        )
      count, start = min(count, stop) - start, start
      if count < 1:
        raise ValueError(
          f"rollout.sde_window_range={(start, stop)} and train.timestep_fraction="
          f"{fraction} leave no step to train on"
        )
    elif not 1 <= size <= stop - start:
      raise ValueError(
        f"rollout.sde_window_size={size} does not fit into the steps {start}:{stop}"
      )
    else:
      count = size
    sigmas = flow.sampling_sigmas(total, c.shift)
    return cls(sigmas, count, c.noise_level, size, (start, stop))

  def draw(self, iteration: int, seed: int) -> tuple[sample.Schedule, np.ndarray]:
    """(schedule, steps (S,) to train on) of an iteration.

    Flow-GRPO-Fast: a window of steps at random is stochastic, the others are the ODE's.
    Else all steps of the range are, and the first S of them are trained on.
    """
    start, stop = self.window_range
    if self.window_size is not None:
      # The prompts' orders are drawn from (seed, epoch).
      rng = np.random.default_rng([seed, iteration, 1])
      start = int(rng.integers(start, stop - self.window_size + 1))
      stop = start + self.window_size
    trained = (start, start + self.count)
    schedule = sample.make_schedule(
      self.sigmas,
      noise_level=self.noise_level,
      sde_window=(start, stop),
      explore_window=trained,
    )
    return schedule, np.arange(*trained)


def load_pixel_reward(name: str, function: str) -> PixelReward:
  """`package.module:function` of a config.

  Raises:
    ValueError: there is no such function.
  """
  module, colon, attribute = function.partition(":")
  key = f"pixel_rewards.{name}.function={function!r}"
  if not colon:
    raise ValueError(f"{key} must be 'package.module:function'")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as e:
    raise ValueError(
      f"{key} cannot be imported: {e}; a module of your own must be on PYTHONPATH"
    ) from e
  if not callable(found):
    raise ValueError(f"{key} is {found!r}, which cannot be called")
  return found


def check_sizes(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError: numbers of samples that do not fit devices or minibatches."""
  devices, train = sharding.batch_size_divisor(mesh), config.train
  group = 1 if config.method == "refl" else config.group.group_size
  for name in ("num_iterations", "prompts", "inner_epochs"):
    if train[name] < 1:
      raise ValueError(f"train.{name}={train[name]} must be 1 or more")
  parts = ("rollout_parts", "minibatches", "micro_batches")
  if config.method == "refl" and any(train[name] != 1 for name in parts):
    raise ValueError(f"refl takes one step per iteration: {', '.join(parts)} must be 1")
  for kind, divisor in (
    ("minibatches x micro-batches", train.minibatches * train.micro_batches),
    ("rollout_parts", train.rollout_parts),
  ):
    if divisor < 1 or train.prompts * group % (devices * divisor):
      raise ValueError(
        f"train.prompts={train.prompts} in groups of {group} must be a multiple of "
        f"{devices * divisor}: {devices} devices, times {divisor} {kind}"
      )
  if config.method == "refl" and config.real.weight:
    size = config.real.batch_size
    if size < 1 or size % devices:
      raise ValueError(
        f"real.batch_size={size} must be a multiple of the {devices} devices"
      )
  samples = config.eval.prompts * config.eval.num
  if config.eval.prompts < 1 or samples % devices:
    raise ValueError(
      f"eval.prompts={config.eval.prompts} times eval.num={config.eval.num} must be a "
      f"multiple of the {devices} devices"
    )


# --- programs ----------------------------------------------------------------------


@dataclasses.dataclass
class Programs:
  """What a config is compiled to; parameters are arguments.

  Attributes:
    collect, with_finished, update, evaluate: of lrm_jax.alignment, jitted. ReFL has
      the last two only; `update` is its own.
    share: puts results that the host reads on every device.
    state: abstract train state, whose parameters are adapters.
    passes: of the generator, per sample and iteration; see `alignment.passes`.
  """

  config: ConfigDict
  mesh: jax.sharding.Mesh
  policy: policy.Policy
  recipe: alignment.Recipe | None
  steps: Steps
  latent: tuple[int, int, int]
  tx: optax.GradientTransformation
  state: train_state.TrainState
  collect: Callable | None
  with_finished: Callable | None
  update: Callable
  evaluate: Callable
  share: Callable
  passes: dict[str, float]

  @property
  def replicated(self) -> jax.sharding.NamedSharding:
    return sharding.replicated(self.mesh)

  @property
  def samples(self) -> int:
    """Of one iteration."""
    group = 1 if self.recipe is None else self.recipe.group_size
    return self.config.train.prompts * group

  @property
  def cost(self) -> float:
    """Passes of the generator that an iteration takes."""
    return sum(self.passes.values()) * self.samples


def make_programs(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  model: denoiser.Denoiser,
  levels: Mapping[str, scorer.Level],
  latent: tuple[int, int, int],
) -> Programs:
  """Jits everything; allocates nothing.

  Raises:
    ValueError: a config that makes no sense; the message names the key.
  """
  recipe, steps = make_recipe(config), Steps.of(config)
  check_sizes(config, mesh)
  if config.lora.targets not in TARGETS:
    raise ValueError(
      f"lora.targets={config.lora.targets!r}: use one of {', '.join(TARGETS)}"
    )
  adapters = lora.LoRAConfig(
    config.lora.rank, config.lora.alpha, TARGETS[config.lora.targets]
  )
  made = policy.make(model, adapters, remat=config.model.remat)
  train, replicated = config.train, sharding.replicated(mesh)
  updates = train.inner_epochs * train.minibatches
  schedule = optim.make_schedule(
    train.schedule,
    learning_rate=train.learning_rate,
    warmup_steps=train.warmup_steps,
    num_steps=train.num_iterations * updates,
  )
  tx = optim.make_tx(
    schedule, weight_decay=train.weight_decay, clip_norm=train.clip_norm
  )
  state = jax.eval_shape(functools.partial(create_state, made, tx, config))
  constrain = functools.partial(
    jax.lax.with_sharding_constraint, shardings=sharding.batch_sharding(mesh)
  )
  common = dict(constrain=constrain)
  collect = with_finished = None
  if recipe is None:
    (name,) = (name for name, term in config.rewards.items() if term.weight)
    update = alignment.make_refl_update(
      made,
      name,
      levels[name],
      tx,
      latent,
      guidance_scale=config.rollout.guidance_scale,
      window=tuple(config.loss.window),
      target=config.loss.target,
      real_weight=config.real.weight,
      ema_decay=train.ema_decay,
      **common,
    )
  else:
    collect = jax.jit(
      alignment.make_collect(made, recipe, levels, latent, **common),
      out_shardings=(collected_shardings(mesh), replicated),
    )
    update = alignment.make_update(made, recipe, tx, ema_decay=train.ema_decay)
    if recipe.finished:
      with_finished = jax.jit(functools.partial(alignment.with_finished, recipe))
  evaluate = alignment.make_evaluate(
    made,
    levels,
    latent,
    num=config.eval.num,
    guidance_scale=config.eval.guidance_scale,
    sampler=config.eval.sampler,
    **common,
  )
  passes = alignment.passes(
    made,
    recipe,
    steps.draw(0, 0)[0],
    num_trained=steps.count,
    inner_epochs=train.inner_epochs,
    guidance_scale=config.rollout.guidance_scale,
    refl=None if recipe is not None else (name, tuple(config.loss.window)),
  )
  return Programs(
    config=config,
    mesh=mesh,
    policy=made,
    recipe=recipe,
    steps=steps,
    latent=latent,
    tx=tx,
    state=state,
    collect=collect,
    with_finished=with_finished,
    update=jax.jit(update, donate_argnums=0, out_shardings=replicated),
    evaluate=jax.jit(evaluate, out_shardings=replicated),
    share=jax.jit(lambda tree: tree, out_shardings=replicated),
    passes=passes,
  )


def collected_shardings(mesh: jax.sharding.Mesh) -> alignment.Collected:
  """What is collected stays where its samples are (a prefix of the tree)."""
  everywhere, samples = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  steps = sharding.batch_sharding(mesh, leading=1)  # (T b ...)
  return alignment.Collected(
    x0=samples,
    final=everywhere,  # scores are written by one process: each has all of them
    experience=experience.Experience(
      at=everywhere, x=steps, x_next=steps, log_prob=steps, chosen=steps, scores={}
    ),
    signal=steps,
    inputs=samples,
  )


def create_state(
  made: policy.Policy, tx: optax.GradientTransformation, config: ConfigDict
) -> train_state.TrainState:
  """The state before the first update."""
  adapters = made.init(jax.random.fold_in(jax.random.key(config.seed), 0))
  return train_state.create(adapters, tx, use_ema=config.train.ema_decay is not None)


# --- prompts and pixels ------------------------------------------------------------


def prompt_sharding(num: int, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Each device keeps the prompts of its samples; all of them where `num` is uneven.

  Embeddings are 1.7 MB per prompt, and a pod has thousands of prompts in a step.
  """
  split = num % mesh.size == 0
  return sharding.batch_sharding(mesh) if split else sharding.replicated(mesh)


class Text:
  """Embeddings of prompts: from a cache, or of the text encoders; on the devices."""

  def __init__(self, config: ConfigDict, context_dim: int, mesh: jax.sharding.Mesh):
    self._mesh = mesh
    self._encoder = self._look_up = None
    c = config.prompts
    if c.cache:
      cache = prompt_cache.PromptCache(c.cache)
      if cache.settings.t5_length != c.t5_length:
        raise ValueError(
          f"prompts.t5_length={c.t5_length}, but the embeddings in prompts.cache="
          f"{c.cache!r} were made with {cache.settings.t5_length}"
        )
      if cache.context_shape[1] != context_dim:
        raise ValueError(
          f"prompts.cache={c.cache!r} holds embeddings of width "
          f"{cache.context_shape[1]}, the generator reads {context_dim}"
        )
      self._cache = cache
      self._look_up = loader_lib.cached_text(cache)
    else:
      self._encoder = encoders.TextEncoder(
        config.model.generator,
        t5_length=c.t5_length,
        context_dim=context_dim,
        dtype=config.model.dtype,
        sharding=sharding.replicated(mesh),
      )

  def require(self, prompts: Sequence[str]) -> None:
    """Raises DataError: prompts that a cache does not have."""
    if self._look_up is not None:
      self._cache.require(prompts)

  def __call__(self, prompts: Sequence[str]) -> features.Cond:
    """context (p l d), pooled (p e); placed by `prompt_sharding`."""
    place = prompt_sharding(len(prompts), self._mesh)
    if self._encoder is not None:
      ids = self._encoder.tokenize(prompts)
      ids = {name: sharding.put(a, place) for name, a in ids.items()}
      return jax.device_put(self._encoder(ids), place)
    found = self._look_up(list(prompts))
    return features.Cond(
      *(sharding.put(found[name], place) for name in ("context", "pooled"))
    )


def make_decoder(config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable:
  """`latents (b h w c) on the devices -> images (b H W 3) uint8 on the host`.

  Raises:
    ValueError: an unknown `decoder`.
  """
  if config.decoder == "digits":
    return lambda x: digits.to_pixels(processes.to_host(x))
  if config.decoder != "vae":
    raise ValueError(f"decoder={config.decoder!r}: use 'vae' or 'digits'")
  model = build.load_vae(config.model.generator)
  params = build.to_device(model.params, sharding.replicated(mesh))
  decode = jax.jit(
    functools.partial(encoders.decode_latents, model.graphdef, model.config),
    out_shardings=sharding.replicated(mesh),
  )

  def to_images(x):
    images = []
    size = mesh.size * config.eval.decode_batch
    for start in range(0, len(x), size):
      images.append(processes.to_host(decode(params, x[start : start + size])))
    return np.concatenate(images)

  return to_images


def latent_shape(config: ConfigDict, channels: int) -> tuple[int, int, int]:
  """(H, W, C) of `rollout.height` x `rollout.width` pixels.

  Raises:
    ValueError: pixels that make no whole patches.
  """
  if config.decoder == "digits":
    return 8, 8, channels
  model = build.config_from_dict(
    folder_lib.find(config.model.generator, "vae")[1]["config"]
  )
  sides = []
  for name in ("height", "width"):
    side = config.rollout[name]
    if side < 1 or side % (2 * model.downsampling):
      raise ValueError(
        f"rollout.{name}={side} must be a multiple of {2 * model.downsampling} pixels"
      )
    sides.append(side // model.downsampling)
  return sides[0], sides[1], channels


# --- a run in progress -------------------------------------------------------------


@dataclasses.dataclass
class Golden:
  """Early stopping: how long the watched metric has not got better.

  Attributes:
    metric: of evaluations, e.g. `eval/pixel/hps`.
    patience: evaluations; None: it is only watched.
  """

  metric: str
  patience: int | None
  min_delta: float
  best: float | None = None
  waited: int = 0

  def see(self, value: float) -> None:
    if self.best is None or value > self.best + self.min_delta:
      self.best, self.waited = value, 0
    else:
      self.waited += 1

  @property
  def stopped(self) -> bool:
    return self.patience is not None and self.waited >= self.patience


@dataclasses.dataclass
class Trainer:
  """A run: programs, parameters, prompts. `params` are never donated."""

  programs: Programs
  state: train_state.TrainState
  params: Any
  text: Text
  uncond: features.Cond
  train_prompts: list[str]
  eval_prompts: list[str]
  decode: Callable
  pixel_rewards: dict[str, PixelReward]
  golden: Golden
  real: "RealData | None"

  @property
  def config(self) -> ConfigDict:
    return self.programs.config

  @property
  def averaged(self) -> dict[str, jax.Array]:
    """The adapters to evaluate and to keep: the EMA where there is one."""
    return self.state.params if self.state.ema is None else self.state.ema

  def prompts(self, texts: Sequence[str]) -> alignment.Prompts:
    return alignment.Prompts(self.text(texts), self.uncond)


class RealData:
  """Batches of real latents and their prompts' embeddings, for ReFL.

  Yields (x0 (n H W C), Cond) on the devices; `state` continues from there.
  """

  def __init__(self, config: ConfigDict, latent: tuple[int, int, int], mesh: Any):
    data = config.real
    source = build.pair_sources(data)[0]
    found = {tuple(shape) for shape in source.latent_shapes}
    if found != {latent}:
      raise ValueError(
        f"real.train={data.train!r} has latents of {sorted(found)}, rollouts are "
        f"{latent}: use data of that size"
      )
    self._place = sharding.batch_sharding(mesh)
    plan = plan_lib.BatchPlan(
      source.bucket, source.block, batch_size=data.batch_size, seed=config.seed
    )
    rows = loader_lib.local_rows(self._place, data.batch_size)
    loader = loader_lib.make_loader(
      source,
      plan,
      rows,
      text_fn=loader_lib.cached_text(prompt_cache.PromptCache(data.prompts)),
    )
    self._iterator = iter(loader)

  @property
  def state(self) -> dict:
    return self._iterator.get_state()

  def restore(self, state: dict) -> None:
    self._iterator.set_state(state)

  def __next__(self) -> tuple[jax.Array, features.Cond]:
    batch = next(self._iterator)
    put = loader_lib.put(batch, self._place, ("chosen", "context", "pooled"))
    return put["chosen"], features.Cond(put["context"], put["pooled"])


def setup(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Trainer:
  """A config's run before its first iteration, on the config's mesh (of all devices).

  What runs on it belongs into `jax.set_mesh(trainer.programs.mesh)`.
  """
  make_recipe(config)  # what is impossible is said before gigabytes are read
  Steps.of(config)
  mesh = sharding.make_mesh(config.mesh.fsdp, devices, tensor=config.mesh.tensor)
  check_sizes(config, mesh)
  pixel_rewards = {
    name: load_pixel_reward(name, term.function)
    for name, term in config.pixel_rewards.items()
  }
  train_prompts = prompts_lib.read(config.prompts.train)
  eval_prompts = prompts_lib.read(config.prompts.eval)
  model = denoiser.load(
    config.model.generator,
    {name: term.folder for name, term in config.rewards.items()},
    dtype=config.model.dtype,
    scan_blocks=config.model.scan_blocks,
    attention_impl=config.model.attention_impl,
  )
  levels = {
    name: scorer.Level.of(config.rewards[name].folder, part.scoring)
    for name, part in model.rewards.items()
  }
  latent = latent_shape(config, model.config.in_channels)
  host = model.params
  # Programs need shapes only; the copy on the host goes when it is on the devices.
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), host)
  model = dataclasses.replace(model, params=like)
  with jax.set_mesh(mesh):
    programs = make_programs(config, mesh, model, levels, latent)
    text = Text(config, model.config.context_dim, mesh)
    text.require(["", *train_prompts, *eval_prompts])
    places = sharding.shardings(like, mesh, tuple(config.sharding))
    params = jax.tree.map(sharding.put, host, places)
    create = functools.partial(create_state, programs.policy, programs.tx, config)
    state = jax.jit(create, out_shardings=programs.replicated)()
    real = None
    if config.method == "refl" and config.real.weight:
      real = RealData(config, latent, mesh)
  metric = config.golden.metric
  if metric is None:
    weighted = [f"reward/{n}" for n, term in config.rewards.items() if term.weight]
    weighted += [
      f"pixel/{n}" for n, term in config.pixel_rewards.items() if term.weight
    ]
    metric = weighted[0]
  golden = Golden(f"eval/{metric}", config.golden.patience, config.golden.min_delta)
  return Trainer(
    programs=programs,
    state=state,
    params=params,
    text=text,
    uncond=text([""]),
    train_prompts=train_prompts,
    eval_prompts=eval_prompts,
    decode=make_decoder(config, mesh),
    pixel_rewards=pixel_rewards,
    golden=golden,
    real=real,
  )


# --- evaluation --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Attributes: metrics, by name; images (p g H W 3) uint8 of the first prompts."""

  metrics: dict[str, float]
  images: np.ndarray


def evaluate(trainer: Trainer) -> Evaluation:
  """All rewards, and diversity: fixed prompts and noise, the averaged adapters."""
  config, programs = trainer.config, trainer.programs
  prompts, num, size = trainer.eval_prompts, config.eval.num, config.eval.prompts
  sigmas = flow.sampling_sigmas(config.eval.num_steps, config.rollout.shift)
  schedule = sample.make_schedule(sigmas, noise_level=config.rollout.noise_level)
  key = jax.random.key(config.eval.seed)
  values: dict[str, list[np.ndarray]] = {}
  images = []
  for start in range(0, len(prompts), size):
    chosen = prompts[start : start + size]
    padded = [chosen[i % len(chosen)] for i in range(size)]
    x0, scores, distance = programs.evaluate(
      trainer.params,
      trainer.averaged,
      trainer.prompts(padded),
      schedule,
      jax.random.fold_in(key, start),
    )
    found = {f"eval/reward/{name}": r for name, r in scores.items()}
    count = len(chosen) * num
    if trainer.pixel_rewards or start < config.eval.images:
      pixels = trainer.decode(x0)
      texts = [prompt for prompt in padded for _ in range(num)]
      for name, reward in trainer.pixel_rewards.items():
        found[f"eval/pixel/{name}"] = pixel_scores(name, reward, pixels, texts)
      kept = max(0, min(len(chosen), config.eval.images - start))
      images.append(pixels[: kept * num].reshape(kept, num, *pixels.shape[1:]))
    found = jax.device_get(found)
    for name, each in found.items():
      values.setdefault(name, []).append(each[:count])
    values.setdefault("eval/diversity", []).append(
      jax.device_get(distance)[: len(chosen)]
    )
  metrics = {
    name: float(np.mean(np.concatenate(parts))) for name, parts in values.items()
  }
  return Evaluation(metrics, np.concatenate(images) if images else np.zeros((0, num)))


def pixel_scores(
  name: str, reward: PixelReward, images: np.ndarray, prompts: Sequence[str]
) -> np.ndarray:
  """(b,) float32 scores of a user's callable.

  Raises:
    ValueError: it returns something else.
  """
  scores = np.asarray(reward(images, prompts), np.float32)
  if scores.shape != (len(prompts),):
    raise ValueError(
      f"pixel_rewards.{name}: scores of shape {scores.shape} for {len(prompts)} "
      f"images, expected {(len(prompts),)}"
    )
  return scores


# --- an iteration ------------------------------------------------------------------


def iterate(
  trainer: Trainer, iteration: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], list[str]]:
  """One iteration: collects, learns. Dispatches only, unless pixels are rewarded.

  Returns: metrics; scores of the finished samples, name -> (b,), those of a prompt
    neighbours; the prompts.
  """
  config, programs = trainer.config, trainer.programs
  recipe = programs.recipe
  at = prompts_lib.draw(
    len(trainer.train_prompts), config.train.prompts, iteration, seed=config.seed
  )
  texts = [trainer.train_prompts[i] for i in at]
  prompts = trainer.prompts(texts)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  key = jax.random.fold_in(key, iteration)
  schedule, steps = programs.steps.draw(iteration, config.seed)
  if recipe is None:
    real = None if trainer.real is None else next(trainer.real)
    trainer.state, metrics = programs.update(
      trainer.state, trainer.params, prompts, schedule, key, real
    )
    return metrics, {}, texts

  made, metrics = programs.collect(
    trainer.params, trainer.state.params, prompts, schedule, key
  )
  finals = dict(programs.share(made.final))
  if programs.with_finished is not None:
    images = trainer.decode(made.x0)
    each = [text for text in texts for _ in range(recipe.group_size)]
    for name in recipe.finished:
      finals[name] = pixel_scores(name, trainer.pixel_rewards[name], images, each)
      finite = finals[name][np.isfinite(finals[name])]
      metrics[f"pixel/{name}"] = finite.mean() if len(finite) else np.nan
    given = {name: finals[name] for name in recipe.finished}
    made, more = programs.with_finished(made, given)
    metrics |= more
  updated = []
  for _ in range(config.train.inner_epochs):
    for minibatch in range(recipe.minibatches):
      trainer.state, of_update = programs.update(
        trainer.state, trainer.params, made, steps, minibatch
      )
      updated.append(of_update)
  return {**metrics, **_mean(updated)}, finals, texts


@jax.jit
def _mean(metrics: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Of several updates."""
  return jax.tree.map(lambda *a: sum(a) / len(a), *metrics)


class PromptLog:
  """`prompts.jsonl`: each iteration's rewards of each of its prompts.

  Written an iteration late, as the metrics, and cut back when a run continues.
  """

  def __init__(self, folder: pathlib.Path, start: int):
    self._path, self._pending = folder / "prompts.jsonl", None
    lines = []
    if self._path.exists():
      # A killed run may have left half a line.
      whole = self._path.read_text().split("\n")[:-1]
      lines = [line for line in whole if json.loads(line)["step"] <= start]
    draft = self._path.with_suffix(".tmp")
    draft.write_text("".join(line + "\n" for line in lines))
    draft.replace(self._path)

  def step(self, step: int, finals: Mapping[str, Any], prompts: Sequence[str]) -> None:
    self.flush()
    if finals:
      self._pending = step, finals, prompts

  def flush(self) -> None:
    if self._pending is None:
      return
    (step, finals, prompts), self._pending = self._pending, None
    scores = {
      name: np.asarray(r, np.float64).reshape(len(prompts), -1)
      for name, r in finals.items()
    }
    lines = []
    for i, prompt in enumerate(prompts):
      row = {"step": step, "prompt": prompt}
      for name, each in scores.items():
        mean, std = float(each[i].mean()), float(each[i].std())
        # JSON has no NaN.
        row[name] = {"mean": mean, "std": std} if np.isfinite(mean) else None
      lines.append(json.dumps(row) + "\n")
    with self._path.open("a") as file:
      file.write("".join(lines))


# --- what is left behind -----------------------------------------------------------


def save_lora(trainer: Trainer, path: pathlib.Path) -> None:
  """The averaged adapters as a model folder on top of the generator."""
  host = {p: processes.to_host(a) for p, a in trainer.averaged.items()}
  if not processes.is_main():
    return
  with folder_lib.write_atomically(path, force=True) as out:
    entry = build.save_lora(out, host, trainer.programs.policy.config)
    base = pathlib.Path(trainer.config.model.generator)
    folder_lib.write_config(
      out,
      {
        "source": {"trained": "train/align.py"},
        "base": os.path.relpath(base, path),
        "components": {"lora": entry},
      },
    )


def save_sheet(
  workdir: pathlib.Path, step: int, prompts: Sequence[str], images: np.ndarray
) -> None:
  """sheets/step_N.png and, with all images, sheets/step_N.npz."""
  if not len(images):
    return
  folder = workdir / "sheets"
  folder.mkdir(exist_ok=True)
  rows = []
  for prompt, each in zip(prompts[:SHEET_ROWS], images, strict=False):
    rows.append((prompt, [(Image.fromarray(i), "") for i in each[:SHEET_COLUMNS]]))
  sheets.draw(rows).save(folder / f"step_{step:06d}.png")
  np.savez_compressed(folder / f"step_{step:06d}.npz", images=images)


def draw_progress(workdir: pathlib.Path, prompts: Sequence[str]) -> None:
  """progress.png (metrics), through_training.png (the same samples, step by step)."""
  lines = run_log.read_metrics(workdir)

  def curve(name):
    found = [(line["step"], line[name]) for line in lines if name in line]
    return tuple(np.array(found).T) if found else None

  names = list(dict.fromkeys(name for line in lines for name in line))
  panels = {
    "rewards of rollouts": [
      n for n in names if n.startswith(("reward/", "pixel/", "train/reward"))
    ],
    "evaluation": [n for n in names if n.startswith(("eval/reward/", "eval/pixel/"))],
    "diversity": ["eval/diversity"],
    "KL to the start": ["train/kl"],
    "clipped, and groups that teach nothing": [
      "train/clip_frac",
      "collect/zero_std",
      "train/valid",
    ],
    "gradient norm": ["train/grad_norm"],
  }
  curves = {
    title: {name: curve(name) for name in mine if name in names}
    for title, mine in panels.items()
  }
  curves = {title: mine for title, mine in curves.items() if mine}
  plots.panels(workdir / "progress.png", curves, xlabel="iteration")
  found = sorted((workdir / "sheets").glob("step_*.npz"))
  if len(found) < 2:
    return
  columns = [found[i] for i in _spread(len(found), SHEET_COLUMNS)]
  images = [np.load(path)["images"] for path in columns]
  rows = [
    (prompt, [(Image.fromarray(of_step[i, 0]), "") for of_step in images])
    # A continuation may keep fewer images (eval.images).
    for i, prompt in enumerate(prompts[: min(SHEET_ROWS, *map(len, images))])
  ]
  titles = [str(int(path.stem.removeprefix("step_"))) for path in columns]
  sheets.draw(rows, titles).save(workdir / "through_training.png")


def _spread(total: int, most: int) -> list[int]:
  """At most `most` of 0 .. total - 1, both ends included, evenly."""
  return sorted({round(i) for i in np.linspace(0, total - 1, min(total, most))})


# --- the run -----------------------------------------------------------------------


def train(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> bool:
  """Trains to `train.num_iterations`, continuing from the newest checkpoint if any.

  Returns: whether the run is complete; False if a signal ended it early, after saving.
  """
  workdir = pathlib.Path(config.workdir)
  trainer = setup(config, devices)
  with (
    jax.set_mesh(trainer.programs.mesh),
    trainers.checkpointed(
      config, trainer.state, may_change=MAY_CHANGE, best_metric=trainer.golden.metric
    ) as checkpoints,
  ):
    with processes.StopSignal() as stop:
      step = run(trainer, checkpoints, workdir, stop)
    if step is None:
      print(
        f"stopped by a signal at iteration {checkpoints.latest} of "
        f"{config.train.num_iterations}; the same command continues"
      )
      return False
    checkpoints.wait()  # a failed save is reported before the adapters are written
    save_lora(trainer, workdir / "lora")
    best = checkpoints.best
    if best is not None and best != step:
      abstract = trainer.programs.state
      places = jax.tree.map(lambda _: trainer.programs.replicated, abstract)
      trainer.state, _ = checkpoints.restore(best, abstract, places)
      save_lora(trainer, workdir / "best_lora")
      if processes.is_main():
        print(f"{trainer.golden.metric} was best at {best}: {workdir}/best_lora")
  if processes.is_main():
    draw_progress(workdir, trainer.eval_prompts)
    print(
      f"wrote {workdir}/lora, metrics.jsonl, progress.png, sheets. For diffusers:\n"
      f"  python convert/flax_to_torch.py --model {workdir}/lora --format lora --out "
      "lora.safetensors"
    )
  return True


def run(
  trainer: Trainer,
  checkpoints: checkpoint.Checkpoints,
  workdir: pathlib.Path,
  stop: processes.StopSignal,
) -> int | None:
  """All iterations from the newest checkpoint on.

  Returns: the last iteration; None if `stop` ended the run early.
  """
  config, programs, golden = trainer.config, trainer.programs, trainer.golden
  total = config.train.num_iterations
  start = checkpoints.latest or 0
  seconds = 0.0
  if start:
    places = jax.tree.map(lambda _: programs.replicated, programs.state)
    trainer.state, extra = checkpoints.restore(start, programs.state, places)
    golden.best, golden.waited = extra["golden"]
    seconds = extra["seconds"]
    if trainer.real is not None:
      trainer.real.restore(extra["real"])
  say = print if processes.is_main() else (lambda *_: None)
  if start:
    say(f"continuing {workdir} from iteration {start}")
  num_adapters = sum(a.size for a in jax.tree.leaves(programs.state.params))
  say(
    f"{config.method}: {num_adapters:,} trained parameters; {programs.samples} samples "
    f"of {config.train.prompts} of {len(trainer.train_prompts)} prompts and "
    f"{programs.cost:,.0f} passes of the generator per iteration; "
    f"{jax.device_count()} device(s) in {jax.process_count()} process(es); attention: "
    f"{attention.resolve(config.model.attention_impl, build.dtype(config.model.dtype))}"
  )
  watch = Stopwatch(seconds)
  prompt_log = PromptLog(workdir, start) if processes.is_main() else None
  log = _make_log(config, workdir, start, watch)

  def save(step: int, metrics: Mapping[str, float] | None = None):
    log.flush()  # a state that came from NaN must not become a checkpoint
    if prompt_log is not None:
      prompt_log.flush()
    extra = {"golden": [golden.best, golden.waited], "seconds": watch.seconds}
    if trainer.real is not None:
      extra["real"] = trainer.real.state
    checkpoints.save(step, trainer.state, extra, metrics)

  def look(step: int) -> dict[str, float]:
    """Evaluates; the metrics belong to the line that is to be written."""
    with watch.stopped():
      found = evaluate(trainer)
      if processes.is_main():
        save_sheet(workdir, step, trainer.eval_prompts, found.images)
    golden.see(found.metrics[golden.metric])
    log.add(found.metrics)
    return found.metrics

  step = start
  with log:
    if not start:
      log.step(0, {"cost/passes": 0.0, "cost/samples": 0.0}, now=True)
      look(0)
    for step in range(start + 1, total + 1):
      if golden.stopped:
        step -= 1  # what is there is what was trained
        say(
          f"stopped early after iteration {step}: {golden.metric} has not risen above "
          f"{golden.best:.4g} for {golden.waited} evaluations"
        )
        break
      if step == start + 1:
        with watch.stopped():  # compiles
          metrics, finals, texts = iterate(trainer, step - 1)
          jax.block_until_ready(trainer.state.params)
      else:
        metrics, finals, texts = iterate(trainer, step - 1)
      metrics |= {
        "cost/passes": step * programs.cost,
        "cost/samples": float(step * programs.samples),
      }
      last = step == total
      evaluated = step % config.eval.every == 0 or last
      log.step(step, metrics, now=evaluated or step % config.train.log_every == 0)
      if prompt_log is not None:
        prompt_log.step(step, finals, texts)
      scores = None
      if evaluated:
        log.flush(write=False)
        scores = look(step)
      stopping = stop.requested(step)
      best_wanted = evaluated and config.train.keep_best > 0
      if step % config.train.checkpoint_every == 0 or last or stopping or best_wanted:
        save(step, scores)
      if stopping and not last:
        checkpoints.wait()
        return None
    if prompt_log is not None:
      prompt_log.flush()
    save(step)  # where golden stopped it
  return step


class Stopwatch:
  """Seconds of a run, over interruptions, without what happens inside `stopped()`."""

  def __init__(self, seconds: float):
    self._before, self._start = seconds, time.monotonic()

  @property
  def seconds(self) -> float:
    return self._before + time.monotonic() - self._start

  def metrics(self) -> dict[str, float]:
    return {"cost/seconds": self.seconds}

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    begin = time.monotonic()
    try:
      yield
    finally:
      self._start += time.monotonic() - begin


def _make_log(
  config: ConfigDict, workdir: pathlib.Path, start: int, watch: Stopwatch
) -> run_log.LateLog:
  """Of the main process; the others only check."""
  log = None
  if processes.is_main():
    shown = [f"reward/{name}" for name in config.rewards]
    log = run_log.RunLog(
      workdir,
      resume_step=start if start else -1,  # step 0 is a line, too
      total_steps=config.train.num_iterations,
      console_metrics=(*shown, "train/reward", "train/kl", "train/ratio"),
      wandb_project=config.wandb_project,
    )
  return run_log.LateLog(
    log, watch.metrics, remedy="Lower train.learning_rate or train.clip_norm"
  )


# --- without the devices -----------------------------------------------------------


def abstract_denoiser(
  config: ConfigDict, *, scan_blocks: bool, attention_impl: str
) -> denoiser.Denoiser:
  """The generator and rewards that `config.aot` names, without their folders.

  A preset with adapters is on the generator's weights; one without brings a backbone
  of its own, all of which was trained (DRM).

  Raises:
    ValueError: an unknown preset, or rewards other than the config's.
  """
  c = config.aot
  if c.generator not in build.TRANSFORMER_PRESETS:
    raise ValueError(
      f"aot.generator={c.generator!r}: use one of {sorted(build.TRANSFORMER_PRESETS)}"
    )
  if set(c.rewards) != set(config.rewards):
    raise ValueError(
      f"aot.rewards are {sorted(c.rewards)}, but the rewards are "
      f"{sorted(config.rewards)}: give each of them a preset"
    )
  for name, preset in c.rewards.items():
    if preset not in build.REWARD_PRESETS:
      raise ValueError(
        f"aot.rewards.{name}={preset!r}: use one of {sorted(build.REWARD_PRESETS)}"
      )
  rewards = {name: build.REWARD_PRESETS[c.rewards[name]]() for name in config.rewards}
  return denoiser.abstract(
    build.TRANSFORMER_PRESETS[c.generator](),
    rewards,
    on_generator=[name for name, reward in rewards.items() if reward.lora is not None],
    dtype=config.model.dtype,
    scan_blocks=scan_blocks,
    attention_impl=attention_impl,
  )


def abstract_run(
  config: ConfigDict, mesh: jax.sharding.Mesh, model: denoiser.Denoiser
) -> tuple[Programs, dict[str, tuple[Callable, tuple[Any, ...]]]]:
  """An iteration's programs, and each with its arguments as ShapeDtypeStructs.

  Latents are as after SD3.5's autoencoder, an eighth of the side; embeddings have the
  model's dtype.

  Returns: the Programs, and name -> (jitted function, arguments on the mesh): `collect`
    and `update`, of ReFL the latter only.
  """
  size = config.rollout.height // 8, config.rollout.width // 8
  latent = (*size, model.config.in_channels)
  # Any level with noise makes the same program.
  level = scorer.Level(np.float32(0.4).view(np.uint32), np.float32(0.4), True)
  programs = make_programs(
    config, mesh, model, dict.fromkeys(model.rewards, level), latent
  )
  everywhere, split = programs.replicated, sharding.batch_sharding(mesh)
  dtype = build.dtype(config.model.dtype)

  def struct(shape, dtype, place=everywhere):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def placed(tree, places):
    places = jax.tree.broadcast(places, tree)
    return jax.tree.map(lambda a, place: struct(a.shape, a.dtype, place), tree, places)

  def cond(num, place=everywhere):
    full = model.config
    context = (num, 77 + config.prompts.t5_length, full.context_dim)
    return features.Cond(
      struct(context, dtype, place), struct((num, full.pooled_dim), dtype, place)
    )

  places = sharding.shardings(model.params, mesh, tuple(config.sharding))
  params = placed(model.params, places)
  state = placed(programs.state, everywhere)
  num = config.train.prompts
  prompts = alignment.Prompts(cond(num, prompt_sharding(num, mesh)), cond(1))
  schedule, steps = programs.steps.draw(0, config.seed)
  schedule = placed(schedule, everywhere)
  key = placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
  if programs.collect is None:
    real = None
    if config.real.weight:
      num = config.real.batch_size
      real = struct((num, *latent), jnp.float32, split), cond(num, split)
    args = (state, params, prompts, schedule, key, real)
    return programs, {"update": (programs.update, args)}
  args = (params, state.params, prompts, schedule, key)
  with jax.set_mesh(mesh):
    made, _ = jax.eval_shape(programs.collect, *args)
  made = placed(made, collected_shardings(mesh))
  numbers = (struct(steps.shape, jnp.int32), struct((), jnp.int32))
  return programs, {
    "collect": (programs.collect, args),
    "update": (programs.update, (state, params, made, *numbers)),
  }


def aot_reports(
  config: ConfigDict, target: aot.Target, recipe: str
) -> Iterator[tuple[str, aot.Report]]:
  """How each program of an iteration would fit a target (see lrm_jax.aot), by name.

  With `aot.prompts_per_device` the prompts grow with the number of devices. FLOPs are
  of one call: an iteration calls `update` for each minibatch and epoch. What a program
  does not read but a run keeps on the devices meanwhile (the optimizer's state, the
  rewards' own weights) is left free: `held_bytes` of the settings.
  """
  config = config.copy_and_resolve_references()
  mesh = sharding.make_mesh(config.mesh.fsdp, target.devices, tensor=config.mesh.tensor)
  devices = sharding.batch_size_divisor(mesh)
  if config.aot.prompts_per_device is not None:
    config.train.prompts = config.aot.prompts_per_device * devices
  config.eval.prompts = devices  # which is not compiled
  scan_blocks = config.model.scan_blocks
  if scan_blocks is None:
    scan_blocks = target.kind != "gpu"
  model = abstract_denoiser(
    config,
    scan_blocks=scan_blocks,
    attention_impl=attention.resolve(
      config.model.attention_impl, build.dtype(config.model.dtype), target.kind
    ),
  )
  programs, compiled = abstract_run(config, mesh, model)
  height, width, _ = programs.latent
  text_tokens = 77 + config.prompts.t5_length
  n = flops.image_tokens(model.config, height, width)
  per_pass = flops.mmdit(model.config, n, text_tokens)
  attention_per_pass = flops.attention(model.config, n, text_tokens)
  updates = config.train.inner_epochs * config.train.minibatches
  settings = {
    "recipe": recipe,
    "method": config.method,
    "train.prompts": config.train.prompts,
    "group.group_size": programs.samples // config.train.prompts,
    "train.rollout_parts": config.train.rollout_parts,
    "train.minibatches": config.train.minibatches,
    "train.micro_batches": config.train.micro_batches,
    "model.remat": config.model.remat,
    "model.scan_blocks": scan_blocks,
    "mesh.fsdp": config.mesh.fsdp,
    "mesh.tensor": config.mesh.tensor,
    "rollout.height": config.rollout.height,
    "rollout.width": config.rollout.width,
    "rollout.num_steps": config.rollout.num_steps,
    "prompts.t5_length": config.prompts.t5_length,
  }
  if config.method in ("step_grpo", "lpo"):
    settings["group.candidates"] = config.group.candidates
    settings["group.chunk"] = config.group.chunk
  state, params = compiled["update"][1][:2]
  learnt_from = () if programs.recipe is not None else config.rewards
  idle = {
    "collect": (state.opt_state, state.ema),
    "update": [
      own
      for name, own in params["rewards"].items()
      if name not in learnt_from or not config.rewards[name].weight
    ],
  }
  for name, (function, args) in compiled.items():
    held = sharding.bytes_per_device(idle[name])
    passes = programs.passes[name] * programs.samples
    # Of three that a pass with gradients counts for, attention takes more.
    kernels = passes
    if name == "update":
      passes, kernels = passes / updates, passes / updates
      kernels *= flops.ATTENTION_PASSES[config.model.remat] / 3
    report = aot.report(
      function,
      args,
      target,
      flops_per_step=float(passes * per_pass),
      kernel_flops=kernels * attention_per_pass if target.kind == "tpu" else 0.0,
      settings=settings | {"program": name, "held_bytes": held},
      reserve=aot.RESERVE + held,
      advice=advise,
    )
    yield name, report


def advise(
  memory: aot.Memory, capacity: int, num_chips: int, settings: Mapping[str, Any]
) -> tuple[str, ...]:
  """What to change so that a program fits, the cheapest first; as `aot.advise`."""
  advice = []
  if settings["program"] == "update":
    if settings["model.remat"] != "full":
      advice.append(f"model.remat: {settings['model.remat']!r} -> 'full'")
    advice.append(
      f"train.micro_batches: {settings['train.micro_batches']} -> more (smaller "
      "micro-batches, same step)"
    )
  else:
    advice.append(
      f"train.rollout_parts: {settings['train.rollout_parts']} -> more (one after "
      "another, same samples)"
    )
    if settings.get("group.chunk", 1) != 1:
      advice.append(
        f"group.chunk: {settings['group.chunk']} -> 1 (candidates scored at a time)"
      )
  if settings["mesh.fsdp"] != -1:
    advice.append(
      f"mesh.fsdp: {settings['mesh.fsdp']} -> -1 with the sharding rule 'fsdp' (splits "
      "frozen weights over all chips)"
    )
  advice.append(f"train.prompts: {settings['train.prompts']} -> fewer, or more chips")
  return tuple(advice)


if __name__ == "__main__":
  trainers.run(train, aot_reports)
