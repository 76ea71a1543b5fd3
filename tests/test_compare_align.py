"""Alignment runs compared: curves with known answers, and the script on a tiny one."""

import functools
import json
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from lrm_jax import alignment_report, build, folder, plots, weights
from lrm_jax.data import digits, prompt_cache, prompts
from lrm_jax.models import mmdit, qformer_head
from lrm_jax.models import reward as reward_lib
from tests import golden_models
from tests.runs import ROOT, config_of

import compare_align  # isort: skip  (tests.runs puts train/ on the path)

# --- curves with known answers -----------------------------------------------------


def make_curve(reward, *, seed=0, passes=10.0, seconds=1.0, **others):
  """An evaluation every iteration; `passes` and `seconds` of one."""
  reward = np.asarray(reward, float)
  iterations = np.arange(len(reward), dtype=float)
  values = {
    "iterations": iterations,
    "passes": passes * iterations,
    "seconds": seconds * iterations,
    "reward": reward,
    "oracle": 0.5 + reward / 100,
    "frechet": 1 + reward,
    "diversity": 1 - reward / 100,
    **{name: np.asarray(y, float) for name, y in others.items()},
  }
  return alignment_report.Curve(seed, values)


def make_comparison(fast, slow, **others):
  runs = {"fast": fast, "slow": slow, **others}
  return alignment_report.Comparison(
    runs=runs,
    labels={name: name.title() for name in runs},
    fast="fast",
    slow="slow",
    claim=2.5,
    tail=1,
    parts=(0.5, 1.0),
    real={"oracle": 0.9, "frechet": 0.8, "diversity": 1.1},
  )


def test_first_at():
  x, y = np.array([0.0, 10, 20, 30]), np.array([1.0, 3, 2, 7])
  first = alignment_report.first_at
  assert first(x, y, 0.5) == 0  # already there
  assert first(x, y, 1.0) == 0
  assert first(x, y, 2.0) == 5  # not 20, where it is again
  assert first(x, y, 3.0) == 10
  assert first(x, y, 4.5) == 25
  assert first(x, y, 7.1) is None


def test_race():
  """The slow one ends at 6 after 6 iterations, but had 6 after 3 already."""
  slow = make_curve([0, 2, 4, 6, 6, 6, 6], passes=10, seconds=2)
  fast = make_curve([0, 4, 8, 12, 16], passes=15, seconds=4)
  found = alignment_report.race(fast, slow, "reward", tail=1)
  assert found["target"] == 6
  assert found["passes"] == dict(
    fast=22.5,
    slow_total=60,
    slow_first=30,
    ratio_total=60 / 22.5,
    ratio_first=30 / 22.5,
  )
  assert found["iterations"]["ratio_total"] == 4
  assert found["seconds"]["ratio_total"] == 2
  back = alignment_report.race(make_curve([0, 1, 2]), slow, "reward", tail=1)
  assert back["passes"]["fast"] is None and back["passes"]["ratio_total"] is None
  # One that has it from the beginning has no ratio either.
  had = alignment_report.race(make_curve([7, 7]), slow, "reward", tail=1)
  assert had["passes"]["fast"] == 0 and had["passes"]["ratio_total"] is None


def test_final_is_a_mean_of_the_last():
  assert make_curve([9, 1, 2, 6]).final("reward", 3) == 3
  assert make_curve([9, 1, 2, 6]).final("reward", 1) == 6


def test_a_run_as_if_it_had_ended_earlier():
  cut = make_curve([0, 2, 4, 6]).up_to(25.0)
  np.testing.assert_allclose(cut["passes"], [0, 10, 20, 25])
  np.testing.assert_allclose(cut["reward"], [0, 2, 4, 5])
  whole = make_curve([0, 2, 4, 6]).up_to(30.0)
  np.testing.assert_allclose(whole["passes"], [0, 10, 20, 30])


def test_at_equal_drift():
  """Reward per distance differs, whatever it cost."""
  near = make_curve([0, 2, 4], frechet=[1, 2, 3], passes=100)
  far = make_curve([0, 2, 4], frechet=[1, 5, 9])
  levels = alignment_report.drifts([(near, far)], [0.5, 1.0])
  assert levels == [2, 3]  # of the way from 1 to 3, the farther of `near`
  found = alignment_report.at_drift(near, 2.0)
  assert found["reward"] == 2 and found["passes"] == 100
  assert alignment_report.at_drift(far, 2.0)["reward"] == 0.5
  assert alignment_report.at_drift(near, 3.1) is None
  closer = make_curve([0, 1], frechet=[1, 0.5])
  assert alignment_report.drifts([(near, closer)], [1.0]) == []


def test_the_first_time_that_far_counts():
  dip = make_curve([0, 5, 1, 9], frechet=[2, 1, 3, 2.5])
  assert alignment_report.at_drift(dip, 2.5)["reward"] == 2  # 3/4 from 5 to 1


def test_pairs_are_of_one_seed_and_as_long():
  fast = [make_curve([0, 4, 8], passes=15, seed=s) for s in (0, 1, 3)]
  slow = [make_curve([0, 1, 2, 3], seed=s) for s in (1, 0, 2)]
  pairs = make_comparison(fast, slow).pairs()
  assert [(a.seed, b.seed) for a, b in pairs] == [(0, 0), (1, 1)]
  assert all(c["passes"][-1] == 30 for pair in pairs for c in pair)
  longer = [make_curve([0, 1, 2, 3, 4], seed=0)]
  (pair,) = make_comparison(fast, longer).pairs()
  assert pair[1]["passes"][-1] == 30 and pair[1]["reward"][-1] == 3
  with pytest.raises(ValueError, match="no seed in common"):
    make_comparison(fast, slow[2:]).pairs()


def test_equal_passes_and_iterations():
  """15 passes an iteration against 10: in 2 iterations, what 3 cost."""
  comparison = make_comparison(
    [make_curve([0, 4, 8], passes=15)],
    [make_curve([0, 1, 2, 3])],
    cheap=[make_curve([0, 9, 9], passes=1)],
  )
  passes = comparison.equal("passes")
  assert passes["value"] == 30 and set(passes["runs"]) == {"fast", "slow"}
  assert passes["runs"]["fast"][0]["reward"] == 8
  assert passes["runs"]["slow"][0]["reward"] == 3
  iterations = comparison.equal("iterations")
  assert iterations["value"] == 2 and "cheap" in iterations["runs"]
  assert iterations["runs"]["slow"][0]["reward"] == 2
  with pytest.raises(ValueError, match=r"31 passes are not within 0..30"):
    comparison.runs["fast"][0].at("passes", 31.0)


def test_verdict_counts_seeds():
  slow = [make_curve([0, 2, 4, 6], seed=s) for s in (0, 1)]
  # 6 at 5 passes, a sixth of 30; and 6 at 15, half of them.
  fast = [make_curve([0, 12, 12, 12], seed=0), make_curve([0, 4, 8, 12], seed=1)]
  text = alignment_report.verdict(make_comparison(fast, slow))
  assert "Slow's final reward: 6.00, 2.00 (seeds 0, 1); at least 2.5 in 1" in text
  assert (
    "At the same Frechet distance to real data (7.00), Fast has reward 6.00" in text
  )
  never = alignment_report.verdict(make_comparison([make_curve([0, 1, 2])], slow))
  assert "final reward: never (seeds 0); at least 2.5 in 0 of 1." in never
  assert "oracle probability: never (seeds 0)" in never
  above = alignment_report.verdict(make_comparison([make_curve([9, 9, 9])], slow))
  assert "final reward: from the start (seeds 0); at least 2.5 in 0 of 1." in above
  flat = [make_curve([0, 1, 2, 3], frechet=[2, 1, 1, 1])]
  assert "no farther from real data" in alignment_report.verdict(
    make_comparison(fast, flat)
  )


def test_where_the_oracle_liked_a_run_best():
  """The evaluation that early stopping on the oracle would have kept."""
  hacked = make_curve([0, 1, 2, 3], oracle=[0.5, 0.8, 0.7, 0.1])
  found = alignment_report.at_best(hacked, "oracle")
  assert found["oracle"] == 0.8 and found["reward"] == 1 and found["frechet"] == 2
  assert found["passes"] == hacked["passes"][1]
  comparison = make_comparison([hacked], [make_curve([0, 1, 2, 3])])
  assert comparison.best()["fast"] == [found]
  assert "| 0.800" in alignment_report.tables(comparison, "").split("liked it best")[1]


def test_tables():
  comparison = make_comparison(
    [make_curve([0, 4, 8], passes=15, seed=s) for s in (0, 1)],
    [make_curve([0, 1, 2, 3 + s], seed=s) for s in (0, 1)],
  )
  text = alignment_report.tables(comparison, "An intro.")
  assert text.startswith("An intro.")
  assert "3.50 ± 0.71" in text and "real data" in text
  assert json.loads(json.dumps(comparison.to_dict()))["races"]["reward"][1]["seed"] == 1


def test_curve_of_metrics():
  lines = [
    {"step": 0, "cost/passes": 0.0, "cost/seconds": 0.1},
    {"step": 1, "cost/passes": 7.0, "cost/seconds": 0.2},  # compiled, untimed
    {"step": 2, "cost/passes": 14.0, "cost/seconds": 3.2},
    {"step": 3, "cost/passes": 21.0, "cost/seconds": 90.0},  # the machine was busy
    {"step": 4, "cost/passes": 28.0, "cost/seconds": 93.0},
  ]
  for i in (0, 2, 4):
    lines[i] |= {"r": float(i), "o": i / 10, "eval/diversity": 1.0}
  distances = {0: 1.0, 2: 2.0, 4: 3.0}
  curve = alignment_report.make_curve(5, lines, distances, reward="r", oracle="o")
  assert curve.seed == 5
  np.testing.assert_allclose(curve["iterations"], [0, 2, 4])
  np.testing.assert_allclose(curve["passes"], [0, 14, 28])
  np.testing.assert_allclose(curve["seconds"], [0, 6, 12])  # 3 s each
  np.testing.assert_allclose(curve["frechet"], [1, 2, 3])
  with pytest.raises(ValueError, match=r"no Frechet distance of the iterations \[4\]"):
    alignment_report.make_curve(5, lines, {0: 1.0, 2: 2.0}, reward="r", oracle="o")
  with pytest.raises(ValueError, match="a curve needs two"):
    alignment_report.make_curve(5, lines[:4], {0: 1.0}, reward="x", oracle="o")


def test_figure_refuses_what_is_no_seeds(tmp_path):
  with pytest.raises(ValueError, match="panel 'a', 'b'"):
    plots.seeds(tmp_path / "a.png", {"a": ("x", {"b": (np.ones(3), np.ones(3))}, None)})


# --- the script --------------------------------------------------------------------

TEXTS = digits.PROMPTS[1:3] + digits.PROMPTS[-2:]
T, GROUP, NUM = 2, 2, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A tiny generator, a reward model on its first block, prompts and embeddings."""
  path = tmp_path_factory.mktemp("align")
  (path / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
  full = mmdit.MMDiTConfig(
    num_layers=2,
    num_heads=2,
    head_dim=8,
    in_channels=4,
    out_channels=4,
    context_dim=8,
    pooled_dim=8,
    pos_embed_size=4,
    pos_embed_base=4,
  )
  model = golden_models.random_model(golden_models.make_mmdit(full))
  with folder.write_atomically(path / "generator", force=False) as out:
    folder.save_params(out / "transformer", weights.flatten(model.params))
    entry = {"config": build.config_to_dict(full)}
    folder.write_config(out, {"components": {"transformer": entry}})
  config = reward_lib.RewardConfig(
    full.truncate(1, has_output=False, image_taps=(1,), text_taps=(1,)),
    qformer_head.QFormerHeadConfig(
      token_dim=16, width=16, num_heads=2, num_image_taps=1, num_text_taps=1
    ),
  )
  model = golden_models.random_model(lambda: build.make_reward(config), seed=3)
  scoring = reward_lib.ScoringConfig(u_generated=0.1, table=False)
  with folder.write_atomically(path / "reward", force=False) as out:
    leaves = weights.flatten(model.params)
    entry = build.save_reward(out, leaves, config, scoring, stacked=True)
    folder.write_config(out, {"components": {"reward": entry}})
  embedder = digits.WordEmbedder(8, 8)
  with prompt_cache.PromptCacheWriter(
    path / "cache", t5_length=0, dtype="float32", encoder="words"
  ) as cache:
    texts = ["", *TEXTS]
    cache.append(texts, embedder.context(texts), embedder.pooled(texts))
  return path


def tiny(root: pathlib.Path, method: str = "step_grpo"):
  """The quickstart's own recipe, with its sizes made small."""
  c = config_of("quickstart_align", method)
  c.prompts.train = c.prompts.eval = str(root / "prompts.txt")
  c.prompts.cache = str(root / "cache")
  c.model.generator = str(root / "generator")
  c.rewards.reward.folder = str(root / "reward")
  c.rollout.num_steps = c.eval.num_steps = T
  c.group.group_size = GROUP
  if "candidates" in c.group:
    c.group.candidates = 2
  c.train.prompts = c.eval.prompts = len(TEXTS)
  c.eval.num = NUM
  c.lora.rank = 2
  c.compare.workdir = str(root / "runs")
  for name in list(c.compare.runs):
    if name not in ("step_grpo", "flow_grpo"):
      del c.compare.runs[name]
      continue
    c.compare.runs[name].seeds = (0,)
    c.compare.runs[name].settings.train.num_iterations = 2
    c.compare.runs[name].settings.eval.every = 1
  return c


def test_script(root, capsys, monkeypatch):
  on_one_device = functools.partial(
    compare_align.align.train, devices=jax.devices()[:1]
  )
  monkeypatch.setattr(compare_align.align, "train", on_one_device)
  get_config = lambda method: tiny(root, method)  # noqa: E731
  compare = tiny(root).compare
  assert compare_align.run(get_config, compare)
  assert "run 2 of 2" in capsys.readouterr().err
  out = root / "runs"
  found = json.loads((out / "comparison.json").read_text())
  for name in ("step_grpo", "flow_grpo"):
    (curve,) = found["curves"][name]
    assert curve["iterations"] == [0, 1, 2]
    assert curve["reward"][0] == found["curves"]["step_grpo"][0]["reward"][0]
    last = compare_align.load_images(out / f"{name}_s0", 2)
    assert last.shape == (len(TEXTS), NUM, 8, 8, 3)
    judge = compare_align.Judge(0)
    assert curve["frechet"][2] == pytest.approx(judge.frechet(last))
  # 8 samples, T passes each; two candidates of the step that is learnt from, or the
  # final sample, scored by half of the blocks; three passes to learn, a reference.
  assert found["curves"]["step_grpo"][0]["passes"][1] == 8 * (T + 2 * 0.5 + 4)
  assert found["curves"]["flow_grpo"][0]["passes"][1] == 8 * (T + 0.5 + 4)
  assert np.asarray(Image.open(out / "before_after.png")).size > 1000
  assert np.asarray(Image.open(out / "comparison.png")).size > 1000
  assert "Step-GRPO" in (out / "comparison.md").read_text()

  # Finished runs stay as they are; those of other settings are in the way.
  assert compare_align.run(get_config, compare)
  assert "run 1" not in capsys.readouterr().err
  compare.runs.step_grpo.settings.train.learning_rate = 1.0
  with pytest.raises(ValueError, match="train.learning_rate"):
    compare_align.run(get_config, compare)
  compare = tiny(root).compare
  compare.runs.step_grpo.settings.train.num_iterations = 1
  with pytest.raises(ValueError, match="step_grpo_s0 has 2 iterations, not 1"):
    compare_align.run(get_config, compare)


def test_real_digits_are_near_themselves():
  judge = compare_align.Judge(0)
  real = judge.real(digits.PROMPTS[1:], 5)
  assert 0.8 < real["oracle"] < 0.95 and 0.5 < real["frechet"] < 1.5
  noise = np.random.default_rng(0).integers(0, 256, (40, 5, 8, 8, 1), np.uint8)
  assert judge.frechet(np.repeat(noise, 3, axis=-1)) > 10 * real["frechet"]


# --- the recipe, and bad input -----------------------------------------------------


def test_recipe():
  c = config_of("quickstart_align")
  texts = prompts.read(ROOT / "configs" / "quickstart_prompts.txt")
  assert tuple(texts) == digits.PROMPTS[1:]
  configs = compare_align.run_configs(
    lambda m: config_of("quickstart_align", m), c.compare
  )
  assert {len(mine) for mine in (configs["step_grpo"], configs["flow_grpo"])} == {3}
  assert {mine[0].method for mine in configs.values()} == {
    "step_grpo",
    "flow_grpo",
    "lpo",
    "refl",
  }
  folders = [config.workdir for mine in configs.values() for config in mine]
  assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(fast="sft"), "compare.fast='sft': use one of"),
    (dict(tail=0), "compare.tail"),
    (dict(drifts=(0.5, 1.5)), r"compare.drifts=\(0.5, 1.5\)"),
    (dict(runs=dict(lpo=dict(seeds=(1, 1)))), r"compare.runs.lpo.seeds=\(1, 1\)"),
    (dict(runs=dict(flow_grpo=dict(seeds=(7,)))), "have no seed in common"),
    (
      dict(runs=dict(lpo=dict(settings=dict(train=dict(learning_rat=1.0))))),
      "compare.runs.lpo.settings.*learning_rat",
    ),
  ],
)
def test_impossible_settings_name_the_key(change, message):
  c = config_of("quickstart_align").compare
  c.update(change)
  with pytest.raises(ValueError, match=message):
    compare_align.run_configs(lambda m: config_of("quickstart_align", m), c)


def test_missing_models_name_the_command(root):
  c = tiny(root)
  c.model.generator = str(root / "nothing")
  with pytest.raises(ValueError, match="nothing: no such folder; run `make quickst"):
    compare_align.check_folders(c)
