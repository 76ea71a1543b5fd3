"""Reward training end to end on tiny models: steps, sharding, resuming, saving."""

import copy
import dataclasses
import functools
import json
import shutil

import jax
from ml_collections import ConfigDict
import numpy as np
import pyarrow.parquet as pq
import pytest

from lrm_jax import build, compilation, folder, optim, sharding, weights
from lrm_jax.data import loader, parquet
from lrm_jax.data import source as source_lib
from tests import golden_models, helpers, runs
from tests.runs import config_of, tiny

import reward as train_reward  # isort: skip  (tests.runs puts train/ on the path)

ONE = jax.devices()[:1]  # compiles much faster than eight
# Settings that no program is compiled for (the schedule of learning rates is constant).
NOT_COMPILED = (
  r"workdir|seed|data\..*|eval\..*|scoring\..*|"
  r"train\.(num_steps|log_every|checkpoint_every|keep_.*)"
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Runs of like programs share them. The fixture's value makes a run its own."""
  make = train_reward.make_programs
  shared = runs.once(make, lambda c, mesh: (runs.settings_but(c, NOT_COMPILED), mesh))

  def make_programs(config, mesh):
    return dataclasses.replace(shared(config, mesh), config=config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_reward, "make_programs", make_programs)
    yield make


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return runs.make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pair_folders(tmp_path_factory):
  """One size: each would compile its own programs."""
  return runs.make_pairs(tmp_path_factory.mktemp("pairs"), runs.SIZES[:1])


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
  return runs.make_pairs(tmp_path_factory.mktemp("two_sizes"))


def run_steps(
  config, num_steps: int, devices=ONE, before=None
) -> tuple[list[float], object]:
  """(losses, trainer) of so many steps; `before` sees the trainer before the first."""
  trainer = train_reward.setup(config, devices)
  if before is not None:
    before(trainer)
  source, _ = build.pair_sources(config.data)
  batches, _ = train_reward.training_batches(trainer, source)
  stream = loader.device_prefetch(batches, trainer.prepare, depth=1)
  losses = []
  with jax.set_mesh(trainer.programs.mesh):
    for _ in range(num_steps):
      batch, _ = next(stream)
      losses.append(float(train_reward._train_step(trainer, batch)["train/loss"]))
  return losses, trainer


def copies(leaves) -> dict[str, np.ndarray]:
  """Not views, which would follow a buffer that a step writes over."""
  return {path: np.array(leaf) for path, leaf in leaves.items()}


@pytest.fixture(scope="module")
def one_device(base, pair_folders, tmp_path_factory):
  """recipe -> its first three losses on one device."""

  @functools.cache
  def losses(name: str) -> list[float]:
    config = tiny(name, base, pair_folders, tmp_path_factory.mktemp("one"))
    config.mesh.fsdp = 1
    return run_steps(config, 3, ONE)[0]

  return losses


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
  mesh = sharding.make_mesh(config.mesh.fsdp, jax.devices())
  programs = train_reward.make_programs(config, mesh)
  assert [weights.count(p) for p in (programs.trained, programs.frozen)] == [
    trained,
    frozen,
  ]
  wanted = build.dtype(config.model.trained_dtype)
  assert all(leaf.dtype == wanted for leaf in programs.trained.values())

  step, args = train_reward.abstract_run(config, mesh)
  new_state, metrics = jax.eval_shape(step, *args)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), new_state) == jax.tree.map(
    lambda a: (a.shape, a.dtype), args[0]
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
  name, base, two_sizes, tmp_path
):
  config = tiny(name, base, two_sizes, tmp_path)
  config.train.learning_rate = 3e-3
  before = {}
  losses, trainer = run_steps(
    config, 50, before=lambda t: before.update(copies(t.frozen))
  )
  assert np.mean(losses[-8:]) < 0.75 * np.mean(losses[:8]), losses
  assert before.keys() == trainer.frozen.keys()
  for path, leaf in trainer.frozen.items():
    np.testing.assert_array_equal(leaf, before[path])
  assert trainer.programs.train_step._cache_size() == 2  # one per size


@pytest.mark.parametrize(
  ("name", "devices", "fsdp"),
  [("sd35m", 8, 1), ("drm_sd35m", 8, 4), ("drm_sd35m", 2, 2)],
)
def test_many_devices_give_the_losses_of_one(
  name, devices, fsdp, one_device, base, pair_folders, tmp_path
):
  """Data parallel for the adapters, FSDP and both for the full fine-tune."""
  config = tiny(name, base, pair_folders, tmp_path)
  reference = one_device(name)
  config.sharding = ((".*", "fsdp"),)
  config.mesh.fsdp = fsdp
  losses, trainer = run_steps(config, 3, jax.devices()[:devices])
  np.testing.assert_allclose(losses, reference, rtol=2e-4)
  name = "head/out/kernel"
  leaf = trainer.state.params[name]
  adam = trainer.state.opt_state[1][0]
  moments = (adam.mu[name], adam.nu[name])
  for array in (leaf, *moments):
    assert array.addressable_shards[0].data.size * fsdp == array.size


def test_every_bucket_is_compiled_once_and_before_the_first_step(
  base, two_sizes, tmp_path, monkeypatch, capsys, compiled_once
):
  monkeypatch.setattr(train_reward, "make_programs", compiled_once)
  config = tiny("sd35m", base, two_sizes, tmp_path)
  config.train.num_steps = 12
  config.eval.every = 6
  step, late = train_reward._train_step, compilation.CompileCount()
  compiled_in_steps, shapes = [], set()

  def counted(trainer, batch):
    shapes.add(batch["chosen"].shape)
    with compilation.CompileCount() as compiled:
      metrics = step(trainer, batch)
    compiled_in_steps.append(compiled.count)
    return metrics

  monkeypatch.setattr(train_reward, "_train_step", counted)
  assert train_reward.train(config, ONE)
  assert len(shapes) == 2 and compiled_in_steps == [0] * 12
  assert late.programs["jit(train_step)"] == 2
  assert late.programs["jit(eval_step)"] == 2
  assert "compiled 2 of 2 buckets" in capsys.readouterr().out


def test_ema_follows_at_its_decay(base, pair_folders, tmp_path):
  config = tiny("sd35m", base, pair_folders, tmp_path)
  config.train.ema_decay = 0.75
  first = {}
  _, after = run_steps(config, 1, before=lambda t: first.update(copies(t.state.params)))
  assert first.keys() == after.state.ema.keys()
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
  ).restore(4, trainer.state, trainer.programs.state_shardings)
  x, sigma, cond = golden_models.random_inputs(model.config.backbone, hw=runs.SIZES[0])
  params = optim.join(trainer.state.params, trainer.frozen)
  ours = golden_models._run(model.graphdef, "__call__")(model.params, x, sigma, cond)
  theirs = golden_models._run(trainer.programs.graphdef, "__call__")(
    params, x, sigma, cond
  )
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
    (lambda c: c.data.update(kind="csv"), "data.kind='csv'"),
    (lambda c: c.data.update(kind="tfds"), "must be FOLDER:SPLIT"),
    (lambda c: c.data.update(train="nowhere"), "nowhere"),
    (lambda c: c.data.update(t5_length=128), "were made with 3"),
    (lambda c: c.data.update(prompts="nowhere"), "nowhere is not a prompt cache"),
    (lambda c: c.data.update(prompt_dropout=2.0), "prompt_dropout=2.0"),
    (lambda c: c.data.update(shuffle_window=0), "shuffle_window=0"),
    (lambda c: c.mesh.update(tensor=3), "mesh.tensor=3"),
    (lambda c: c.train.update(accumulate=3), "must be a multiple of 3"),
    (lambda c: c.train.update(accumulate=0), "train.accumulate=0"),
    (lambda c: c.train.update(keep_checkpoints=0), "keep=0"),
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


def test_a_corrupt_row_group_stops_the_run_and_keeps_what_was_done(
  base, pair_folders, tmp_path
):
  """The run continues where it stopped once the part is repaired."""
  config = tiny("sd35m", base, pair_folders, tmp_path / "whole")
  config.train.num_steps = 6
  config.train.checkpoint_every = 100
  config.eval.every = 6
  train_reward.train(config, ONE)

  broken = tmp_path / "pairs"
  shutil.copytree(pair_folders, broken)
  part = broken / "train" / "part.parquet"
  good = part.read_bytes()
  # The last row group of an epoch's order is not among those of the first step.
  config.workdir = str(tmp_path / "run")
  config.data.train = str(broken / "train")
  order = train_reward.training_batches(
    train_reward.setup(config, ONE), build.pair_sources(config.data)[0]
  )[1]
  source = build.pair_sources(config.data)[0]
  first = {int(source.block[i]) for i in order.batch(0)}
  later = next(b for b in range(6) if b not in first)
  column = pq.ParquetFile(part).metadata.row_group(later).column(7)
  middle = column.dictionary_page_offset or column.data_page_offset
  middle += column.total_compressed_size // 2
  part.write_bytes(good[:middle] + bytes(64) + good[middle + 64 :])
  with pytest.raises(source_lib.DataError, match="part.parquet.*row group"):
    train_reward.train(config, ONE)
  assert not (tmp_path / "run" / "model").exists()
  part.write_bytes(good)
  config.data.train = str(broken / "train")
  train_reward.train(config, ONE)
  runs.assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_a_nan_is_reported_with_its_step_and_never_saved(base, pair_folders, tmp_path):
  """Also where that step's metrics are not written."""
  config = tiny("sd35m", base, pair_folders, tmp_path / "run")
  config.train.learning_rate = 1e30
  config.train.log_every = 100
  config.train.checkpoint_every = 4
  config.eval.every = 100
  with pytest.raises(FloatingPointError, match="at step [234]: train/loss = "):
    train_reward.train(config, ONE)
  assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_the_best_step_is_kept_and_written(base, pair_folders, tmp_path, monkeypatch):
  config = tiny("sd35m", base, pair_folders, tmp_path / "run")
  config.train.num_steps = 5
  config.train.keep_checkpoints = 1
  config.eval.every = 1
  scores = iter([0.1, 0.9, 0.3, 0.2, 0.4])
  rows = lambda acc: [  # noqa: E731
    dict(level="sigma=0.1", sigma=0.1, kind="all", n=20, acc=acc, lo=0.0, hi=1.0)
  ]
  monkeypatch.setattr(train_reward, "evaluate", lambda *_: rows(next(scores)))
  train_reward.train(config, ONE)
  kept = {int(p.name) for p in (tmp_path / "run/checkpoints").glob("[0-9]*")}
  assert kept == {2, 5}
  best, last = (
    weights.flatten(folder.load_params(tmp_path / "run" / name / "reward"))
    for name in ("best_model", "model")
  )
  state = runs.final_state(tmp_path / "run", 2)
  path = next(p for p in best if "lora_b" in p)
  np.testing.assert_array_equal(best[path], state[f"['params']['{path}']"])
  assert np.any(best[path] != last[path])


def test_ties_need_a_loss_that_knows_them(base, pair_folders, tmp_path):
  (tmp_path / "ties").mkdir()
  records = runs.records(16, preference=0.5)
  parquet.write_part(tmp_path / "ties" / "a.parquet", records, rows_per_group=8)
  parquet.write_index(tmp_path / "ties")
  config = tiny("sd35m", base, pair_folders, tmp_path / "run")
  config.data.train = str(tmp_path / "ties")
  with pytest.raises(source_lib.DataError, match="is a tie"):
    train_reward.train(config, ONE)
  config.loss = ConfigDict(dict(name="pairwise_cross_entropy"))
  losses, _ = run_steps(config, 2)
  assert losses[0] >= np.log(2) - 1e-6  # least where both sides score the same


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_parallel_gives_the_losses_of_one(
  tensor, one_device, base, pair_folders, tmp_path
):
  config = tiny("drm_sd35m", base, pair_folders, tmp_path)
  reference = one_device("drm_sd35m")[:2]
  config.mesh.update(fsdp=2, tensor=tensor)
  config.sharding = (
    (r"blocks/.*(qkv|up)/", "column"),
    (r"blocks/.*(out|down)/", "row"),
    (".*", "fsdp"),
  )
  losses, trainer = run_steps(config, 2, jax.devices())
  np.testing.assert_allclose(losses, reference, rtol=5e-4)
  leaf = trainer.state.params["backbone/blocks/1/attn/qkv/kernel"]
  assert leaf.addressable_shards[0].data.size * 2 * tensor == leaf.size
