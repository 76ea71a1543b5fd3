"""Reward training end to end on tiny models: steps, sharding, resuming, saving."""

import copy
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import build, folder, optim, weights
from lrm_jax.data import pairs
from lrm_jax.models import mmdit
from tests import golden_models, helpers

sys.path.insert(0, str(helpers.GOLDEN.parents[2] / "train"))
sys.path.insert(0, str(helpers.GOLDEN.parents[2] / "configs"))

import reward as train_reward

ONE = jax.devices()[:1]  # compiles much faster than eight
SIZE, CHANNELS, TEXT, POOLED = (4, 6), 16, 12, 20


def config_of(name: str, *args):
  return importlib.import_module(name).get_config(*args)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A model folder with a random transformer of 3 blocks."""
  path = tmp_path_factory.mktemp("base") / "model"
  config = mmdit.MMDiTConfig(
    num_layers=3,
    num_heads=2,
    head_dim=8,
    dual_layers=(0,),
    context_dim=TEXT,
    pooled_dim=POOLED,
    pos_embed_size=6,
    pos_embed_base=6,
  )
  model = golden_models.random_model(golden_models.make_mmdit(config))
  with folder.write_atomically(path, force=False) as out:
    folder.save_params(out / "transformer", weights.flatten(model.params))
    entry = {"config": build.config_to_dict(config)}
    folder.write_config(out, {"components": {"transformer": entry}})
  return path


@pytest.fixture(scope="module")
def pair_folders(tmp_path_factory):
  """Pairs that can be told apart: the chosen latent is shifted."""
  root = tmp_path_factory.mktemp("pairs")
  rng = np.random.default_rng(0)
  for name, count in (("train", 48), ("held_out", 20)):
    shape = (count, *SIZE, CHANNELS)
    pairs.write_pairs(
      root / name,
      chosen=rng.standard_normal(shape, np.float32) + 0.5,
      rejected=rng.standard_normal(shape, np.float32) - 0.5,
      prompt_id=rng.integers(0, 3, count),
      prompts=("", "a cat", "a dog"),
      context=rng.standard_normal((3, 5, TEXT), np.float32),
      pooled=rng.standard_normal((3, POOLED), np.float32),
    )
  return root


def tiny(name: str, base, pair_folders, workdir):
  """A full-size recipe with its sizes, and nothing else, made small."""
  c = config_of(name)
  c.workdir = str(workdir)
  c.data.train = str(pair_folders / "train")
  c.data.held_out = str(pair_folders / "held_out")
  c.model.base = str(base)
  c.model.transformer = ""
  c.model.num_layers = 2
  c.model.dtype = "float32"
  c.model.backbone_dtype = "float32"
  if name == "sd35m":
    c.model.image_taps = c.model.text_taps = (1, 2)
    c.model.head.update(width=16, num_heads=2)
    c.model.lora.update(rank=2, alpha=4.0)
  else:
    c.model.head.update(base_channels=4, num_groups=2, hidden=8)
  c.train.batch_size = 8
  c.train.num_steps = 4
  c.train.learning_rate = 1e-2
  c.train.warmup_steps = 0
  c.train.log_every = 1
  c.train.checkpoint_every = 2
  c.eval.sigmas = (0.1, 0.6)
  c.eval.batch_size = 8
  c.eval.every = 4
  return c


def run_steps(config, num_steps: int, devices=ONE) -> tuple[list[float], object]:
  trainer = train_reward.setup(config, devices)
  source, _ = build.pair_sources(config.data)
  loader = pairs.make_loader(
    source,
    batch_size=config.train.batch_size,
    seed=0,
    shuffle=True,
    num_epochs=None,
    prompt_dropout=0.0,
    drop_remainder=True,
  )
  key, losses = jax.random.key(1), []
  for _, host in zip(range(num_steps), loader, strict=False):
    batch = train_reward.put_batch(host, trainer.batch_sharding)
    trainer.state, metrics = trainer.train_step(
      trainer.state, trainer.frozen, batch, key
    )
    losses.append(float(metrics["train/loss"]))
  return losses, trainer


# --- full-size recipes -------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "trained", "frozen"),
  [
    # 28.3 M adapters and the 139.3 M head; trunk, 12 blocks, and the position table.
    ("sd35m", 28_311_552 + 139_296_003, 1_232_739_840 + 384 * 1536),
    # Trunk, 21 blocks, output layer, and the head.
    ("drm_sd35m", 2_014_094_720 + 4_820_032 + 3_842_817, 384 * 1536),
  ],
)
def test_published_recipes_build_abstractly(name, trained, frozen):
  config = config_of(name)
  _, graphdef, abstract = train_reward.abstract_params(config)
  parts = optim.partition(abstract, tuple(config.trainable))
  assert [weights.count(p) for p in parts] == [trained, frozen]
  wanted = build.dtype(config.model.trained_dtype)
  assert all(leaf.dtype == wanted for leaf in parts[0].values())

  step = train_reward.make_train_step(
    graphdef,
    train_reward.make_tx(config),
    sigma_fn=build.sigma_fn(config.noise),
    loss_fn=build.loss_fn(config.loss),
    shared_noise=config.noise.shared,
    ema_decay=config.train.ema_decay,
  )
  tx = train_reward.make_tx(config)
  state = jax.eval_shape(
    lambda p: train_reward.train_state.create(p, tx, use_ema=False), parts[0]
  )
  b = config.train.batch_size
  batch = {
    "chosen": jax.ShapeDtypeStruct((b, 64, 64, 16), jnp.float32),
    "rejected": jax.ShapeDtypeStruct((b, 64, 64, 16), jnp.float32),
    "context": jax.ShapeDtypeStruct((b, 205, 4096), jnp.float32),
    "pooled": jax.ShapeDtypeStruct((b, 2048), jnp.float32),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  new_state, metrics = jax.eval_shape(step, state, parts[1], batch, key)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), new_state) == jax.tree.map(
    lambda a: (a.shape, a.dtype), state
  )
  assert metrics["train/loss"].shape == ()


def test_every_config_key_is_read():
  """A misspelt or forgotten key would be an option without effect."""
  text = "".join(
    p.read_text()
    for folder_name in ("train", "lrm_jax")
    for p in sorted((helpers.GOLDEN.parents[2] / folder_name).rglob("*.py"))
  )

  def keys(values, dataclass_fields=False):
    for key, value in values.items():
      if "type" not in values:  # a dataclass's fields are checked by the dataclass
        yield key
      if isinstance(value, dict):
        yield from keys(value)

  for name in ("quickstart", "quickstart_generator", "sd35m", "drm_sd35m"):
    for key in keys(config_of(name).to_dict()):
      assert f".{key}" in text or f'"{key}"' in text or f"{key}:" in text, (name, key)


# --- steps -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd35m", "drm_sd35m"])
def test_training_learns_and_leaves_the_frozen_part_alone(
  name, base, pair_folders, tmp_path
):
  config = tiny(name, base, pair_folders, tmp_path)
  before = {k: np.asarray(v) for k, v in train_reward.setup(config, ONE).frozen.items()}
  config.train.learning_rate = 3e-3
  losses, trainer = run_steps(config, 50)
  assert np.mean(losses[-8:]) < 0.75 * np.mean(losses[:8]), losses
  for path, leaf in trainer.frozen.items():
    np.testing.assert_array_equal(leaf, before[path])
  assert trainer.train_step._cache_size() == 1


@pytest.mark.parametrize(("name", "fsdp"), [("sd35m", 1), ("drm_sd35m", 4)])
def test_eight_devices_give_the_losses_of_one(name, fsdp, base, pair_folders, tmp_path):
  """Data parallel for the adapters, 2 x 4 FSDP for the full fine-tune."""
  config = tiny(name, base, pair_folders, tmp_path)
  config.sharding = ((".*", "fsdp"),)
  config.mesh.fsdp = 1
  reference, _ = run_steps(config, 3, ONE)
  config.mesh.fsdp = fsdp
  losses, trainer = run_steps(config, 3, jax.devices())
  np.testing.assert_allclose(losses, reference, rtol=2e-4)
  name = "head/out/kernel"
  leaf = trainer.state.params[name]
  adam = trainer.state.opt_state[1][0]
  moments = (adam.mu[name], adam.nu[name])
  for array in (leaf, *moments):
    assert array.addressable_shards[0].data.size * fsdp == array.size


def test_ema_follows_at_its_decay(base, pair_folders, tmp_path):
  config = tiny("sd35m", base, pair_folders, tmp_path)
  config.train.ema_decay = 0.75
  _, start = run_steps(config, 0)
  first = {k: np.asarray(v) for k, v in start.state.params.items()}
  _, after = run_steps(config, 1)
  for path, leaf in after.state.ema.items():
    expected = 0.75 * first[path] + 0.25 * np.asarray(after.state.params[path])
    np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7)


# --- the whole run -----------------------------------------------------------------


def test_run_resume_and_saved_model(base, pair_folders, tmp_path, capsys):
  config = tiny("sd35m", base, pair_folders, tmp_path / "whole")
  train_reward.train(config, ONE)
  whole = folder.load_params(tmp_path / "whole" / "model" / "reward")

  # Two steps, a stop, and the rest: bit for bit the same.
  halves = copy.deepcopy(config)
  halves.workdir = str(tmp_path / "halves")
  halves.train.num_steps = 2
  train_reward.train(halves, ONE)
  halves.train.num_steps = 4
  train_reward.train(halves, ONE)
  assert "continuing" in capsys.readouterr().out
  resumed = folder.load_params(tmp_path / "halves" / "model" / "reward")
  whole, resumed = weights.flatten(whole), weights.flatten(resumed)
  assert whole.keys() == resumed.keys()
  for path, leaf in whole.items():
    np.testing.assert_array_equal(leaf, resumed[path], err_msg=path)

  # Another learning rate is another run.
  halves.train.learning_rate = 2e-2
  with pytest.raises(ValueError, match="train.learning_rate: 0.01 then, 0.02 now"):
    train_reward.train(halves, ONE)

  lines = [
    json.loads(line)
    for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert {"train/loss", "val/acc@sigma=0.1"} <= lines[-1].keys()
  for name in ("accuracy.png", "accuracy.json", "run.json"):
    assert (tmp_path / "whole" / name).stat().st_size > 0
  assert list((tmp_path / "whole").glob("events.out.tfevents*"))

  # Adapters and head only, on the base; loaded it scores as the trainer does.
  assert all("lora_" in p or p.startswith(("head/", "squash/")) for p in whole)
  model, scoring = build.load_reward(tmp_path / "whole" / "model")
  assert scoring.offset == 10.0
  trainer = train_reward.setup(config, ONE)
  trainer.state, _ = train_reward.checkpoint.Checkpoints(
    tmp_path / "whole" / "checkpoints", keep=3
  ).restore(4, trainer.state, trainer.state_shardings)
  x, sigma, cond = golden_models.random_inputs(model.config.backbone, hw=SIZE)
  params = optim.join(trainer.state.params, trainer.frozen)
  ours = golden_models._run(model.graphdef, "__call__")(model.params, x, sigma, cond)
  theirs = golden_models._run(trainer.graphdef, "__call__")(params, x, sigma, cond)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_full_fine_tune_saves_its_backbone(base, pair_folders, tmp_path):
  config = tiny("drm_sd35m", base, pair_folders, tmp_path / "run")
  config.train.num_steps = 1
  train_reward.train(config, ONE)
  model, _ = build.load_reward(tmp_path / "run" / "model")
  saved = weights.flatten(model.params)
  original = weights.flatten(build.load_transformer(base).params)
  path = "out/kernel"
  assert np.any(saved[f"backbone/{path}"] != original[path])


# --- bad input ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.model.update(init="pretrained"), "model.init='pretrained'"),
    (lambda c: c.model.update(num_layers=9), "cannot keep 9 of 3 blocks"),
    (lambda c: c.model.update(transformer="sd35_medium"), "sd35_medium"),
    (lambda c: c.model.update(base="nowhere"), "nowhere is not a model folder"),
    (lambda c: c.model.update(dtype="float8"), "dtype 'float8'"),
    (lambda c: c.model.lora.update(rank=0), "rank=0"),
    (lambda c: c.loss.update(name="hinge"), "loss.name='hinge'"),
    (lambda c: c.loss.update(name="bradley_terry"), "base_var is not an option"),
    (lambda c: c.noise.update(lookup="exact"), "noise.lookup='exact'"),
    (lambda c: c.train.update(schedule="linear"), "schedule 'linear'"),
    (lambda c: c.mesh.update(fsdp=3), "mesh.fsdp=3"),
    (lambda c: c.update(trainable=(("^head/", "train"),)), "covers backbone/"),
    (lambda c: c.update(sharding=()), "no sharding rule covers"),
    (lambda c: c.data.update(kind="parquet"), "data.kind='parquet'"),
  ],
)
def test_impossible_configs_name_the_key(
  change, message, base, pair_folders, tmp_path, monkeypatch
):
  config = tiny("sd35m", base, pair_folders, tmp_path / "run")
  change(config)
  with pytest.raises((ValueError, OSError)) as e:
    train_reward.train(config, ONE)
  assert message in str(e.value)
  assert not (tmp_path / "run" / "model").exists()


def test_batches_that_do_not_split_over_the_devices(base, pair_folders, tmp_path):
  config = tiny("sd35m", base, pair_folders, tmp_path / "run")
  config.train.batch_size = 12
  with pytest.raises(ValueError, match="train.batch_size=12"):
    train_reward.setup(config, jax.devices())


def test_divergence_stops_the_run_and_names_the_step(base, pair_folders, tmp_path):
  config = tiny("sd35m", base, pair_folders, tmp_path / "run")
  config.train.learning_rate = 1e30
  with pytest.raises(FloatingPointError, match="at step [234]"):
    train_reward.train(config, ONE)
  assert not (tmp_path / "run" / "model").exists()
