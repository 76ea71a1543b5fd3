"""Alignment end to end on tiny models: recipes, rewards, stopping, continuing."""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from lrm_jax import (
  alignment,
  compilation,
  denoiser,
  run_log,
  scorer,
  sharding,
  weights,
)
from lrm_jax import folder as folder_lib
from tests import aligning, helpers, runs
from tests.generating import Folders

import align  # isort: skip  (tests.runs puts train/ on the path)

ONE = jax.devices()[:1]  # compiles much faster than eight
# Settings that no program is compiled for (the schedule of learning rates is constant).
NOT_COMPILED = (
  r"workdir|seed|prompts\..*|golden\..*|eval\.(every|images|seed)|"
  r"pixel_rewards\..*\.function|rollout\.sde_window_.*|real\.[^w].*|"
  r"train\.(num_iterations|inner_epochs|checkpoint_every|log_every|keep_.*)"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return Folders(tmp_path_factory.mktemp("align"))


@pytest.fixture(scope="module")
def cache(folders):
  return aligning.write_cache(folders.root / "cache")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Runs of like programs share them; and the generator, as it is read."""

  def relevant(config, mesh, *_):
    # A reward of pixels without a weight is in no program.
    idle = [n for n, term in config.pixel_rewards.items() if not term.weight]
    pattern = "|".join([NOT_COMPILED, *(rf"pixel_rewards\.{n}\..*" for n in idle)])
    return runs.settings_but(config, pattern), mesh

  programs = runs.once(align.make_programs, relevant)

  def make_programs(config, *rest):
    steps = align.Steps.of(config)
    return dataclasses.replace(programs(config, *rest), config=config, steps=steps)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(align, "make_programs", make_programs)
    patch.setattr(
      align,
      "make_decoder",
      runs.once(align.make_decoder, lambda c, mesh: (c.decoder, mesh)),
    )
    patch.setattr(
      align.denoiser,
      "load",
      runs.once(denoiser.load, lambda *args, **kw: repr((args, kw))),
    )
    yield


@pytest.fixture(scope="module")
def recipe_run(folders, cache, tmp_path_factory):
  """recipe[:argument] -> the config of a run of it, which is complete."""

  @functools.cache
  def run(name: str):
    recipe, _, argument = name.partition(":")
    workdir = tmp_path_factory.mktemp("recipe") / "run"
    config = aligning.tiny(recipe, folders, workdir, *filter(None, [argument]))
    if name != "refl":  # which encodes its prompts in the run
      config.prompts.cache = str(cache)
    assert align.train(config, ONE)
    return config

  return run


@pytest.fixture
def make(folders, cache, tmp_path):
  """A tiny recipe whose prompts are cached."""

  def make(recipe: str, name: str = "run", *args: str):
    config = aligning.tiny(recipe, folders, tmp_path / name, *args)
    config.prompts.cache = str(cache)
    return config

  return make


def iterations(config, count: int, devices=ONE) -> tuple[list[dict], align.Trainer]:
  """The metrics of a run's first iterations, and the trainer after them."""
  trainer = align.setup(config, devices)
  return more_iterations(trainer, 0, count), trainer


def more_iterations(trainer, start: int, stop: int) -> list[dict]:
  with jax.set_mesh(trainer.programs.mesh):
    made = [align.iterate(trainer, i)[0] for i in range(start, stop)]
  return [{k: float(v) for k, v in metrics.items()} for metrics in made]


def saved_adapters(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Of a model folder, by their paths."""
  return weights.flatten(folder_lib.load_params(folder_lib.find(path, "lora")[0]))


def assert_compiled_once(config) -> None:
  """Whatever went through the programs of a config."""
  programs = align.setup(config, ONE).programs
  for name in ("collect", "with_finished", "update", "evaluate"):
    program = getattr(programs, name)
    assert program is None or program._cache_size() <= 1, name


# --- rewards of pixels -------------------------------------------------------------

CALLS: list[tuple[tuple[int, ...], int]] = []  # images' shape, prompts
SEQUENCE: list[float] = []  # what `next_of_sequence` gives


def brightness(images, prompts):
  """Of [0, 1]."""
  assert images.dtype == np.uint8 and not isinstance(prompts, str)
  CALLS.append((images.shape, len(prompts)))
  return images.mean(axis=(1, 2, 3)) / 255


def next_of_sequence(images, prompts):
  """One value for all images, another one each time."""
  return np.full(len(prompts), SEQUENCE.pop(0))


def sometimes_nan(images, prompts):
  return np.where(np.arange(len(prompts)) % 4 == 0, np.nan, brightness(images, prompts))


def wrong_shape(images, prompts):
  return images.mean(axis=(1, 2))


def pixel(function: Callable, weight: float) -> dict:
  return dict(function=f"{__name__}:{function.__name__}", weight=weight)


@pytest.fixture(autouse=True)
def nothing_called():
  CALLS.clear()
  SEQUENCE.clear()


# --- full-size recipes -------------------------------------------------------------


@pytest.mark.parametrize(
  "name", ["step_grpo", "flow_grpo", "flow_grpo:fast", "lpo", "refl"]
)
def test_a_recipe_runs_and_leaves_everything(name, recipe_run):
  config = recipe_run(name)
  workdir = pathlib.Path(config.workdir)
  lines = run_log.read_metrics(workdir)
  assert [line["step"] for line in lines] == [0, 1, 2]
  reward = "dina" if name == "refl" else "drm"
  assert {f"eval/reward/{reward}", "eval/diversity", "cost/passes"} <= lines[0].keys()
  last = lines[-1]
  assert {"train/loss", "train/grad_norm", "cost/seconds"} <= last.keys()
  method = config.method
  assert (f"reward/{reward}" in last) == (method != "refl")
  own = {"lpo": "train/valid", "refl": "train/reward"}.get(method, "train/ratio")
  assert own in last
  samples = config.train.prompts * (1 if method in ("lpo", "refl") else 2)
  assert last["cost/samples"] == 2 * samples
  assert last["train/grad_norm"] > 0

  rows = [json.loads(s) for s in (workdir / "prompts.jsonl").open()]
  if method == "refl":
    assert not rows
  else:
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    # Two epochs of all prompts.
    for step in (1, 2):
      asked = {row["prompt"] for row in rows if row["step"] == step}
      assert asked == set(aligning.PROMPTS)
    mean = np.mean([row[reward]["mean"] for row in rows if row["step"] == 2])
    np.testing.assert_allclose(mean, last[f"reward/{reward}"], rtol=1e-4)

  for step in range(3):
    images = np.load(workdir / "sheets" / f"step_{step:06d}.npz")["images"]
    assert images.shape == (2, 2, 8, 8, 3) and images.dtype == np.uint8
    assert (workdir / "sheets" / f"step_{step:06d}.png").stat().st_size > 0
  for file in ("progress.png", "through_training.png"):
    with Image.open(workdir / file) as image:
      assert min(image.size) > 100
  info = json.loads((workdir / "run.json").read_text())
  assert info["config"]["method"] == method

  _, entry = folder_lib.find(workdir / "lora", "lora")
  assert entry["config"]["rank"] == 2
  assert min(np.abs(a).max() for a in saved_adapters(workdir / "lora").values()) > 0
  # It finds the generator it belongs to.
  assert folder_lib.find(workdir / "lora", "transformer")[0].is_dir()
  assert_compiled_once(config)


def test_the_average_is_what_is_kept(recipe_run):
  """And it moves less than what it averages."""
  config = recipe_run("flow_grpo")
  state = runs.final_state(config.workdir, 2)
  for path, leaf in saved_adapters(pathlib.Path(config.workdir, "lora")).items():
    np.testing.assert_array_equal(leaf, state[f"['ema']['{path}']"])
    if path.endswith("lora_b"):
      raw = state[f"['params']['{path}']"]
      assert 0 < np.abs(leaf).max() < np.abs(raw).max()


def test_a_pass_over_the_samples_takes_an_optimizer_step_per_minibatch(
  recipe_run, make
):
  state = runs.final_state(recipe_run("flow_grpo").workdir, 2)
  assert state["['step']"] == 2 * 2
  config = make("flow_grpo")
  config.train.inner_epochs = 2
  (metrics,), trainer = iterations(config, 1)
  assert int(trainer.state.step) == 4
  # The first of four updates has a ratio of 1, the others have moved away.
  assert abs(metrics["train/ratio"] - 1) > 1e-5 and metrics["train/clip_frac"] > 0


def test_windows_of_flow_grpo_fast(make):
  config = make("flow_grpo", "run", "fast")
  steps = align.Steps.of(config)
  found = {}
  for i in range(40):
    schedule, trained = steps.draw(i, 1)
    start = int(trained[0])
    np.testing.assert_array_equal(trained, [start, start + 1])
    noisy = np.flatnonzero(schedule.noise_level)
    np.testing.assert_array_equal(noisy, trained)
    found[start] = found.get(start, 0) + 1
  assert found.keys() == {0, 1}  # within 0:3
  again = [int(steps.draw(i, 1)[1][0]) for i in range(40)]
  other = [int(steps.draw(i, 2)[1][0]) for i in range(40)]
  assert sum(again) == found[1] and again != other

  everything = align.Steps.of(make("flow_grpo"))
  schedule, trained = everything.draw(0, 1)
  np.testing.assert_array_equal(trained, [0, 1])  # not the last one
  assert np.all(schedule.noise_level == np.float32(0.7))


@pytest.mark.parametrize("recipe", [("step_grpo",), ("flow_grpo", "fast")])
def test_iterations_compile_nothing_after_the_first(make, recipe):
  """Other prompts, noise and windows, and the policy that has moved."""
  method, *kind = recipe
  trainer = align.setup(make(method, "run", *kind), ONE)
  with jax.set_mesh(trainer.programs.mesh):
    align.iterate(trainer, 0)
    with compilation.CompileCount() as compiled:
      windows = set()
      for i in range(1, 6):
        windows.add(int(trainer.programs.steps.draw(i, trainer.config.seed)[1][0]))
        align.iterate(trainer, i)
    assert not compiled.programs
  assert len(windows) == (2 if kind else 1)


def test_eight_devices_follow_the_curve_of_one(make):
  curves = []
  for devices in (ONE, jax.devices()):
    found, trainer = iterations(make("flow_grpo"), 2, devices)
    assert trainer.programs.mesh.size == len(devices)
    curves.append([metrics["reward/drm"] for metrics in found])
  np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)


# --- rewards of pixels, golden ones ------------------------------------------------


def test_a_pixel_reward_is_learnt_from_or_only_looked_at(make):
  plain, _ = iterations(make("flow_grpo"), 1)
  config = make("flow_grpo")
  config.pixel_rewards = dict(seen=pixel(brightness, 0.0))
  _, looked = iterations(config, 1)
  assert not CALLS
  found = align.evaluate(looked)
  assert 0 <= found.metrics["eval/pixel/seen"] <= 1
  # Four prompts at a time, two samples of each.
  assert CALLS == [((8, 8, 8, 3), 8)] * 2
  first = found.images[:, :, :4, :4]
  assert first.shape == (2, 2, 4, 4, 3)

  CALLS.clear()
  config.pixel_rewards.seen.weight = 1.0
  (both,), _ = iterations(config, 1)
  assert CALLS == [((16, 8, 8, 3), 16)]
  assert 0 < both["pixel/seen"] < 1 and both["collect/zero_std_finished"] == 0
  assert both["reward/drm"] == pytest.approx(plain[0]["reward/drm"], rel=1e-4)
  assert both["train/grad_norm"] != pytest.approx(plain[0]["train/grad_norm"], rel=0.01)
  assert_compiled_once(config)

  # Where nothing else has a weight, it is what is watched.
  config.rewards.drm.weight = 0.0
  assert align.setup(config, ONE).golden.metric == "eval/pixel/seen"


def test_a_pixel_reward_that_is_sometimes_nan(make):
  config = make("flow_grpo")
  config.pixel_rewards = dict(seen=pixel(sometimes_nan, 1.0))
  for metrics in iterations(config, 2)[0]:
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_early_stopping(make, capsys):
  config = make("flow_grpo")
  config.pixel_rewards = dict(judge=pixel(next_of_sequence, 0.0))
  config.golden.update(metric="pixel/judge", patience=2)
  config.train.num_iterations = 9
  # Two batches of prompts per evaluation: at 0, 1, 2, 3.
  SEQUENCE.extend([0, 0, 2, 2, 1, 1, 1.5, 1.5])
  assert align.train(config, ONE)
  assert not SEQUENCE
  printed = capsys.readouterr().out
  assert "stopped early after iteration 3: eval/pixel/judge has not risen" in printed
  assert "above 2 for 2 evaluations" in printed
  workdir = pathlib.Path(config.workdir)
  assert "eval/pixel/judge was best at 1" in printed
  assert [line["step"] for line in run_log.read_metrics(workdir)] == [0, 1, 2, 3]
  last, best = (saved_adapters(workdir / name) for name in ("lora", "best_lora"))
  one, three = (runs.final_state(workdir, step) for step in (1, 3))
  for saved, state in ((last, three), (best, one)):
    for path, leaf in saved.items():
      np.testing.assert_array_equal(leaf, state[f"['ema']['{path}']"])
  assert any(np.any(leaf != best[path]) for path, leaf in last.items())

  before = (workdir / "metrics.jsonl").read_text()
  assert align.train(config, ONE)
  assert "stopped early after iteration 3" in capsys.readouterr().out
  assert (workdir / "metrics.jsonl").read_text() == before


# --- interruptions -----------------------------------------------------------------


def long_run(make, name: str):
  """Averages, a golden reward, a reward of pixels that counts, moving windows."""
  config = make("flow_grpo", name)
  config.rollout.update(sde_window_size=2, sde_window_range=(0, 3))
  config.pixel_rewards = dict(seen=pixel(brightness, 1.0), judge=pixel(brightness, 0.0))
  config.golden.update(metric="pixel/judge", patience=20)
  config.train.update(num_iterations=4, checkpoint_every=3)
  config.eval.every = 2
  return config


def assert_same_run(a, b, step: int) -> None:
  runs.assert_same_run(a, b, step)
  one, two = (pathlib.Path(w, "prompts.jsonl").read_text() for w in (a, b))
  assert one == two


def test_a_stopped_run_continues_as_if_nothing_had_happened(make, capsys, monkeypatch):
  whole = long_run(make, "whole")
  assert align.train(whole, ONE)

  halves = long_run(make, "halves")

  def terminate(name, reward, images, prompts):
    if len(CALLS) == 5:  # four at evaluation 0, and the first iteration
      os.kill(os.getpid(), signal.SIGTERM)
    return scores(name, reward, images, prompts)

  scores = align.pixel_scores
  CALLS.clear()
  monkeypatch.setattr(align, "pixel_scores", terminate)
  assert not align.train(halves, ONE)
  assert "at iteration 2 of 4; the same command continues" in capsys.readouterr().out
  assert not pathlib.Path(halves.workdir, "lora").exists()
  # What a kill in the middle of a line leaves.
  with pathlib.Path(halves.workdir, "prompts.jsonl").open("a") as file:
    file.write('{"step": 3, "prompt": "whatever"}\n{"step": 3, "pro')
  monkeypatch.undo()
  assert align.train(halves, ONE)
  assert "from iteration 2" in capsys.readouterr().out
  assert_same_run(whole.workdir, halves.workdir, 4)
  assert_compiled_once(whole)

  halves.train.learning_rate = 2e-2
  halves.train.num_iterations = 5
  with pytest.raises(ValueError, match="train.learning_rate: 0.01 then, 0.02 now"):
    align.train(halves, ONE)


@pytest.mark.slow
def test_a_killed_run_continues_as_if_nothing_had_happened(make):
  """SIGKILL at random, in a process of its own."""
  configs = [make("refl", name) for name in ("whole", "killed")]
  for config in configs:
    config.train.update(num_iterations=40, checkpoint_every=7)
    config.eval.every = 20
  whole, killed = configs
  runs.finish(runs.start(whole, script="align"), whole)
  process = runs.start(killed, script="align")
  lines = pathlib.Path(killed.workdir, "metrics.jsonl")
  deadline = time.monotonic() + 300
  at = random.Random(5).randrange(10, 30)
  while process.poll() is None and time.monotonic() < deadline:
    if lines.exists() and lines.read_text().count("\n") >= at:
      process.kill()
      break
    time.sleep(0.002)
  assert process.wait() == -signal.SIGKILL
  assert "continuing" in runs.finish(runs.start(killed, script="align"), killed)
  assert_same_run(whole.workdir, killed.workdir, 40)


# --- scores that are not finite ----------------------------------------------------


@pytest.fixture
def breakable(make, monkeypatch):
  """`(trainer, break_)`: `break_(n)` makes the first n of all scorings NaN."""
  trainer = align.setup(make("flow_grpo"), ONE)
  healthy = denoiser.Denoiser.reward_fn

  def reward_fn(model, params, name):
    score = healthy(model, params, name)

    def broken(inputs, x, sigma):
      r = score(inputs, x, sigma)
      return jnp.where(jnp.arange(len(r)) < params.get("broken", 0), jnp.nan, r)

    return broken

  monkeypatch.setattr(denoiser.Denoiser, "reward_fn", reward_fn)
  p, folder = trainer.programs, trainer.config.rewards.drm.folder
  part = p.policy.denoiser.rewards["drm"]
  levels = {"drm": scorer.Level.of(folder, part.scoring)}
  collect = jax.jit(alignment.make_collect(p.policy, p.recipe, levels, p.latent))

  def break_(count: int) -> align.Trainer:
    trainer.programs = dataclasses.replace(
      p,
      collect=lambda params, *rest: collect(
        params | {"broken": jnp.int32(count)}, *rest
      ),
    )
    return trainer

  return break_


def test_a_nan_reward_is_not_learnt_from(breakable):
  (metrics,) = more_iterations(breakable(1), 0, 1)
  assert all(np.isfinite(value) for value in metrics.values()), metrics
  assert metrics["collect/bad"] == pytest.approx(1 / 16)
  assert metrics["train/grad_norm"] > 0


def test_nothing_but_nan_stops_the_run(breakable, monkeypatch):
  trainer = breakable(10**6)
  monkeypatch.setattr(align, "setup", lambda *_: trainer)
  with pytest.raises(FloatingPointError, match="at step 1: reward/drm = nan"):
    align.train(trainer.config)
  assert not pathlib.Path(trainer.config.workdir, "lora").exists()


# --- real data ---------------------------------------------------------------------


def with_real(config, folder: pathlib.Path):
  data = str(folder / "pairs")
  config.real.update(train=data, held_out=data, prompts=str(folder / "prompts"))
  return config


def test_refl_with_real_data(make, folders, tmp_path):
  """It goes on with the next batch of data."""
  real = aligning.write_pairs(tmp_path / "real")
  whole, halves = (
    with_real(make("refl", name, "real"), real) for name in ("whole", "halves")
  )
  assert align.train(whole, ONE)
  losses = [line.get("train/flow_loss") for line in run_log.read_metrics(whole.workdir)]
  assert losses[0] is None and losses[1] > 0 and losses[1] != losses[2]
  halves.train.num_iterations = 1
  assert align.train(halves, ONE)
  halves.train.num_iterations = 2
  assert align.train(halves, ONE)
  assert_same_run(whole.workdir, halves.workdir, 2)

  other = aligning.write_pairs(tmp_path / "other", (4, 6))
  with pytest.raises(ValueError, match=r"latents of \[\(4, 6, 16\)\], rollouts are"):
    align.setup(with_real(make("refl", "run", "real"), other), ONE)


# --- adapters in diffusers ---------------------------------------------------------


def test_the_adapters_work_in_diffusers(recipe_run, tmp_path):
  diffusers = pytest.importorskip("diffusers")
  pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  from tests import conversion

  config = recipe_run("step_grpo")
  tuned = pathlib.Path(config.workdir, "lora")
  conversion.to_torch(tuned, "lora", tmp_path / "lora.safetensors")
  trainer = align.setup(config, ONE)
  model = trainer.programs.policy.denoiser
  inputs = conversion.inputs(
    context_dim=model.config.context_dim, pooled_dim=model.config.pooled_dim
  )
  x, sigma, cond = conversion.as_ours(*inputs)
  adapters = trainer.programs.policy.fit(saved_adapters(tuned))

  @jax.jit
  def velocities(params, adapters, x, sigma, cond):
    embedded = model.embed(params, cond)[denoiser.GENERATOR]
    tuned = trainer.programs.policy.velocity_fn(params, adapters)
    return [f(embedded, x, sigma) for f in (tuned, model.velocity_fn(params))]

  sigma = sigma.astype(np.float32)
  ours = velocities(trainer.params, adapters, x, sigma, cond)

  pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
    helpers.GOLDEN / "dina" / "sd35"
  )
  x_torch, t, context, pooled = inputs
  with torch.no_grad():
    plain = pipe.transformer(x_torch, context, pooled, t).sample
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    theirs = pipe.transformer(x_torch, context, pooled, t).sample
  for mine, other in zip(ours, (theirs, plain), strict=True):
    assert helpers.rel_err(helpers.nchw(mine), other) < 1e-4
  assert helpers.rel_err(theirs, plain) > 1e-3


# --- bad input ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("recipe", "change", "message"),
  [
    ("lpo", lambda c: c.update(method="ppo"), "method='ppo': use one of step_grpo"),
    ("lpo", lambda c: c.update(decoder="jpeg"), "decoder='jpeg': use 'vae' or"),
    ("lpo", lambda c: c.lora.update(targets="mlp"), "lora.targets='mlp': use one of"),
    ("lpo", lambda c: c.rewards.drm.update(weight=0.0), "optimise nothing"),
    ("lpo", lambda c: c.rewards.drm.update(folder="nowhere"), "nowhere is not a model"),
    ("lpo", lambda c: c.train.update(prompts=7), "train.prompts=7 in groups of 1"),
    ("lpo", lambda c: c.train.update(inner_epochs=0), "train.inner_epochs=0"),
    ("lpo", lambda c: c.train.update(timestep_fraction=0.1), "leaves 0 of 3 steps"),
    ("lpo", lambda c: c.eval.update(num=1), "1 sample(s) of a prompt have no"),
    ("lpo", lambda c: c.eval.update(sampler="dpm"), "sampler 'dpm'"),
    ("lpo", lambda c: c.rollout.update(height=10), "rollout.height=10 must be a multi"),
    ("lpo", lambda c: c.group.update(chunk=3), "chunk=3 must divide"),
    ("lpo", lambda c: c.mesh.update(fsdp=3), "mesh.fsdp=3"),
    ("lpo", lambda c: c.prompts.update(train="nowhere"), "the prompts file nowhere"),
    ("lpo", lambda c: c.prompts.update(cache="nowhere"), "nowhere is not a prompt"),
    ("lpo", lambda c: c.prompts.update(t5_length=9), "prompts.t5_length=9, but the"),
    ("lpo", lambda c: c.golden.update(metric="hps"), "golden.metric='hps': use one of"),
    ("lpo", lambda c: c.golden.update(metric="reward/drm"), "its weight must be 0"),
    ("lpo", lambda c: c.train.update(keep_checkpoints=0), "keep=0"),
    (
      "flow_grpo",
      lambda c: c.rollout.update(sde_window_range=(1, 9)),
      "rollout.sde_window_range=(1, 9) is not within 0:3",
    ),
    (
      "flow_grpo",
      lambda c: c.rollout.update(sde_window_range=(2, 3)),
      "leave no step to train on",
    ),
    (
      "flow_grpo",
      lambda c: c.rollout.update(sde_window_size=3, sde_window_range=(0, 2)),
      "rollout.sde_window_size=3 does not fit into the steps 0:2",
    ),
    ("flow_grpo", lambda c: c.group.update(group_size=1), "group_size=1: flow_grpo"),
    ("flow_grpo", lambda c: c.rollout.update(sampler="euler"), "no log-probabilities"),
    ("refl", lambda c: c.loss.update(window=(2, 9)), "loss.window=(2, 9) is not"),
    ("refl", lambda c: c.train.update(minibatches=2), "refl takes one step"),
    ("refl", lambda c: c.real.update(weight=1.0, batch_size=0), "real.batch_size=0"),
  ],
)
def test_impossible_configs_are_one_clear_error(recipe, change, message, make):
  config = make(recipe)
  change(config)
  with pytest.raises((ValueError, OSError)) as e:
    align.train(config, ONE)
  assert message in str(e.value)
  assert not pathlib.Path(config.workdir, "lora").exists()


def test_samples_that_do_not_split_over_the_devices(make):
  with pytest.raises(ValueError, match="train.prompts=4 in groups of 1 .* 8 devices"):
    config = make("refl")
    config.train.prompts = 4
    align.setup(config, jax.devices())
  with pytest.raises(ValueError, match="eval.prompts=3 times eval.num=2"):
    config = make("refl")
    config.eval.prompts = 3
    align.setup(config, jax.devices())


def test_prompts_that_the_cache_does_not_have(make, tmp_path):
  config = make("lpo")
  config.prompts.eval = str(tmp_path / "eval.txt")
  pathlib.Path(config.prompts.eval).write_text("cat a\na unicorn\n")
  with pytest.raises(ValueError, match="no embedding of 'a unicorn'"):
    align.setup(config, ONE)


@pytest.mark.parametrize(
  ("function", "message"),
  [
    ("brightness", "must be 'package.module:function'"),
    ("no_such_package:f", "cannot be imported: No module named 'no_such_package'"),
    (f"{__name__}:no_such", "cannot be imported: module .* has no attribute"),
    (f"{__name__}:ONE", "which cannot be called"),
  ],
)
def test_functions_that_are_not_there(function, message):
  with pytest.raises(ValueError, match=f"pixel_rewards.mine.function=.*{message}"):
    align.load_pixel_reward("mine", function)


def test_scores_of_another_shape():
  message = (
    r"pixel_rewards.mine: scores of shape \(2, 3\) for 2 images, expected \(2,\)"
  )
  with pytest.raises(ValueError, match=message):
    align.pixel_scores("mine", wrong_shape, np.zeros((2, 8, 8, 3), np.uint8), "ab")


@pytest.mark.parametrize(
  ("recipe", "message"),
  [
    ("lpo", r"cannot learn from \['seen'\]"),
    ("refl", r"the gradient of one latent reward, not of \['dina'\] and \['seen'\]"),
  ],
)
def test_methods_that_cannot_learn_from_pixels(recipe, message, make, monkeypatch):
  """Said before anything is loaded."""
  monkeypatch.setattr(align.denoiser, "load", None)
  config = make(recipe)
  config.pixel_rewards = dict(seen=pixel(brightness, 1.0))
  with pytest.raises(ValueError, match=message):
    align.train(config, ONE)


@pytest.mark.parametrize("num, split", [(16, True), (8, True), (6, False), (1, False)])
def test_prompts_are_where_their_samples_are(num, split):
  mesh = sharding.make_mesh(1)
  assert mesh.size == 8
  place = align.prompt_sharding(num, mesh)
  assert place.is_fully_replicated != split
  assert place.shard_shape((num, 5))[0] == (num // 8 if split else num)
