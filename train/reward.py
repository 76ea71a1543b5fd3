"""Trains a latent reward model on preference pairs.

  python train/reward.py --config configs/sd35m.py
  python train/reward.py --config configs/quickstart.py --config.train.num_steps=100

On several hosts, the same command on each (`--coordinator auto` on TPU pods and Slurm):

  python train/reward.py --config configs/sd35m.py \\
    --coordinator host0:1234 --num_processes 2 --process_id 0

Without the devices, how the step would fit them (docs/aot.md):

  python train/reward.py --config configs/sd35m.py --aot v5p:4x4x8

Leaves in `workdir`: checkpoints (the same command continues from the newest; SIGTERM
saves one), metrics as JSONL and TensorBoard, `run.json` (config, versions, commit),
`accuracy.json` and `accuracy.png` (held-out pair accuracy against noise level), and the
trained model as a model folder (`model`, and `best_model` where another step was best).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from lrm_jax import (
  aot,
  build,
  checkpoint,
  encoders,
  flops,
  optim,
  plots,
  preference,
  processes,
  run_log,
  sharding,
  train_state,
  trainers,
  weights,
)
from lrm_jax import folder as folder_lib
from lrm_jax import metrics as metrics_lib
from lrm_jax.data import loader as loader_lib
from lrm_jax.data import plan as plan_lib
from lrm_jax.data import prompt_cache
from lrm_jax.data import source as source_lib
from lrm_jax.models import attention, reward

# Settings that may change between a run and its continuation.
MAY_CHANGE = (
  r"workdir|wandb_project|eval\..*|mesh\..*|aot\..*|sample\..*|"
  r"data\.(num_threads|prefetch|cache_blocks)|"
  r"train\.(num_steps|log_every|checkpoint_every|keep_checkpoints|keep_best)"
)
BEST_METRIC = "val/acc"  # the mean over noise levels


# --- setting up --------------------------------------------------------------------


@dataclasses.dataclass
class Programs:
  """A config on a mesh, before anything is allocated.

  Attributes:
    trained, frozen: abstract parameters, path -> ShapeDtypeStruct.
    state: abstract train state.
    state_shardings, frozen_shardings: where they live.
    train_step, eval_step: jitted; see lrm_jax.preference.
  """

  config: ConfigDict
  mesh: jax.sharding.Mesh
  full: Any
  reward_config: reward.RewardConfig
  graphdef: nnx.GraphDef
  trained: dict[str, Any]
  frozen: dict[str, Any]
  tx: optax.GradientTransformation
  state: train_state.TrainState
  state_shardings: Any
  frozen_shardings: Any
  batch_sharding: jax.sharding.NamedSharding
  train_step: Callable
  eval_step: Callable

  @property
  def trains_backbone(self) -> bool:
    """Whether weights of the transformer itself are trained, not only adapters."""
    return any(p.startswith("backbone/") and "/lora_" not in p for p in self.trained)


def abstract_params(config: ConfigDict) -> tuple[Any, Any, nnx.GraphDef, dict]:
  """(full transformer, RewardConfig, graphdef, abstract params); allocates nothing."""
  full = build.full_transformer(config.model)
  reward_config = build.reward_config(config.model, full)
  make = build.reward_factory(config.model, reward_config)
  graphdef, params = weights.abstract(lambda: make(nnx.Rngs(0)))
  return full, reward_config, graphdef, params


def make_programs(config: ConfigDict, mesh: jax.sharding.Mesh) -> Programs:
  """Model, optimizer, placement and jitted steps of a config.

  Raises:
    ValueError, FolderError: a config or base folder that does not fit; the message
      names the key.
  """
  divisor = sharding.batch_size_divisor(mesh)
  if config.train.accumulate < 1:
    raise ValueError(f"train.accumulate={config.train.accumulate} must be 1 or more")
  for name, size, parts in (
    ("train", config.train.batch_size, divisor * config.train.accumulate),
    ("eval", config.eval.batch_size, divisor),
  ):
    if size < 1 or size % parts:
      raise ValueError(
        f"{name}.batch_size={size} must be a multiple of {parts}, the {divisor} "
        f"devices that split a batch, times {parts // divisor} micro-batches"
      )
  full, reward_config, graphdef, abstract = abstract_params(config)
  trained, frozen = optim.partition(abstract, tuple(config.trainable))
  schedule = optim.make_schedule(
    config.train.schedule,
    learning_rate=config.train.learning_rate,
    warmup_steps=config.train.warmup_steps,
    num_steps=config.train.num_steps,
  )
  tx = optim.make_tx(
    schedule,
    weight_decay=config.train.weight_decay,
    clip_norm=config.train.clip_norm,
  )
  state = jax.eval_shape(functools.partial(_create_state, config, tx), trained)
  rules = tuple(config.sharding)
  state_shardings = sharding.shardings(state, mesh, rules)
  replicated = sharding.replicated(mesh)
  batch_sharding = sharding.batch_sharding(mesh)
  constrain = functools.partial(
    jax.lax.with_sharding_constraint, shardings=batch_sharding
  )
  train_step = preference.make_train_step(
    graphdef,
    tx,
    sigma_fn=build.sigma_fn(config.noise),
    loss_fn=build.loss_fn(config.loss),
    learning_rate=schedule,
    shared_noise=config.noise.shared,
    ema_decay=config.train.ema_decay,
    accumulate=config.train.accumulate,
    constrain=constrain,
  )
  eval_step = preference.make_eval_step(
    graphdef, shared_noise=config.noise.shared, constrain=constrain
  )
  return Programs(
    config=config,
    mesh=mesh,
    full=full,
    reward_config=reward_config,
    graphdef=graphdef,
    trained=trained,
    frozen=frozen,
    tx=tx,
    state=state,
    state_shardings=state_shardings,
    frozen_shardings=sharding.shardings(frozen, mesh, rules),
    batch_sharding=batch_sharding,
    # Without out_shardings Adam's moments would come out replicated.
    train_step=jax.jit(
      train_step, donate_argnums=0, out_shardings=(state_shardings, replicated)
    ),
    eval_step=jax.jit(eval_step, out_shardings=replicated),
  )


def _create_state(config, tx, trained) -> train_state.TrainState:
  return train_state.create(trained, tx, use_ema=config.train.ema_decay is not None)


def initial_state(programs: Programs) -> tuple[train_state.TrainState, dict[str, Any]]:
  """(train state, frozen parameters) on the devices.

  Pretrained leaves come from disk; only the others are ever initialised (inside jit,
  where what is not returned is not computed either).
  """
  config = programs.config
  make = build.reward_factory(config.model, programs.reward_config)
  abstract = {**programs.trained, **programs.frozen}
  pretrained = build.base_backbone(
    config.model, programs.full, programs.reward_config, weights.unflatten(abstract)
  )

  def init(key):
    flat = weights.flatten(weights.split(make(nnx.Rngs(key)))[1])
    return {path: leaf for path, leaf in flat.items() if path not in pretrained}

  rules = tuple(config.sharding)
  places = sharding.shardings(abstract, programs.mesh, rules)
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  fresh = {path: place for path, place in places.items() if path not in pretrained}
  flat = jax.jit(init, out_shardings=fresh)(key)
  flat |= {p: sharding.put(leaf, places[p]) for p, leaf in pretrained.items()}
  trained = {path: flat[path] for path in programs.trained}
  frozen = {path: flat[path] for path in programs.frozen}
  create = functools.partial(_create_state, config, programs.tx)
  state = jax.jit(create, out_shardings=programs.state_shardings)(trained)
  return state, frozen


@dataclasses.dataclass
class Trainer:
  """A run in progress. `frozen` is never donated."""

  programs: Programs
  state: train_state.TrainState
  frozen: dict[str, Any]
  text: "Text"
  key: jax.Array

  @property
  def config(self) -> ConfigDict:
    return self.programs.config

  @property
  def averaged(self) -> dict[str, Any]:
    """The trained parameters to evaluate and to keep: the EMA where there is one."""
    return self.state.params if self.state.ema is None else self.state.ema

  def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A host batch on the devices, with its prompt embeddings."""
    place = self.programs.batch_sharding
    return {
      **loader_lib.put(batch, place, preference.INPUTS),
      **self.text.on_device(batch, place),
    }


def setup(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Trainer:
  """A config's run before its first step, on the config's mesh (of all devices).

  What runs on it belongs into `jax.set_mesh(trainer.programs.mesh)`.
  """
  mesh = sharding.make_mesh(config.mesh.fsdp, devices, tensor=config.mesh.tensor)
  with jax.set_mesh(mesh):
    programs = make_programs(config, mesh)
    text = Text(config, programs.reward_config.backbone.context_dim, mesh)
    state, frozen = initial_state(programs)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  return Trainer(programs, state, frozen, text, key)


class Text:
  """Where a batch's prompt embeddings come from: a cache, or the text encoders.

  With encoders the reading threads tokenize, and the encoding of the next batches is
  dispatched before the current step: the devices never wait for it on the host.
  """

  def __init__(self, config: ConfigDict, context_dim: int, mesh: jax.sharding.Mesh):
    self._encoder: encoders.TextEncoder | None = None
    data = config.data
    if data.prompts:
      cache = prompt_cache.PromptCache(data.prompts)
      found = cache.settings.t5_length
      if found != data.t5_length:
        raise ValueError(
          f"data.t5_length={data.t5_length}, but the embeddings in data.prompts="
          f"{data.prompts!r} were made with {found}"
        )
      if data.prompt_dropout:
        cache.require([""])
      self.fn = loader_lib.cached_text(cache)
      self.length = cache.settings.context_shape[0]
      return
    self._encoder = encoders.TextEncoder(
      config.model.base,
      t5_length=data.t5_length,
      context_dim=context_dim,
      dtype=config.model.dtype,
      sharding=sharding.replicated(mesh),
    )
    self.length = self._encoder.context_shape[0]
    self.fn = self._tokenize

  def _tokenize(self, prompts: list[str]) -> dict[str, np.ndarray]:
    return {f"ids/{k}": v for k, v in self._encoder.tokenize(prompts).items()}

  def on_device(self, batch: Mapping[str, Any], place: Any) -> dict[str, jax.Array]:
    """`context` and `pooled` of a host batch."""
    if self._encoder is None:
      return loader_lib.put(batch, place, ("context", "pooled"))
    names = [name for name in batch if name.startswith("ids/")]
    ids = loader_lib.put(batch, place, names)
    cond = self._encoder({name.removeprefix("ids/"): a for name, a in ids.items()})
    return {"context": cond.context, "pooled": cond.pooled}


# --- evaluation --------------------------------------------------------------------


def evaluate(trainer: Trainer, source: source_lib.PairSource) -> list[dict[str, Any]]:
  """Held-out accuracy per noise level and kind of pair: rows of `accuracy_table`.

  Ties count for nothing. The noise of a pair is the same at every evaluation, so that
  curves over steps compare like with like.
  """
  config, programs = trainer.config, trainer.programs
  size = config.eval.batch_size
  plan = plan_lib.BatchPlan(
    source.bucket, batch_size=size, seed=0, shuffle=False, num_epochs=1
  )
  batches = loader_lib.make_loader(
    source,
    plan,
    loader_lib.local_rows(programs.batch_sharding, size),
    text_fn=trainer.text.fn,
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 2)
  sigmas = tuple(float(s) for s in config.eval.sigmas)
  results = []
  for batch, _ in loader_lib.device_prefetch(iter(batches), trainer.prepare, depth=1):
    results.append(
      programs.eval_step(
        trainer.averaged, trainer.frozen, batch, jnp.asarray(sigmas, jnp.float32), key
      )
    )
  # One transfer at the end: the loop above only dispatches.
  results = jax.device_get(results)
  table = {k: np.concatenate([r[k] for r in results], axis=-1) for k in results[0]}
  counts = (table["weight"] > 0) & (table["preference"] > source_lib.TIE)
  if not counts.any():
    raise ValueError(f"{source.name}: all {len(source)} held-out pairs are ties")
  sides = table["r_chosen"][:, counts], table["r_rejected"][:, counts]
  return metrics_lib.accuracy_table(
    *sides,
    sigmas=sigmas,
    kind=table["kind"][counts],
    kind_names=source.kind_names,
    # The mean score over all levels; a head's own ensemble is train/evaluate.py's.
    ensembles={"mean": tuple(r.mean(axis=0) for r in sides)},
  )


def eval_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Rows of `evaluate` as flat metrics, with BEST_METRIC."""
  levels = [r["acc"] for r in rows if r["kind"] == "all" and r["sigma"] is not None]
  return metrics_lib.named_accuracies(rows, "val") | {
    BEST_METRIC: float(np.mean(levels))
  }


def write_report(workdir: pathlib.Path, name: str, rows: list[dict]) -> None:
  """accuracy.json, accuracy.png and a table on stdout."""
  (workdir / "accuracy.json").write_text(json.dumps(rows, indent=2) + "\n")
  curves, table = {}, {}
  for kind in dict.fromkeys(row["kind"] for row in rows):
    mine = [row for row in rows if row["kind"] == kind]
    table[kind] = mine
    levels = [row for row in mine if row["sigma"] is not None]
    curves[kind] = tuple([r[c] for r in levels] for c in ("sigma", "acc", "lo", "hi"))
  title = f"Held-out pair accuracy against noise level: {name}"
  plots.accuracy_vs_sigma(workdir / "accuracy.png", curves, title=title)
  names = ["mean" if r["sigma"] is None else f"{r['sigma']:g}" for r in table["all"]]
  print(f"{'held-out accuracy at sigma':28s}" + "".join(f"{n:>8s}" for n in names))
  for kind, mine in table.items():
    print(f"{kind:28s}" + "".join(f"{row['acc']:8.3f}" for row in mine))


# --- saving ------------------------------------------------------------------------


def save_model(trainer: Trainer, path: pathlib.Path) -> None:
  """The trained reward model as a model folder on top of its base.

  Where the backbone itself was not trained only adapters and head are written.
  """
  config, programs = trainer.config, trainer.programs
  leaves = {**trainer.averaged, **trainer.frozen}
  if config.model.init != "random" and not programs.trains_backbone:
    leaves = {
      p: a for p, a in leaves.items() if p in trainer.averaged or p.startswith("head/")
    }
  # Leaf by leaf: no device ever holds a whole model that is split over many.
  host = {p: processes.to_host(a) for p, a in leaves.items()}
  if not processes.is_main():
    return
  with folder_lib.write_atomically(path, force=True) as out:
    entry = build.save_reward(
      out,
      host,
      programs.reward_config,
      build.config_from_dict(config.scoring.to_dict()),
      stacked=config.model.scan_blocks,
    )
    folder_lib.write_config(
      out,
      {
        "source": {"trained": "train/reward.py"},
        "base": os.path.relpath(config.model.base, path),
        "components": {"reward": entry},
      },
    )


# --- the run -----------------------------------------------------------------------


def train(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> bool:
  """Trains to `train.num_steps`, continuing from the newest checkpoint if any.

  Returns: whether the run is complete; False if a signal ended it early, after saving.
  """
  workdir = pathlib.Path(config.workdir)
  source, held_out = build.pair_sources(config.data)
  trainer = setup(config, devices)
  with (
    jax.set_mesh(trainer.programs.mesh),
    trainers.checkpointed(
      config, trainer.state, may_change=MAY_CHANGE, best_metric=BEST_METRIC
    ) as checkpoints,
  ):
    with processes.StopSignal() as stop:
      rows = run(trainer, source, held_out, checkpoints, workdir, stop)
    if rows is None:
      print(
        f"stopped by a signal at step {checkpoints.latest} of "
        f"{config.train.num_steps}; the same command continues"
      )
      return False
    checkpoints.wait()  # a failed save is reported before the model is written
    save_model(trainer, workdir / "model")
    best = checkpoints.best
    if best is not None and best != config.train.num_steps:
      trainer.state, _ = checkpoints.restore(
        best, trainer.state, trainer.programs.state_shardings
      )
      save_model(trainer, workdir / "best_model")
      if processes.is_main():
        print(f"best was step {best}: {workdir}/best_model")
  if processes.is_main():
    write_report(workdir, workdir.name, rows)
    print(f"wrote {workdir}/model, accuracy.json, accuracy.png, metrics.jsonl")
  return True


def run(
  trainer: Trainer,
  source: source_lib.PairSource,
  held_out: source_lib.PairSource,
  checkpoints: checkpoint.Checkpoints,
  workdir: pathlib.Path,
  stop: processes.StopSignal,
) -> list[dict] | None:
  """All steps from the newest checkpoint on.

  Returns: the last evaluation's rows; None if `stop` ended the run early.
  """
  config, programs = trainer.config, trainer.programs
  num_steps = config.train.num_steps
  batches, plan = training_batches(trainer, source)
  start = checkpoints.latest or 0
  if start:
    trainer.state, extra = checkpoints.restore(
      start, trainer.state, programs.state_shardings
    )
    batches.set_state(extra["data"])
    trainer.key = jax.random.wrap_key_data(np.asarray(extra["key"], np.uint32))
  say = print if processes.is_main() else (lambda *_: None)
  if start:
    say(f"continuing {workdir} from step {start}")
  say(
    f"reward model: {weights.count(programs.trained):,} trained and "
    f"{weights.count(programs.frozen):,} frozen parameters; {jax.device_count()} "
    f"device(s) in {jax.process_count()} process(es); attention: {_kernel(config)}\n"
    f"data: {len(source):,} pairs in {len(source.latent_shapes)} bucket(s), "
    f"{num_steps:,} steps are {num_steps * plan.batch_size / len(source):.3g} epoch(s);"
    f" {len(held_out):,} held-out pairs"
  )
  peak = flops.peak(jax.devices()[0].device_kind)
  speed = run_log.Throughput(None if peak is None else peak * jax.device_count())
  key_data = np.asarray(jax.random.key_data(trainer.key)).tolist()
  rows: list[dict] = []
  log = _make_log(config, workdir, start, speed)

  def save(step: int, data_state: dict, metrics: Mapping[str, float] | None = None):
    log.flush()  # a state that came from NaN must not become a checkpoint
    checkpoints.save(
      step, trainer.state, {"data": data_state, "key": key_data}, metrics
    )

  with log:
    data_state, step = batches.get_state(), start
    stream = loader_lib.device_prefetch(
      batches, trainer.prepare, depth=config.data.device_prefetch
    )
    for step in range(start + 1, num_steps + 1):
      try:
        batch, data_state = next(stream)
      except source_lib.DataError:
        # Nothing that was computed is lost. Other processes cannot join in saving.
        if step > start + 1 and jax.process_count() == 1:
          save(step - 1, data_state)
        raise
      if step == start + 1:
        with speed.untimed():
          warm_up(trainer, batch, source.latent_shapes)
      shape = batch["chosen"].shape
      metrics = _train_step(trainer, batch)
      speed.add(2 * shape[0], 2 * shape[0] * _flops_per_image(trainer, shape))
      last = step == num_steps
      evaluated = step % config.eval.every == 0 or last
      log.step(step, metrics, now=evaluated or step % config.train.log_every == 0)
      scores = None
      if evaluated:
        log.flush(write=False)
        with speed.untimed():
          rows = evaluate(trainer, held_out)
        scores = eval_metrics(rows)
        log.add(scores)
      stopping = stop.requested(step)
      best_wanted = evaluated and config.train.keep_best > 0
      if step % config.train.checkpoint_every == 0 or last or stopping or best_wanted:
        save(step, data_state, scores)
      if stopping and not last:
        checkpoints.wait()
        return None
  # Nothing was left to train: report what the checkpoint holds.
  return rows or evaluate(trainer, held_out)


def training_batches(
  trainer: Trainer, source: source_lib.PairSource
) -> tuple[Any, plan_lib.BatchPlan]:
  """This process's iterator over training batches, and the plan they follow."""
  data, size = trainer.config.data, trainer.config.train.batch_size
  plan = plan_lib.BatchPlan(
    source.bucket,
    source.block,
    batch_size=size,
    seed=trainer.config.seed,
    reshuffle=data.reshuffle,
    window=data.shuffle_window,
  )
  dataset = loader_lib.make_loader(
    source,
    plan,
    loader_lib.local_rows(trainer.programs.batch_sharding, size),
    text_fn=trainer.text.fn,
    seed=trainer.config.seed,
    prompt_dropout=data.prompt_dropout,
    allow_ties=build.is_tie_aware(trainer.config.loss),
    num_threads=data.num_threads,
    prefetch=data.prefetch,
  )
  return iter(dataset), plan


def warm_up(
  trainer: Trainer,
  batch: Mapping[str, jax.Array],
  latent_shapes: Sequence[tuple[int, int, int]],
) -> None:
  """Compiles the training step for every bucket, so that no later step stalls.

  Args:
    batch: one of the batches; the others differ in their latents' sides.
    latent_shapes: of each bucket, (h, w, c).
  """
  shapes = list(dict.fromkeys(tuple(shape) for shape in latent_shapes))
  for i, shape in enumerate(shapes, 1):
    sides = {
      name: jax.ShapeDtypeStruct((len(a), *shape), a.dtype, sharding=a.sharding)
      for name in ("chosen", "rejected")
      for a in [batch[name]]
    }
    begin = time.monotonic()
    trainer.programs.train_step.lower(
      trainer.state, trainer.frozen, {**batch, **sides}, trainer.key
    ).compile()
    if processes.is_main() and len(shapes) > 1:
      print(
        f"compiled {i} of {len(shapes)} buckets: latents {shape[0]}x{shape[1]}, "
        f"{time.monotonic() - begin:.0f} s",
        flush=True,
      )


def _kernel(config: ConfigDict) -> str:
  """The attention kernel that `auto` stands for here."""
  model = config.model
  return attention.resolve(model.attention_impl, build.dtype(model.dtype))


def _train_step(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
  trainer.state, metrics = trainer.programs.train_step(
    trainer.state, trainer.frozen, batch, trainer.key
  )
  return metrics


def _flops_per_image(trainer: Trainer, shape: tuple[int, ...]) -> int:
  return flops.reward_training(
    trainer.programs.reward_config,
    shape[1],
    shape[2],
    trainer.text.length,
    train_backbone=trainer.programs.trains_backbone,
  )


def _make_log(
  config: ConfigDict, workdir: pathlib.Path, start: int, speed: run_log.Throughput
) -> run_log.LateLog:
  """Of the main process; the others only check."""
  log = None
  if processes.is_main():
    log = run_log.RunLog(
      workdir,
      resume_step=start,
      total_steps=config.train.num_steps,
      console_metrics=("train/loss", "train/acc", "perf/images_per_s", "perf/mfu"),
      wandb_project=config.wandb_project,
    )
  return run_log.LateLog(
    log,
    speed.rates,
    remedy="Lower train.learning_rate or train.clip_norm, or look at the data of this "
    "step",
  )


# --- without the devices -----------------------------------------------------------


def abstract_run(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Callable, tuple[Any, ...]]:
  """(jitted train step, its arguments as ShapeDtypeStructs on the mesh).

  The batch has the shapes of `config.aot`: pixels, text tokens, latents as after the
  autoencoder (an eighth of the side), embeddings in the model's dtype.
  """
  programs = make_programs(config, mesh)
  backbone = programs.reward_config.backbone
  b, place = config.train.batch_size, programs.batch_sharding
  latent = (config.aot.height // 8, config.aot.width // 8, backbone.in_channels)
  dtype = build.dtype(config.model.dtype)
  shapes = {
    "chosen": (latent, jnp.float32),
    "rejected": (latent, jnp.float32),
    "preference": ((), jnp.float32),
    "kind": ((), jnp.int32),
    "index": ((), jnp.int32),
    "weight": ((), jnp.float32),
    "context": ((config.aot.text_tokens, backbone.context_dim), dtype),
    "pooled": ((backbone.pooled_dim,), dtype),
  }
  batch = {
    name: jax.ShapeDtypeStruct((b, *shape), dtype, sharding=place)
    for name, (shape, dtype) in shapes.items()
  }

  def placed(tree, shardings):
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )

  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(mesh))
  return programs.train_step, (
    placed(programs.state, programs.state_shardings),
    placed(programs.frozen, programs.frozen_shardings),
    batch,
    key,
  )


def aot_reports(
  config: ConfigDict, target: aot.Target, recipe: str
) -> Iterator[tuple[str, aot.Report]]:
  """How the training step would fit a target (see lrm_jax.aot), with its name.

  With `aot.pairs_per_device` the batch grows with the number of devices.
  """
  config = config.copy_and_resolve_references()
  config.model.attention_impl = attention.resolve(
    config.model.attention_impl, build.dtype(config.model.dtype), target.kind
  )
  mesh = sharding.make_mesh(config.mesh.fsdp, target.devices, tensor=config.mesh.tensor)
  if config.aot.pairs_per_device is not None:
    devices = sharding.batch_size_divisor(mesh)
    config.train.batch_size = config.aot.pairs_per_device * devices
  config.eval.batch_size = config.train.batch_size  # which is not compiled
  step, args = abstract_run(config, mesh)
  programs = make_programs(config, mesh)
  images = 2 * config.train.batch_size
  size = config.aot.height // 8, config.aot.width // 8
  backbone = programs.reward_config.backbone
  attention_flops = images * flops.attention(
    backbone, flops.image_tokens(backbone, *size), config.aot.text_tokens
  )
  in_kernels = 0.0
  if target.kind == "tpu":
    in_kernels = flops.ATTENTION_PASSES[config.model.remat]
  report = aot.report(
    step,
    args,
    target,
    flops_per_step=float(
      images
      * flops.reward_training(
        programs.reward_config,
        *size,
        config.aot.text_tokens,
        train_backbone=programs.trains_backbone,
      )
    ),
    kernel_flops=attention_flops * in_kernels,
    settings={
      "recipe": recipe,
      "train.batch_size": config.train.batch_size,
      "train.accumulate": config.train.accumulate,
      "model.remat": config.model.remat,
      "model.scan_blocks": config.model.scan_blocks,
      "model.lora": config.model.lora is not None,
      "mesh.fsdp": config.mesh.fsdp,
      "mesh.tensor": config.mesh.tensor,
      "aot.height": config.aot.height,
      "aot.width": config.aot.width,
      "aot.text_tokens": config.aot.text_tokens,
    },
  )
  yield "train_step", report


if __name__ == "__main__":
  trainers.run(train, aot_reports)
