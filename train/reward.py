"""Trains a latent reward model on preference pairs.

  python train/reward.py --config configs/sd35m.py
  python train/reward.py --config configs/quickstart.py --config.train.num_steps=100

Leaves in `workdir`: checkpoints (a rerun continues from the newest), metrics as JSONL
and TensorBoard, `accuracy.json` and `accuracy.png` (held-out pair accuracy against
noise level), and the trained model as a model folder (`workdir/model`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

from absl import app, flags, logging
from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_flags
import numpy as np
import optax

from lrm_jax import (
  build,
  checkpoint,
  flow,
  optim,
  plots,
  run_log,
  sharding,
  train_state,
  weights,
)
from lrm_jax import folder as folder_lib
from lrm_jax import metrics as metrics_lib
from lrm_jax.data import pairs
from lrm_jax.keymaps import lora as lora_keymap
from lrm_jax.models import features, reward

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/")


# --- the two jitted programs -------------------------------------------------------


def pair_scores(
  model: reward.RewardModel,
  batch: Mapping[str, jax.Array],
  sigma: jax.Array,
  noise_key: jax.Array,
  *,
  shared_noise: bool,
  constrain: Callable[[Any], Any] = lambda tree: tree,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(r_chosen, r_rejected), each (b,), of one batch at noise levels sigma (b,).

  Both sides run as one batch of 2b, the two of a pair next to each other: a batch
  split over devices then stays where it is. `constrain` pins that split.
  """
  x0 = jnp.stack([batch["chosen"], batch["rejected"]], axis=1).astype(jnp.float32)
  draws = 1 if shared_noise else 2
  eps = jax.random.normal(noise_key, (x0.shape[0], draws, *x0.shape[2:]))
  x = flow.add_noise(x0, jnp.broadcast_to(eps, x0.shape), sigma)
  x = x.reshape(-1, *x.shape[2:])
  cond = features.Cond(batch["context"], batch["pooled"])
  sigma, cond = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), (sigma, cond))
  scores = model(*constrain((x, sigma, cond)), key=dropout_key)
  return tuple(scores.reshape(-1, 2).T)


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  *,
  sigma_fn: Callable[[jax.Array, int], jax.Array],
  loss_fn: Callable[..., jax.Array],
  shared_noise: bool,
  ema_decay: float | None,
  constrain: Callable[[Any], Any] = lambda tree: tree,
) -> Callable:
  """`step(state, frozen, batch, key) -> (state, metrics)`, pure.

  Every random draw comes from `key` folded with the step number, so a resumed run
  repeats the uninterrupted one.
  """

  def step(state, frozen, batch, key):
    keys = jax.random.split(jax.random.fold_in(key, state.step), 3)
    sigma = sigma_fn(keys[0], batch["chosen"].shape[0])

    def objective(params):
      model = nnx.merge(graphdef, optim.join(params, frozen))
      r_chosen, r_rejected = pair_scores(
        model,
        batch,
        sigma,
        keys[1],
        shared_noise=shared_noise,
        constrain=constrain,
        dropout_key=keys[2],
      )
      loss = jnp.mean(loss_fn(r_chosen, r_rejected, sigma))
      return loss, (r_chosen, r_rejected)

    (loss, scores), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    r_chosen, r_rejected = scores
    state = train_state.apply_gradients(state, grads, tx, ema_decay=ema_decay)
    return state, {
      "train/loss": loss,
      "train/acc": jnp.mean(r_chosen > r_rejected),
      "train/score_gap": jnp.mean(r_chosen - r_rejected),
      "train/score_mean": jnp.mean(jnp.concatenate(scores)),
      "train/grad_norm": optax.tree.norm(grads),
    }

  return step


def make_eval_step(
  graphdef: nnx.GraphDef,
  *,
  shared_noise: bool,
  constrain: Callable[[Any], Any] = lambda tree: tree,
) -> Callable:
  """`step(params, frozen, batch, sigma (), key) -> (r_chosen, r_rejected)`."""

  def step(params, frozen, batch, sigma, key):
    model = nnx.merge(graphdef, optim.join(params, frozen))
    sigma = jnp.broadcast_to(sigma, (batch["chosen"].shape[0],))
    return pair_scores(
      model, batch, sigma, key, shared_noise=shared_noise, constrain=constrain
    )

  return step


# --- setting up --------------------------------------------------------------------


@dataclasses.dataclass
class Trainer:
  """Everything a run needs, ready to step.

  `state` and `frozen` live on devices, placed by `state_shardings` and the config's
  rules; `frozen` is never donated.
  """

  config: ConfigDict
  reward_config: reward.RewardConfig
  graphdef: nnx.GraphDef
  state: train_state.TrainState
  frozen: dict[str, Any]
  state_shardings: Any
  batch_sharding: Any
  train_step: Callable
  eval_step: Callable


def abstract_params(config: ConfigDict) -> tuple[Any, nnx.GraphDef, dict]:
  """(RewardConfig, graphdef, abstract nested params) of a config; allocates nothing."""
  full = build.full_transformer(config.model)
  reward_config = build.reward_config(config.model, full)
  make = build.reward_factory(config.model, reward_config)
  graphdef, params = weights.abstract(lambda: make(nnx.Rngs(0)))
  return reward_config, graphdef, params


def make_tx(config: ConfigDict) -> optax.GradientTransformation:
  """The optimizer of a config."""
  schedule = optim.make_schedule(
    config.train.schedule,
    learning_rate=config.train.learning_rate,
    warmup_steps=config.train.warmup_steps,
    num_steps=config.train.num_steps,
  )
  return optim.make_tx(
    schedule,
    weight_decay=config.train.weight_decay,
    clip_norm=config.train.clip_norm,
  )


def setup(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Trainer:
  """Builds model, optimizer and programs on the config's mesh (of all devices).

  Raises:
    ValueError, FolderError: a config or base folder that does not fit; the message
      names the key.
  """
  devices = jax.devices() if devices is None else devices
  fsdp = len(devices) if config.mesh.fsdp == -1 else config.mesh.fsdp
  mesh = sharding.make_mesh(fsdp, devices)
  jax.set_mesh(mesh)
  for name, size in (("train", config.train), ("eval", config.eval)):
    if size.batch_size % mesh.size:
      raise ValueError(
        f"{name}.batch_size={size.batch_size} must be a multiple of the {mesh.size} "
        "devices"
      )
  reward_config, graphdef, abstract = abstract_params(config)
  rules = tuple(config.sharding)

  # Pretrained leaves come from disk; only the others are ever initialised (inside
  # jit, where what is not returned is not computed either).
  full = build.full_transformer(config.model)
  make = build.reward_factory(config.model, reward_config)
  pretrained = build.base_backbone(config.model, full, reward_config, abstract)

  def init(key):
    flat = weights.flatten(weights.split(make(nnx.Rngs(key)))[1])
    return {path: leaf for path, leaf in flat.items() if path not in pretrained}

  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  placement = sharding.shardings(jax.eval_shape(init, key), mesh, rules)
  flat = {**pretrained, **jax.jit(init, out_shardings=placement)(key)}
  flat = jax.device_put(flat, sharding.shardings(flat, mesh, rules))

  trained, frozen = optim.partition(weights.unflatten(flat), tuple(config.trainable))
  tx = make_tx(config)
  create = functools.partial(
    train_state.create, tx=tx, use_ema=config.train.ema_decay is not None
  )
  state_shardings = sharding.shardings(jax.eval_shape(create, trained), mesh, rules)
  # Without out_shardings Adam's moments would come out replicated.
  state = jax.jit(create, out_shardings=state_shardings)(trained)
  batch_sharding = sharding.batch_sharding(mesh)
  replicated = sharding.replicated(mesh)
  constrain = functools.partial(
    jax.lax.with_sharding_constraint, shardings=batch_sharding
  )
  train_step = make_train_step(
    graphdef,
    tx,
    sigma_fn=build.sigma_fn(config.noise),
    loss_fn=build.loss_fn(config.loss),
    shared_noise=config.noise.shared,
    ema_decay=config.train.ema_decay,
    constrain=constrain,
  )
  eval_step = make_eval_step(
    graphdef, shared_noise=config.noise.shared, constrain=constrain
  )
  return Trainer(
    config=config,
    reward_config=reward_config,
    graphdef=graphdef,
    state=state,
    frozen=frozen,
    state_shardings=state_shardings,
    batch_sharding=batch_sharding,
    train_step=jax.jit(
      train_step, donate_argnums=0, out_shardings=(state_shardings, replicated)
    ),
    eval_step=jax.jit(eval_step, out_shardings=replicated),
  )


def put_batch(batch: Mapping[str, np.ndarray], placement: Any) -> dict[str, jax.Array]:
  """The model's inputs of a host batch, on the devices."""
  names = ("chosen", "rejected", "context", "pooled")
  return {
    name: jax.make_array_from_process_local_data(placement, batch[name])
    for name in names
  }


# --- evaluation --------------------------------------------------------------------


def evaluate(trainer: Trainer, source: pairs.PairSource) -> list[dict[str, Any]]:
  """Held-out accuracy per noise level and kind of pair: rows of `accuracy_table`.

  The noise of pair i at level s is the same at every evaluation, so that curves over
  steps compare like with like.
  """
  config = trainer.config
  state = trainer.state
  params = state.params if state.ema is None else state.ema
  size = config.eval.batch_size
  key = jax.random.fold_in(jax.random.key(config.seed), 2)
  sigmas = tuple(config.eval.sigmas)
  loader = pairs.make_loader(
    source,
    batch_size=size,
    seed=0,
    shuffle=False,
    num_epochs=1,
    prompt_dropout=0.0,
    drop_remainder=False,
  )
  scores: list[list[Any]] = [[] for _ in sigmas]
  kinds, counts = [], []
  for i, host in enumerate(loader):
    count = len(host["kind"])
    kinds.append(host["kind"])
    counts.append(count)
    if count < size:  # pad, so that the last batch does not compile anew
      host = {k: np.resize(v, (size, *v.shape[1:])) for k, v in host.items()}
    batch = put_batch(host, trainer.batch_sharding)
    for s, sigma in enumerate(sigmas):
      noise_key = jax.random.fold_in(jax.random.fold_in(key, s), i)
      sigma = jnp.asarray(sigma, jnp.float32)
      scores[s].append(
        trainer.eval_step(params, trainer.frozen, batch, sigma, noise_key)
      )
  # One transfer at the end: the loop above only dispatches.
  sides = [
    np.stack(
      [
        np.concatenate([r[side][:n] for r, n in zip(row, counts, strict=True)])
        for row in jax.device_get(scores)
      ]
    )
    for side in (0, 1)
  ]
  return metrics_lib.accuracy_table(
    *sides,
    sigmas=sigmas,
    kind=np.concatenate(kinds),
    kind_names=source.kind_names,
  )


def write_report(workdir: pathlib.Path, name: str, rows: list[dict]) -> None:
  """accuracy.json, accuracy.png and a table on stdout."""
  (workdir / "accuracy.json").write_text(json.dumps(rows, indent=2) + "\n")
  curves = {}
  for kind in dict.fromkeys(row["kind"] for row in rows):
    mine = [row for row in rows if row["kind"] == kind]
    curves[kind] = tuple([r[c] for r in mine] for c in ("sigma", "acc", "lo", "hi"))
  title = f"Held-out pair accuracy against noise level: {name}"
  plots.accuracy_vs_sigma(workdir / "accuracy.png", curves, title=title)
  print(
    f"{'held-out accuracy at sigma':28s}"
    + "".join(f"{s:>8g}" for s in curves["all"][0])
  )
  for kind, (_, acc, _, _) in curves.items():
    print(f"{kind:28s}" + "".join(f"{a:8.3f}" for a in acc))


# --- saving ------------------------------------------------------------------------


def save_model(trainer: Trainer, path: pathlib.Path) -> None:
  """The trained reward model as a model folder on top of its base.

  Where the backbone itself was not trained only adapters and head are written.
  """
  config, state = trainer.config, trainer.state
  trained = state.params if state.ema is None else state.ema
  flat = weights.flatten(optim.join(trained, trainer.frozen))
  backbone_trained = config.model.init == "random" or any(
    p.startswith("backbone/") and "/lora_" not in p for p in trained
  )
  if not backbone_trained:
    flat = {p: a for p, a in flat.items() if p in trained or p.startswith("head/")}
  leaves = {p: np.asarray(a) for p, a in flat.items()}
  if not config.model.scan_blocks:
    leaves = build.stack_flat(leaves)
  entry: dict[str, Any] = {
    "kind": "dina" if config.model.head.type == "QFormerHeadConfig" else "drm",
    "config": build.config_to_dict(trainer.reward_config),
    "stored_backbone": (
      build.config_to_dict(trainer.reward_config.backbone) if backbone_trained else None
    ),
    "scoring": build.config_to_dict(build.config_from_dict(config.scoring.to_dict())),
  }
  if trainer.reward_config.lora is not None:
    targets, exclude = lora_keymap.peft_names(
      trainer.reward_config.backbone, trainer.reward_config.lora
    )
    entry["adapter"] = {"target_modules": targets, "exclude_modules": exclude}
  with folder_lib.write_atomically(path, force=True) as out:
    folder_lib.save_params(out / "reward", leaves)
    folder_lib.write_config(
      out,
      {
        "source": {"trained": "train/reward.py"},
        "base": os.path.relpath(config.model.base, path),
        "components": {"reward": entry},
      },
    )


# --- the run -----------------------------------------------------------------------

# Settings that may change between a run and its continuation; any other would make
# the result neither the old run's nor the new one's.
MAY_CHANGE = re.compile(
  r"workdir|eval\..*|mesh\..*|"
  r"train\.(num_steps|log_every|checkpoint_every|keep_checkpoints)"
)


def check_same_run(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Compares the config of the run that left checkpoints in `workdir` with this one.

  Raises:
    ValueError: they differ in more than MAY_CHANGE; every difference is listed.
  """
  info = workdir / "run.json"
  if not info.is_file():
    raise ValueError(f"{workdir} holds checkpoints but no run.json: whose are they?")
  old = weights.flatten(json.loads(info.read_text())["config"])
  new = weights.flatten(json.loads(json.dumps(config.to_dict())))
  old, new = ({k.replace("/", "."): v for k, v in c.items()} for c in (old, new))
  differences = [
    f"{key}: {old.get(key)} then, {new.get(key)} now"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not MAY_CHANGE.fullmatch(key)
  ]
  if differences:
    raise ValueError(
      f"{workdir} holds a run with other settings; choose another workdir or delete "
      "it\n  " + "\n  ".join(differences)
    )


def train(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
  """Trains to `train.num_steps`, continuing from the newest checkpoint if any."""
  workdir = pathlib.Path(config.workdir)
  trainer = setup(config, devices)
  source, held_out = build.pair_sources(config.data)
  loader = iter(
    pairs.make_loader(
      source,
      batch_size=config.train.batch_size,
      seed=config.seed,
      shuffle=True,
      num_epochs=None,
      prompt_dropout=config.data.prompt_dropout,
      drop_remainder=True,
    )
  )
  with checkpoint.Checkpoints(
    workdir / "checkpoints", keep=config.train.keep_checkpoints
  ) as checkpoints:
    if checkpoints.latest is not None:
      check_same_run(workdir, config)
    run_log.write_run_info(workdir, config.to_dict(), seed=config.seed)
    rows = run(trainer, loader, held_out, checkpoints, workdir)
  save_model(trainer, workdir / "model")
  write_report(workdir, workdir.name, rows)
  print(f"wrote {workdir}/model, accuracy.json, accuracy.png, metrics.jsonl")


def run(
  trainer: Trainer,
  loader: Any,
  held_out: pairs.PairSource,
  checkpoints: checkpoint.Checkpoints,
  workdir: pathlib.Path,
) -> list[dict]:
  """All steps from the newest checkpoint on. Returns the last evaluation's rows."""
  config = trainer.config
  num_steps = config.train.num_steps
  start = checkpoints.latest or 0
  if start:
    trainer.state, data_state = checkpoints.restore(
      start, trainer.state, trainer.state_shardings
    )
    loader.set_state(data_state)
    print(f"continuing {workdir} from step {start}")
  print(
    f"reward model: {weights.count(trainer.state.params):,} trained and "
    f"{weights.count(trainer.frozen):,} frozen parameters; {len(held_out):,} held-out "
    f"pairs; {jax.device_count()} device(s)"
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  rows: list[dict] = []
  with run_log.RunLog(workdir, resume_step=start, total_steps=num_steps) as log:
    pending: tuple[int, dict] | None = None
    for step in range(start + 1, num_steps + 1):
      batch = put_batch(next(loader), trainer.batch_sharding)
      trainer.state, metrics = trainer.train_step(
        trainer.state, trainer.frozen, batch, key
      )
      # Fetching the previous step's metrics leaves the device one step ahead.
      if pending is not None:
        log.log(*pending)
        pending = None
      last = step == num_steps
      evaluated = step % config.eval.every == 0 or last
      if evaluated:
        rows = evaluate(trainer, held_out)
        metrics |= metrics_lib.named_accuracies(rows, "val")
      if step % config.train.log_every == 0 or evaluated:
        pending = step, metrics
      if step % config.train.checkpoint_every == 0 or last:
        checkpoints.save(step, trainer.state, loader.get_state())
    if pending is not None:
      log.log(*pending)
  # Nothing was left to train: report what the checkpoint holds.
  return rows or evaluate(trainer, held_out)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
  try:
    train(_CONFIG.value)
  except (ValueError, OSError, FloatingPointError) as e:
    raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
