"""The quickstart's explore-and-select: the whole script on a tiny, random generator."""

import json
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

pytest.importorskip("sklearn")

from lrm_jax import (
  build,
  explore,
  flow,
  folder,
  optim,
  plots,
  sample,
  steering,
  weights,
)
from lrm_jax.data import digits
from lrm_jax.models import mmdit, qformer_head, reward
from tests import golden_models
from tests.runs import config_of

import reward as train_reward  # isort: skip  (tests.runs puts train/ on the path)
import sample as train_sample  # isort: skip

K, T, NUM, SEEDS, BLOCKS, SCORED = 2, 3, 20, (0, 1), 2, 1
MANY = 6  # candidates of the head-only reward


def write_reward(path: pathlib.Path, base: pathlib.Path, *, head_only: bool) -> None:
  full = build.config_from_dict(folder.find(base, "transformer")[1]["config"])
  backbone = full.truncate(
    SCORED, has_output=False, image_taps=(SCORED,), text_taps=(SCORED,)
  )
  head = qformer_head.QFormerHeadConfig(
    token_dim=16, width=16, num_heads=2, num_image_taps=1, num_text_taps=1
  )
  config = reward.RewardConfig(backbone, head)
  model = golden_models.random_model(lambda: build.make_reward(config), seed=3)
  leaves = weights.flatten(model.params)
  if head_only:
    leaves = {p: leaf for p, leaf in leaves.items() if p.startswith("head/")}
  scoring = reward.ScoringConfig(u_generated=0.1, table=False)
  with folder.write_atomically(path, force=False) as out:
    entry = build.save_reward(out, leaves, config, scoring, stacked=True)
    folder.write_config(out, {"base": str(base), "components": {"reward": entry}})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The quickstart's own, with its sizes made small."""
  root = tmp_path_factory.mktemp("quickstart")
  c = config_of("quickstart")
  c.workdir = str(root / "reward")
  c.model.base = str(root / "generator")
  c.sample.workdir = str(root / "sample")
  c.sample.head_only = str(root / "head_only")
  c.sample.seeds = SEEDS
  c.sample.num = NUM
  c.sample.num_steps = T
  c.sample.candidates = (K,)
  c.sample.sweep_candidates = (K,)
  c.sample.cheap_candidates = (MANY,)
  c.sample.noise_candidates = K
  c.sample.best_of = 3
  c.sample.windows = ((0.45, 1.0), (0.0, 0.45))
  c.sample.fractions = (0.4,)
  c.sample.noise_levels = (1.0,)

  full = mmdit.MMDiTConfig(
    num_layers=BLOCKS,
    num_heads=2,
    head_dim=8,
    in_channels=4,
    out_channels=4,
    context_dim=32,
    pooled_dim=32,
    pos_embed_size=4,
    pos_embed_base=4,
  )
  model = golden_models.random_model(golden_models.make_mmdit(full))
  with folder.write_atomically(c.model.base, force=False) as out:
    folder.save_params(out / "transformer", weights.flatten(model.params))
    entry = {"config": build.config_to_dict(full)}
    folder.write_config(out, {"components": {"transformer": entry}})
  base = pathlib.Path(c.model.base)
  write_reward(root / "reward" / "model", base, head_only=False)
  write_reward(root / "head_only", base, head_only=True)
  return c


@pytest.fixture(scope="module")
def ran(config):
  """(Bench, Results, what was printed as progress) of the whole script."""
  made, said = {}, []
  experiment, bench_class = train_sample.experiment, train_sample.Bench

  def spy_experiment(bench, say):
    made["results"] = experiment(bench, lambda what, row: said.append(what))
    return made["results"]

  def spy_bench(config):
    made["bench"] = bench_class(config)
    return made["bench"]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_sample, "experiment", spy_experiment)
    patch.setattr(train_sample, "Bench", spy_bench)
    train_sample.run(config, "configs/quickstart.py")
  return made["bench"], made["results"], said


# --- the whole script --------------------------------------------------------------


def refuse(constant):
  raise AssertionError(f"{constant} in results.json")


def test_what_it_leaves(ran, config):
  _, results, said = ran
  workdir = pathlib.Path(config.sample.workdir)
  found = json.loads((workdir / "results.json").read_text(), parse_constant=refuse)
  # Two scales of (k = 1, 2), best of 3 and of 2, two windows, two modes, a noise level
  # at k = 1 and 2, softmax, beam. (The first 40 % are sigma >= 0.45.)
  rows = found["rows"]
  assert len(rows) == 4 + 3 + 2 + 2 + 2 + 2 + 2
  assert len(said) == len(rows) - 5 + 2  # best-of-n is told of once
  for row in rows:
    assert row["evaluations"] >= T and row["seconds_per_sample"] > 0
    assert row.get("bad_scores", 0) == 0
    for name in (*steering.PER_SAMPLE, *steering.PER_SET):
      value = row[name]
      assert len(value["seeds"]) == len(SEEDS)
      assert value["mean"] == pytest.approx(np.mean(value["seeds"]))
      assert value["spread"] == pytest.approx(np.std(value["seeds"], ddof=1))
  assert len(found["equal_evaluations"]) == 2 and len(found["windows"]) == 2
  assert len(found["cheap"]) == 2
  assert found["settings"]["scoring"]["reward"] == pytest.approx(SCORED / BLOCKS)
  assert found["settings"]["num"] == NUM
  assert 0.8 < found["real_digits"]["accuracy"] <= 1
  assert json.loads((workdir / "run.json").read_text())["seed"] == config.seed

  text = (workdir / "tables.md").read_text()
  assert "| explore, k = 2 " in text and "| best of 3 " in text
  assert "| 0:1   | sigma >= 0.45; first 40% |" in text
  for name in ("sample", "samples_k1", f"samples_k{K}"):
    assert np.asarray(Image.open(workdir / f"{name}.png")).size > 1000
  scale = config.sample.guidance_scales[0]
  grid = np.asarray(Image.open(workdir / f"samples_k{K}.png")) / 255
  first = np.clip(results.explore[scale, K].images[0, 0], -1, 1)
  np.testing.assert_allclose(grid[:48:6, :48:6], (1 - first) / 2, atol=0.01)


def test_one_candidate_is_one_sample_is_the_plain_sampler(ran, config):
  bench, results, _ = ran
  for scale in config.sample.guidance_scales:
    one, first = results.explore[scale, 1], results.best_of[scale][0]
    np.testing.assert_array_equal(one.images, first.images)
    for name, value in one.values.items():
      np.testing.assert_array_equal(value, first.values[name])
    assert one.evaluations == first.evaluations == T * (1 + (scale != 1))

  params, keys = bench.model.params, bench.keys[1]
  cond = jax.jit(bench.model.embed)(params, bench.conds[0])["generator"]
  x, _ = jax.jit(
    lambda params, cond, keys: sample.rollout(
      bench.model.velocity_fn(params),
      cond,
      sample.initial_noise(keys, bench.latent),
      bench.schedule(),
      keys=keys,
    )
  )(params, cond, keys)
  made = digits.from_latent(np.clip(np.asarray(x), -1, 1))
  np.testing.assert_allclose(results.explore[1.0, 1].images[1], made, atol=1e-5)


def test_best_of_n_is_that_of_the_package(ran):
  bench, results, _ = ran
  keys, (cond, _) = bench.keys[0], bench.conds

  @jax.jit
  def best_of_three(params, cond, keys):
    model = bench.model
    embedded = model.embed(params, cond)
    networks = explore.Apart(
      model.velocity_fn(params), model.reward_fn(params, "reward")
    )
    return explore.best_of_n(
      networks,
      embedded["generator"],
      model.reward_inputs(embedded)["reward"],
      bench.latent,
      bench.schedule(),
      3,
      keys=keys,
    )

  best = best_of_three(bench.model.params, cond, keys)
  assert len(set(np.asarray(best.chosen).tolist())) > 1
  made = digits.from_latent(np.clip(np.asarray(best.x), -1, 1))
  np.testing.assert_allclose(results.best_of[1.0][2].images[0], made, atol=1e-5)


def test_evaluations(ran):
  """A score is one of the generator's two blocks."""
  _, results, _ = ran
  score = SCORED / BLOCKS
  assert results.explore[1.0, K].evaluations == pytest.approx(T + T * K * score)
  assert results.explore[2.0, K].evaluations == pytest.approx(2 * T + T * K * score)
  assert [row.evaluations for row in results.best_of[1.0]] == pytest.approx(
    [T, 2 * (T + score), 3 * (T + score)]
  )
  # Full mode saves the prefix behind every step but the last.
  full = results.cheap[MANY, "full"].evaluations
  assert full == pytest.approx(T + T * MANY * score - (T - 1) * score)
  cheap = results.cheap[MANY, "cheap"].evaluations
  assert cheap == pytest.approx(T + MANY * score - score)
  beam = next(row for name, row in results.variations.items() if "beam" in name)
  assert beam.evaluations == pytest.approx(2 * T + T * 2 * score + 2 * score)


def test_sharing_blocks_changes_no_sample(ran):
  bench, results, _ = ran
  method = train_sample.Method("head_only", explore.Explore(candidates=MANY), False)
  x, _, _ = bench.draw(method, bench.schedule(), 1.0, bench.keys[0])
  made = digits.from_latent(np.clip(np.asarray(x), -1, 1))
  shared = results.cheap[MANY, "full"]
  np.testing.assert_allclose(shared.images[0], made, atol=1e-4)
  assert np.abs(made - results.explore[1.0, 1].images[0]).max() > 0.1


@pytest.mark.parametrize(
  ("name", "k", "guided"),
  [("reward", 2, False), ("reward", 2, True), ("head_only", 6, False)],
)
def test_steering_raises_the_score_that_steers(name, k, guided, ran):
  """Of the result itself, without the noise that it is reported under."""
  bench, _, _ = ran
  keys, scale = bench.keys[0], 2.0 if guided else 1.0

  def score(steering, k, **kw):
    method = train_sample.Method(steering, explore.Explore(k), guided, **kw)
    x, _, _ = bench.draw(method, bench.schedule(), scale, keys)
    return bench.scores(x, keys, 0.0)[name].mean()

  # The programs that were compiled before.
  assert score(name, k, shared=name == "head_only") > score("reward", 1)


# --- the numbers -------------------------------------------------------------------


def make_row(evaluations=1.0, n=1, **values):
  values = {name: np.asarray(value, float) for name, value in values.items()}
  settings = {"n": n}
  return steering.Row(settings, evaluations, 1.0, values, np.zeros((1, 1, 8, 8)))


def test_share_of_gain():
  rng = np.random.default_rng(1)
  start = rng.standard_normal((2, 50))
  gain = 1 + 0.1 * rng.standard_normal((2, 50))
  plain, full = make_row(reward=start), make_row(reward=start + gain)
  part = make_row(reward=start + 0.8 * gain + 0.05 * rng.standard_normal((2, 50)))
  share = steering.share_of_gain("reward", plain, part, full)
  assert share["share"] == pytest.approx(0.8, abs=0.02)
  assert share["low"] < share["share"] < share["high"] < share["low"] + 0.06
  same = steering.share_of_gain("reward", plain, full, full)
  assert same == {"share": 1, "low": 1, "high": 1}
  assert steering.share_of_gain("reward", plain, part, plain) is None
  worse = make_row(reward=start - gain)
  assert steering.share_of_gain("reward", plain, part, worse) is None


def test_means_at_equal_evaluations():
  rows = [make_row(10.0, reward=[[0.0]]), make_row(30.0, n=2, reward=[[1.0]])]
  assert steering.at_evaluations(rows, "reward", 15.0) == 0.25
  with pytest.raises(ValueError, match=r"31 evaluations are not within 10..30"):
    steering.at_evaluations(rows, "reward", 31.0)


def test_windows_of_ten_steps():
  c = config_of("quickstart")
  sigmas = flow.sampling_sigmas(10, 1.0)
  windows = steering.make_windows(sigmas, c.sample.windows, c.sample.fractions)
  assert windows == {
    (0, 4): "sigma >= 0.45; first 45%",
    (0, 3): "sigma >= 0.65; first 30%",
    (3, 5): "0.35 <= sigma <= 0.65",
    (4, 10): "sigma <= 0.45",
    (5, 10): "sigma <= 0.35",
    (0, 6): "first 60%",
    (0, 8): "first 80%",
  }
  assert explore.mode_window("cheap", 10, explore.Explore(6)) in windows
  with pytest.raises(ValueError, match="no step arrives in"):
    steering.make_windows(sigmas, [(0.5, 0.52)], [])


def test_first_best():
  scores = np.array([[1.0, np.nan, 2.0], [3.0, 0.0, 2.0], [2.0, np.inf, 5.0]])
  np.testing.assert_array_equal(
    steering.first_best(scores), [[0, 0, 0], [1, 1, 0], [1, 1, 2]]
  )


def test_published_cost():
  whole = steering.published_cost(10, 6, "full", shared=False)
  fraction = (whole - 1) / 3  # two passes and six scores a step
  assert 0.5 < fraction < 0.65  # half the blocks, more of them dual, and a head
  np.testing.assert_allclose(fraction, explore.SCORING, atol=1e-3)
  saved = whole - steering.published_cost(10, 6, "full", shared=True)
  np.testing.assert_allclose(saved / (9 / 20), explore.SHARED, atol=1e-3)
  for k in (2, 3, 4, 6):
    assert steering.published_cost(40, k, "cheap", shared=True) <= explore.BUDGET


# --- the recipe, and bad input -----------------------------------------------------


def test_frozen_recipe_trains_a_head_only(config):
  c = config_of("quickstart", "frozen")
  c.model.update(base=config.model.base, num_layers=1)
  c.model.image_taps = c.model.text_taps = (1,)
  *_, params = train_reward.abstract_params(c)
  trained, frozen = optim.partition(params, tuple(c.trainable))
  assert trained and all(path.startswith("head/") for path in trained)
  assert frozen and all(path.startswith("backbone/") for path in frozen)
  assert c.workdir + "/model" == c.sample.head_only
  folders = {
    config_of("quickstart", init).sample.workdir for init in ("base", "random")
  }
  assert len({*folders, c.sample.workdir}) == 3


def test_missing_models_name_their_commands(config, tmp_path):
  c = config.copy_and_resolve_references()
  c.workdir = str(tmp_path / "no_reward")
  c.sample.head_only = str(tmp_path / "no_head")
  c.sample.workdir = str(tmp_path / "out")
  with pytest.raises(folder.FolderError) as e:
    train_sample.run(c, "configs/mine.py:random")
  text = str(e.value)
  assert "no_reward/model: python train/reward.py --config configs/mine.py:rand" in text
  assert "no_head: python train/reward.py --config configs/quickstart.py:froz" in text
  assert "train/generator.py" not in text
  assert not (tmp_path / "out").exists()
  c.model.base = str(tmp_path / "nothing")
  with pytest.raises(folder.FolderError, match="train/generator.py --config configs/q"):
    train_sample.run(c, "configs/mine.py")


def test_cheap_mode_needs_shared_blocks(config):
  c = config.copy_and_resolve_references()
  c.sample.head_only = c.workdir + "/model"
  with pytest.raises(ValueError, match="does not share the blocks of the generator"):
    train_sample.Bench(c)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num=19), "sample.num=19"),
    (dict(seeds=()), "must not be empty"),
    (dict(candidates=(1, 2)), r"sample.candidates=\(1, 2\)"),
    (dict(sweep_candidates=(2, 5)), r"sample.sweep_candidates: \[5\]"),
    (dict(cheap_candidates=(1, 4)), r"sample.cheap_candidates=\(1, 4\)"),
    (dict(noise_candidates=3), "sample.noise_candidates=3"),
    (dict(best_of=1), "sample.best_of=1"),
    (dict(beam=3), "sample.beam=3 must be 2 or more and divide the most candidates, 2"),
  ],
)
def test_impossible_settings_name_the_key(config, change, message):
  c = config.copy_and_resolve_references()
  c.sample.update(change)
  with pytest.raises(ValueError, match=message):
    train_sample.check(c.sample)


def test_figure_refuses_columns_that_differ(tmp_path):
  with pytest.raises(ValueError, match="panel 'reward', 'explore'"):
    plots.gain_and_cost(tmp_path / "a.png", {"reward": {"explore": ([1], [1], [])}}, {})
  with pytest.raises(ValueError, match="panel 'k = 2', 'reward'"):
    bars = {"k = 2": (["a", "b"], {"reward": [1.0]})}
    plots.gain_and_cost(tmp_path / "a.png", {}, bars)
