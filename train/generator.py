"""Pretrains the quickstart's generator: an MMDiT on real digits by flow matching.

  python train/generator.py --config configs/quickstart_generator.py

Leaves a model folder (`workdir/model`), samples for the reward model's pairs
(`samples.npz`), metrics, and pictures of samples.
"""

from collections.abc import Callable
import functools
import pathlib

from absl import app, flags, logging
from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_flags
import numpy as np

from lrm_jax import (
  build,
  compilation,
  flow,
  optim,
  run_log,
  sample,
  sharding,
  train_state,
  weights,
)
from lrm_jax import folder as folder_lib
from lrm_jax.data import digit_pairs, digits
from lrm_jax.models import features, mmdit

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/")


def make_model(config: ConfigDict) -> mmdit.MMDiTConfig:
  """The small transformer's architecture."""
  return mmdit.MMDiTConfig(
    num_layers=config.model.num_layers,
    num_heads=config.model.num_heads,
    head_dim=config.model.head_dim,
    dual_layers=tuple(config.model.dual_layers),
    in_channels=config.data.channels,
    out_channels=config.data.channels,
    context_dim=config.data.context_dim,
    pooled_dim=config.data.pooled_dim,
    pos_embed_size=config.model.pos_embed_size,
    pos_embed_base=config.model.pos_embed_size,
  )


def make_train_step(graphdef, tx, config: ConfigDict) -> Callable:
  """`step(state, frozen, data, key) -> (state, metrics)`, pure.

  `data` holds the whole training set (it is 1 MB): latents (n h w c), labels (n,),
  context (p l d) and pooled (p e) of all prompts. A batch is drawn inside, so that
  one call does everything.
  """
  table = flow.train_sigmas(config.noise.shift)
  options = dict(mean=config.noise.mean, std=config.noise.std)
  batch_size = config.train.batch_size

  def step(state, frozen, data, key):
    keys = jax.random.split(jax.random.fold_in(key, state.step), 5)
    pick = jax.random.randint(keys[0], (batch_size,), 0, data["latents"].shape[0])
    x0 = data["latents"][pick]
    template = jax.random.randint(keys[1], (batch_size,), 0, len(digits.TEMPLATES))
    prompt = 1 + data["labels"][pick] * len(digits.TEMPLATES) + template
    drop = jax.random.bernoulli(keys[2], config.data.prompt_dropout, (batch_size,))
    prompt = jnp.where(drop, 0, prompt)  # prompt 0 is the empty one
    cond = features.Cond(data["context"][prompt], data["pooled"][prompt])
    u = flow.draw_u(keys[3], (batch_size,), config.noise.distribution, **options)
    sigma = flow.nearest_sigma(u, table)
    eps = jax.random.normal(keys[4], x0.shape)

    def loss_fn(params):
      model = nnx.merge(graphdef, optim.join(params, frozen))
      v, _ = model(flow.add_noise(x0, eps, sigma), 1000.0 * sigma, cond)
      return jnp.mean((v - (eps - x0)) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = train_state.apply_gradients(state, grads, tx, ema_decay=None)
    return state, {"train/loss": loss}

  return step


def make_train_steps(step: Callable, num: int) -> Callable:
  """`num` steps as one program; metrics are averaged over them.

  The data are on the device, so the host has nothing to do in between; and on a CPU a
  loop inside the program reuses its buffers (a third faster than one call a step).
  """

  def steps(state, frozen, data, key):
    def body(state, _):
      return step(state, frozen, data, key)

    state, metrics = jax.lax.scan(body, state, length=num)
    return state, jax.tree.map(jnp.mean, metrics)

  return steps


def make_sampler(graphdef, config: ConfigDict) -> Callable:
  """`(params, frozen, inputs, noise, scale) -> latents`: guided Euler steps.

  `inputs` is (cond, uncond); a scale of 1 is no guidance (and costs the same here).
  """
  schedule = sample.make_schedule(
    flow.sampling_sigmas(config.samples.num_steps, config.noise.shift)
  )
  ode = sample.SAMPLERS["euler"]

  def run(params, frozen, inputs, noise, scale):
    model = nnx.merge(graphdef, optim.join(params, frozen))

    def velocity(cond, x, sigma):
      return model(x, 1000.0 * sigma, cond)[0]

    return sample.rollout(
      sample.guide(velocity, scale), inputs, noise, schedule, sampler=ode
    )[0]

  return run


def draw_samples(
  sampler, params, frozen, data, config: ConfigDict, *, num: int, key, scale: float
) -> digits.Labelled:
  """`num` images, digits in turn, templates in turn within a digit."""
  labels = np.arange(num) % digits.NUM_DIGITS
  templates = (np.arange(num) // digits.NUM_DIGITS) % len(digits.TEMPLATES)
  prompt = 1 + labels * len(digits.TEMPLATES) + templates
  cond = features.Cond(data["context"][prompt], data["pooled"][prompt])
  uncond = jax.tree.map(jnp.zeros_like, cond)
  noise = jax.random.normal(key, (num, *data["latents"].shape[1:]))
  latents = sampler(params, frozen, (cond, uncond), noise, scale)
  images = digits.from_latent(np.clip(np.asarray(latents), -1, 1))
  return digits.Labelled(images, labels)


def save_model(path, config: ConfigDict, model_config, params, frozen) -> None:
  """The generator as a model folder."""
  leaves = {
    p: np.asarray(leaf)
    for p, leaf in weights.flatten(optim.join(params, frozen)).items()
  }
  with folder_lib.write_atomically(path, force=True) as out:
    folder_lib.save_params(out / "transformer", leaves)
    folder_lib.write_config(
      out,
      {
        "source": {"trained": "train/generator.py"},
        "components": {
          "transformer": {"config": build.config_to_dict(model_config)},
          "scheduler": {
            "shift": config.noise.shift,
            "num_train_timesteps": flow.NUM_TRAIN_STEPS,
          },
        },
      },
    )


def train(config: ConfigDict) -> None:
  """The whole run, on all devices."""
  workdir = pathlib.Path(config.workdir)
  run_log.write_run_info(workdir, config.to_dict(), seed=config.seed)
  mesh = sharding.make_mesh(config.mesh.fsdp)
  with jax.set_mesh(mesh):
    run(config, workdir, mesh)


def run(config: ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
  """Training, sampling and saving, on a mesh that is set."""
  splits = digits.load_splits(config.data.split_seed)
  embedder = digits.WordEmbedder(config.data.context_dim, config.data.pooled_dim)
  data = jax.device_put(
    {
      "latents": digits.to_latent(splits.train.images, config.data.channels),
      "labels": splits.train.labels.astype(np.int32),
      "context": embedder.context(digits.PROMPTS),
      "pooled": embedder.pooled(digits.PROMPTS),
    },
    sharding.replicated(mesh),
  )
  model_config = make_model(config)
  init_key, train_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
  graphdef, params = weights.split(mmdit.MMDiT(model_config, rngs=nnx.Rngs(init_key)))
  params, frozen = optim.partition(params, (("^pos_embed$", "freeze"), (".*", "train")))
  print(f"generator: {weights.count(params):,} parameters, {len(splits.train)} digits")
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
  state = train_state.create(params, tx, use_ema=False)
  state, frozen = jax.device_put((state, frozen), sharding.replicated(mesh))
  step = make_train_step(graphdef, tx, config)
  steps = jax.jit(make_train_steps(step, config.train.log_every), donate_argnums=0)
  sampler = jax.jit(make_sampler(graphdef, config))
  draw = functools.partial(draw_samples, sampler, data=data, config=config)

  sets = {}
  counts = {"train": config.samples.num_train, "held_out": config.samples.num_held_out}

  def draw_sets(name, params, key):
    for i, (part, num) in enumerate(counts.items()):
      sets[f"{name}_{part}"] = draw(
        params,
        frozen,
        num=num,
        key=jax.random.fold_in(key, i),
        scale=config.samples.guidance_scale,
      )

  keys = jax.random.split(sample_key, 3)
  num_steps, stride = config.train.num_steps, config.train.log_every
  early = config.samples.early_step
  if not 0 < early < num_steps or num_steps % stride or early % stride:
    raise ValueError(
      f"samples.early_step={early} must be less than train.num_steps={num_steps}, and "
      f"both must be multiples of train.log_every={stride}"
    )
  with run_log.RunLog(workdir, resume_step=0, total_steps=num_steps) as log:
    for i in range(stride, num_steps + 1, stride):
      state, metrics = steps(state, frozen, data, train_key)
      log.log(i, metrics)
      if i == early:
        draw_sets("early", state.params, keys[0])
  draw_sets("final", state.params, keys[1])

  save_model(workdir / "model", config, model_config, state.params, frozen)
  digit_pairs.save_samples(workdir / "samples.npz", sets)
  oracle = digits.Oracle(splits.oracle)
  guided = draw(
    state.params,
    frozen,
    num=config.samples.num_held_out,
    key=keys[2],
    scale=config.samples.guided_scale,
  )
  print(f"{'samples':24s} {'read as their digit':>20s} {'Frechet distance':>17s}")
  for name, made in (
    (f"step {early}", sets["early_held_out"]),
    (f"step {num_steps}", sets["final_held_out"]),
    (f"step {num_steps}, guidance {config.samples.guided_scale:g}", guided),
  ):
    right = float(np.mean(oracle.correct(made.images, made.labels)))
    distance = digits.frechet_distance(made.images, splits.held_out.images)
    print(f"{name:24s} {right:20.3f} {distance:17.2f}")
  for name, made in (
    ("early", sets["early_held_out"]),
    ("final", sets["final_held_out"]),
  ):
    digits.save_grid(workdir / f"samples_{name}.png", made.images[:100])
  digits.save_grid(workdir / "samples_guided.png", guided.images[:100])
  print(f"wrote {workdir}/model, samples.npz, metrics.jsonl, samples_*.png")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
  compilation.configure()
  try:
    train(_CONFIG.value)
  except (ValueError, OSError, FloatingPointError) as e:
    raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
