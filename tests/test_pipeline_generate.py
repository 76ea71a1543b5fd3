"""Prompts to images: against models that are loaded one by one; seeds; devices."""

import dataclasses
import json
import logging
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import build, explore, flow, pipeline, rewards, sample
from lrm_jax import folder as folder_lib
from lrm_jax.models import vae
from lrm_jax.pipeline import Pipeline, Settings
from lrm_jax.scorer import Scorer
from tests import generating, helpers

T5_LENGTH = 16
PROMPTS = ["a photo of a cat", "two dogs", "a photo of a cat"]
SEED = 5
ONE = jax.devices()[:1]
EXPLORING = Settings(
  num_steps=3,
  guidance_scale=3.0,
  height=32,
  width=48,
  negative_prompt="bad",
  explore=explore.Explore(candidates=3),
  explore_window=(0, 2),
)
WEIGHTS = {"dina": 0.5, "drm": 2.0}
REWARDS = {
  # name -> rewards, weights, how candidates are compared
  "prefix": (("head",), None, EXPLORING.explore),
  "several": (
    ("dina", "drm"),
    WEIGHTS,
    explore.Explore(candidates=2, beam=2, chunk=2),
  ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return generating.Folders(tmp_path_factory.mktemp("models"))


def load(folders, *names, devices=ONE, **kw) -> Pipeline:
  return Pipeline.load(
    folders.sd35,
    rewards={name: getattr(folders, name) for name in names},
    t5_length=T5_LENGTH,
    devices=devices,
    **kw,
  )


@pytest.fixture(scope="module")
def pipes(folders):
  return {
    name: load(folders, *names, weights=weights)
    for name, (names, weights, _) in REWARDS.items()
  }


@pytest.fixture(scope="module")
def made(pipes):
  """Three images in batches of two, of each of REWARDS."""
  return {
    name: pipe.generate(
      PROMPTS,
      dataclasses.replace(EXPLORING, explore=REWARDS[name][2]),
      seed=SEED,
      batch_size=2,
    )
    for name, pipe in pipes.items()
  }


@pytest.fixture(scope="module")
def scorers(folders):
  return {
    name: Scorer.load(getattr(folders, name), t5_length=T5_LENGTH)
    for name in ("head", "dina", "drm")
  }


@pytest.fixture(scope="module")
def conds(scorers):
  """The prompts, and the negative one."""
  cond = scorers["drm"].encode_prompts([*PROMPTS, "bad"])
  return (
    jax.tree.map(lambda a: a[:3], cond),
    jax.tree.map(lambda a: jnp.repeat(a[3:], 3, axis=0), cond),
  )


def own_keys(count: int = len(PROMPTS)) -> jax.Array:
  return jnp.stack([jax.random.key(SEED + i) for i in range(count)])


@pytest.mark.parametrize("name", REWARDS)
def test_against_models_that_share_nothing(name, folders, made, conds):
  """Sharing, embedding once, batches and steps in parts change nothing."""
  names, weights, options = REWARDS[name]
  generator = build.load_transformer(folders.sd35)
  parts = {n: build.load_reward(getattr(folders, n))[0] for n in names}
  weights = weights or dict.fromkeys(names, 1.0)
  schedule = sample.make_schedule(flow.sampling_sigmas(3, 3.0), explore_window=(0, 2))

  @jax.jit
  def run(params, cond, uncond, keys):
    def velocity(cond, x, sigma):
      model = nnx.merge(generator.graphdef, params["generator"])
      return model(x, 1000.0 * sigma, cond)[0]

    def reward(n):
      merged = nnx.merge(parts[n].graphdef, params[n])
      return lambda cond, x, sigma: merged(x, sigma, cond)

    networks = explore.Apart(
      sample.guide(velocity, 3.0),
      rewards.weighted_sum({n: (weights[n], reward(n)) for n in names}),
    )
    x = sample.initial_noise(keys, (16, 24, 16))
    return explore.explore(
      networks,
      (cond, uncond),
      dict.fromkeys(names, cond),
      x,
      schedule,
      options,
      keys=keys,
    )

  params = {"generator": generator.params} | {n: p.params for n, p in parts.items()}
  x, steps = run(params, *conds, own_keys())
  got = made[name]
  assert helpers.rel_err(got.latents, x) < 1e-4
  assert np.isnan(got.steering[2]).all() and not np.isnan(got.steering[:2]).any()
  np.testing.assert_array_equal(got.bad, 0)
  if options.beam == 1:
    want = np.take_along_axis(steps.scores, steps.chosen, axis=2)[:2, :, 0]
    np.testing.assert_allclose(got.steering[:2], want, rtol=1e-3)


@pytest.mark.parametrize("name", REWARDS)
def test_what_is_returned(name, pipes, made, scorers, conds):
  got = made[name]
  assert len(got) == 3 and got.prompts == tuple(PROMPTS)
  assert got.seeds.tolist() == [5, 6, 7]
  assert got.images.shape == (3, 32, 48, 3) and got.images.dtype == np.uint8
  assert got.finite.all() and got.best_of is None
  assert set(got.raw) == set(REWARDS[name][0]) == set(pipes[name].weights)
  # Each as if it were scored alone, with its own key.
  for reward, raw in got.raw.items():
    want = np.concatenate(
      [
        scorers[reward].score(
          got.latents[i : i + 1],
          jax.tree.map(lambda a, i=i: a[i : i + 1], conds[0]),
          key=jax.random.key(SEED + i),
          indices=[0],
        )
        for i in range(3)
      ]
    )
    np.testing.assert_allclose(raw, want, rtol=1e-4)
    np.testing.assert_allclose(
      got.reported[reward], scorers[reward].report(want), rtol=1e-4
    )


def test_pixels(folders, made):
  autoencoder = build.load_vae(folders.sd35)
  z = vae.unscale_latents(jnp.asarray(made["prefix"].latents), autoencoder.config)
  model = nnx.merge(autoencoder.graphdef, autoencoder.params)
  want = np.clip(np.asarray(nnx.jit(lambda m, z: m.decode(z))(model, z)), -1, 1)
  got = made["prefix"].images.astype(float) / 127.5 - 1
  assert np.abs(got - want).max() < 0.6 / 127.5
  assert got.std() > 0.1


def test_what_rewards_share(pipes):
  assert pipes["prefix"].sharing == {"head": "prefix"}
  assert pipes["several"].sharing == {"dina": "weights", "drm": "nothing"}
  # A shared prefix saves the scorings that the next step makes anyway.
  cheap, dear = (
    pipes["prefix"].evaluations(dataclasses.replace(EXPLORING, explore_window=w))
    for w in ((0, 1), (0, 3))
  )
  assert 6 < cheap < dear
  assert pipes["several"].evaluations(Settings(num_steps=3)) == 6.0


# --- seeds, batches, devices -------------------------------------------------------


def test_an_image_is_its_seed_s(pipes, made):
  """Again, alone, in another order: the image depends on its prompt and its seed."""
  whole = made["prefix"]
  again = pipes["prefix"].generate(PROMPTS, EXPLORING, seed=SEED, batch_size=2)
  np.testing.assert_array_equal(again.latents, whole.latents)
  np.testing.assert_array_equal(again.images, whole.images)
  picked = pipes["prefix"].generate(
    [PROMPTS[1], PROMPTS[0], PROMPTS[0]], EXPLORING, seed=[6, 5, 8], batch_size=2
  )
  assert helpers.rel_err(picked.latents[:2], whole.latents[[1, 0]]) < 1e-5
  off = picked.images[:2].astype(int) - whole.images[[1, 0]]
  assert np.abs(off).max() <= 1
  np.testing.assert_allclose(picked.raw["head"][0], whole.raw["head"][1], rtol=1e-4)
  assert helpers.rel_err(picked.latents[2], whole.latents[0]) > 0.1


def test_eight_devices_are_as_one(folders, made):
  pipe = load(folders, "head", devices=None)
  assert pipe.mesh.size == 8
  got = pipe.generate(PROMPTS, EXPLORING, seed=SEED)
  want = made["prefix"]
  assert helpers.rel_err(got.latents, want.latents) < 1e-4
  np.testing.assert_allclose(got.raw["head"], want.raw["head"], rtol=1e-3)
  np.testing.assert_allclose(got.steering, want.steering, rtol=1e-3)
  assert np.abs(got.images.astype(int) - want.images).max() <= 1


def test_one_candidate_is_the_plain_sampler(folders, pipes):
  plain = dataclasses.replace(EXPLORING, explore=explore.Explore(1), sampler="sde")
  alone = load(folders).generate(PROMPTS, plain, seed=SEED, batch_size=2)
  assert alone.raw == {} and np.isnan(alone.steering).all()
  got = pipes["prefix"].generate(PROMPTS, plain, seed=SEED, batch_size=2)
  np.testing.assert_array_equal(got.latents, alone.latents)
  np.testing.assert_array_equal(got.images, alone.images)


def test_nothing_is_compiled_twice(pipes, made, caplog):
  pipe = pipes["prefix"]

  def compiled(settings, prompts=PROMPTS) -> int:
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
      pipe.generate(prompts, settings, seed=1000, batch_size=2)
    return sum("Compiling" in r.getMessage() for r in caplog.records)

  other = dataclasses.replace(
    EXPLORING,
    num_steps=4,
    guidance_scale=7.5,
    negative_prompt="",
    noise_level=0.3,
    sde_window=(0, 3),
    explore_window=None,
    mode="cheap",
  )
  assert compiled(other, ["others", "and", "fewer", "or", "more"]) == 0
  # Without guidance the work is halved, by another program.
  assert compiled(dataclasses.replace(EXPLORING, guidance_scale=1.0)) > 0


def test_batches_come_one_by_one(pipes, monkeypatch):
  pipe, computed = pipes["prefix"], []
  make = pipe._make

  def counted(prompts, *args):
    computed.append(prompts)
    return make(prompts, *args)

  monkeypatch.setattr(pipe, "_make", counted)
  batches = pipe.stream(PROMPTS, EXPLORING, batch_size=2)
  assert not computed
  first = next(batches)
  assert len(first) == 2 and len(computed) == 1
  assert jax.sharding.get_abstract_mesh().empty  # between batches no mesh is set
  assert [len(batch) for batch in batches] == [1] and len(computed) == 2


def test_each_prompt_is_encoded_once(pipes, made, monkeypatch):
  pipe, encoded = pipes["prefix"], []
  monkeypatch.setattr(
    pipe._text_part,
    "tokenize",
    lambda prompts, f=pipe._text_part.tokenize: encoded.extend(prompts) or f(prompts),
  )
  list(pipe.stream(["x", "x", "x", "y"], EXPLORING, batch_size=2))
  assert encoded == ["bad", "x", "y"]


# --- rewards -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(folders):
  """A user's reward: the first value of a latent; some noisy ones have none."""

  def corner(cond, x, sigma):
    assert cond.context.shape[0] == x.shape[0] == sigma.shape[0]
    bad = (jnp.floor(1000 * x[:, 1, 1, 1]) % 5 == 0) & (sigma > 0)
    return jnp.where(bad, jnp.nan, x[:, 0, 0, 0])

  return load(folders, reward_fn=corner, weights={pipeline.REWARD_FN: 3.0})


def test_own_reward(own):
  base = dataclasses.replace(EXPLORING, explore_window=None, sampler="sde")
  plain = dataclasses.replace(base, explore=explore.Explore(1))
  one, many = (own.generate(PROMPTS, s, seed=SEED, batch_size=3) for s in (plain, base))
  name = pipeline.REWARD_FN
  np.testing.assert_array_equal(many.raw[name], many.latents[:, 0, 0, 0])
  np.testing.assert_array_equal(many.raw[name], many.reported[name])
  assert many.raw[name].mean() > one.raw[name].mean()
  # Steered by the weighted score; at the last step of what becomes the result.
  np.testing.assert_allclose(many.steering[2], 3 * many.raw[name], rtol=1e-4)
  # What is not finite never wins, and is counted.
  assert many.bad.sum() > 0 and (many.bad < 3).all()
  assert np.isfinite(many.steering).all()


def test_best_of_n(own):
  settings = dataclasses.replace(
    EXPLORING, explore=explore.Explore(1), explore_window=None, sampler="sde", best_of=3
  )
  best = own.generate(PROMPTS, settings, seed=SEED, batch_size=3)
  one = own.generate(
    PROMPTS, dataclasses.replace(settings, best_of=1), seed=SEED, batch_size=3
  )
  name = pipeline.REWARD_FN
  assert best.best_of.shape == (3, 3)
  np.testing.assert_allclose(best.best_of[:, 0], 3 * one.raw[name], rtol=1e-5)
  np.testing.assert_allclose(best.best_of.max(axis=1), 3 * best.raw[name], rtol=1e-5)
  np.testing.assert_array_equal(best.best_of.argmax(axis=1), best.chosen)
  assert len(set(best.best_of.flatten().tolist())) == 9
  first = best.chosen == 0
  np.testing.assert_array_equal(best.latents[first], one.latents[first])
  assert own.evaluations(settings) == 3 * own.evaluations(
    dataclasses.replace(settings, best_of=1)
  )


def test_the_way_of_the_winner():
  """Two beams of two candidates; beams cross between steps."""

  def step(scores, chosen):
    return np.float32([[scores]]), np.array([[chosen]]), np.zeros((1, 1))

  steps = [
    step([0.0, 1.0, 2.0, 3.0], [3, 1]),  # beam 0 is from beam 1, and the reverse
    step([np.nan] * 4, [0, 2]),  # not explored: each beam goes on
    step([7.0, 6.0, 9.0, 8.0], [2, 0]),
  ]
  options = explore.Explore(candidates=2, beam=2)
  for beam, want in ((0, [1.0, np.nan, 9.0]), (1, [3.0, np.nan, 7.0])):
    got = pipeline._lineage(steps, np.array([beam]), options)
    np.testing.assert_array_equal(got[:, 0], want)


# --- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_steps=0), "num_steps=0 must be >= 1"),
    (dict(best_of=0), "best_of=0 must be >= 1"),
    (dict(guidance_scale=float("nan")), "guidance_scale=nan"),
    (dict(sampler="heun"), "sampler 'heun': use one of"),
    (dict(sampler="euler"), "candidates=3, beam=1 need a sampler that draws noise"),
    (dict(noise_level=1.5), "noise_level=1.5 must be in"),
    (dict(sde_window=(1, 9)), "SDE window 1:9 is outside the schedule of 3 steps"),
    (dict(explore_window=(-1, 2)), "exploring window -1:2 is outside"),
    (dict(explore_window=(1, 1)), "no step explores"),
    (dict(sde_window=(2, 3)), "no step explores"),
    (dict(mode="cheap"), "both say where to explore"),
    (dict(mode="fast", explore_window=None), "exploring mode 'fast'"),
    (dict(best_of=2), "best_of=2 compares independent samples"),
    (dict(explore=explore.Explore(1), sde_window=(0, 1)), "sde_window=.* no effect"),
    (
      dict(explore=explore.Explore(1), noise_level=0.2),
      "noise_level=0.2 .* no effect",
    ),
  ],
)
def test_impossible_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(EXPLORING, **changes)


def test_settings_that_the_models_cannot_serve(folders, pipes):
  def bad(match, settings, names=("head",), **kw):
    given = {name: getattr(folders, name) for name in names}
    with pytest.raises(ValueError, match=match):
      pipeline.resolve(folders.sd35, settings, given, **kw)

  bad("height=30 must be a positive multiple of 4", Settings(height=30))
  bad("width=0 must be a positive multiple", Settings(width=0))
  bad("width=100 is beyond the position table of the gen.*96", Settings(width=100))
  bad("candidates=3, beam=1 needs a reward to choose by", EXPLORING, names=())
  bad("best_of=2 needs a reward", Settings(best_of=2), names=())
  bad("t5_length=513", Settings(), t5_length=513)
  got = pipeline.resolve(folders.sd35, Settings())
  assert (got.height, got.width, got.sampler) == (64, 64, "euler")
  with pytest.raises(folder_lib.FolderError, match="the reward 'x' needs 'reward'"):
    pipeline.resolve(folders.sd35, Settings(), {"x": folders.sd35})
  with pytest.raises(folder_lib.FolderError, match="not a model folder"):
    pipeline.resolve(folders.root / "nowhere", Settings())
  other = folders.root / "other"
  entry = folder_lib.read_config(folders.head)
  entry["components"]["reward"]["config"]["backbone"]["context_dim"] = 32
  other.mkdir()
  (other / "config.json").write_text(json.dumps(entry))
  with pytest.raises(ValueError, match="'x' has context_dim=32, the generator has"):
    pipeline.resolve(folders.sd35, Settings(), {"x": other})
  # And so before anything is computed.
  with pytest.raises(ValueError, match="height=30"):
    pipes["prefix"].stream(PROMPTS, Settings(height=30))


def test_bad_arguments(folders, pipes):
  stream = pipes["prefix"].stream

  def bad(match, call, *args, error=ValueError, **kw):
    with pytest.raises(error, match=match):
      call(*args, **kw)

  bad("sequence of strings", stream, "a cat", error=TypeError)
  bad("prompts is empty", stream, [])
  bad("seeds -1..1 are not in", stream, PROMPTS, seed=-1)
  bad("seeds 4294967294..4294967296", stream, PROMPTS, seed=2**32 - 2)
  bad("an integer, or 3 of them", stream, PROMPTS, seed=[1, 2])
  bad("batch_size=0", stream, PROMPTS, batch_size=0)
  bad("batch_size=12 .* number of devices, 8", pipeline.batch_rows, 12, 100, 8)
  assert pipeline.batch_rows(None, 100, 8) == 32
  assert pipeline.batch_rows(None, 9, 8) == 16
  assert pipeline.batch_rows(None, 1, 1) == 1
  bad("dtype='float16'", load, folders, dtype="float16")
  bad("'fast'", load, folders, attention_impl="fast")
  bad("weights for .'x'., but the rewards are .'head'.", load, folders, "head",
      weights={"x": 1.0})  # fmt: skip
  bad("weight inf of the reward 'head'", load, folders, "head",
      weights={"head": float("inf")})  # fmt: skip
  bad("'text' or 'vae'", pipes["prefix"].free, "unet")


@pytest.mark.slow
def test_the_example_in_the_documentation(folders, tmp_path, monkeypatch, capsys):
  (tmp_path / "models").mkdir()
  for name in ("sd35", "dina"):
    (tmp_path / "models" / name).symlink_to(getattr(folders, name))
  monkeypatch.chdir(tmp_path)
  page = (pathlib.Path(__file__).parent.parent / "docs/generation.md").read_text()
  (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  for long, short in (  # a tenth of the time
    ("num_steps=20", "num_steps=2, height=32, width=32"),
    ('dtype="float32"', "t5_length=16"),
  ):
    assert long in example
    example = example.replace(long, short)
  exec(compile(example, "generation.md", "exec"), {})
  assert "passes of the transformer" in capsys.readouterr().out
  assert (tmp_path / "cat.png").exists()
