"""Alignment without the devices: abstract denoisers, and reports on an iteration."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import aot as benchmark
from lrm_jax import aot, build, denoiser, flops, sharding, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import conv_head, lora, mmdit, qformer_head, reward
from tests import runs  # puts train/ and configs/ on the path
from tests.generating import Folders

import align as train_align  # isort: skip

# --- denoisers without folders -----------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return Folders(tmp_path_factory.mktemp("aot"))


def config_of(path, component):
  return build.config_from_dict(folder_lib.find(path, component)[1]["config"])


@pytest.mark.parametrize(
  "names, on_generator, dtype, scan_blocks",
  [
    ((), (), "float32", True),
    (("head",), ("head",), "float32", True),
    (("dina",), ("dina",), "bfloat16", False),
    (("drm",), (), "bfloat16", True),
    (("head", "dina", "drm"), ("dina", "head"), "float32", False),
  ],
)
def test_abstract_is_what_load_makes(folders, names, on_generator, dtype, scan_blocks):
  options = dict(dtype=dtype, scan_blocks=scan_blocks)
  paths = {name: getattr(folders, name) for name in names}
  loaded = denoiser.load(folders.sd35, paths, **options)
  full = config_of(folders.sd35, "transformer")
  rewards = {name: config_of(path, "reward") for name, path in paths.items()}
  made = denoiser.abstract(full, rewards, on_generator=on_generator, **options)

  found, want = weights.flatten(made.params), weights.flatten(loaded.params)
  assert found.keys() == want.keys()
  for path, leaf in found.items():
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert (leaf.shape, leaf.dtype) == (want[path].shape, want[path].dtype), path
  assert made.prefix == loaded.prefix and made.tail == loaded.tail
  assert made.prefix_config == loaded.prefix_config and made.config == loaded.config
  for name, part in loaded.rewards.items():
    raw = dataclasses.replace(part, scoring=reward.ScoringConfig())
    assert made.rewards[name] == raw


def test_abstract_cut_somewhere_else():
  full = dataclasses.replace(tiny_transformer(), num_layers=4)
  drm = tiny_rewards(full)["drm"]
  assert denoiser.abstract(full, {"drm": drm}).tail is None
  cut = denoiser.abstract(full, {"drm": drm}, depth=3)
  assert cut.prefix_config.num_layers == 3 and cut.rewards["drm"].sharing == "nothing"
  with pytest.raises(ValueError, match=r"on_generator=\['dina'\], .* are \['drm'\]"):
    denoiser.abstract(full, {"drm": drm}, on_generator=["dina"])
  with pytest.raises(ValueError, match="reward 'drm' has pooled_dim=20, the generator"):
    denoiser.abstract(dataclasses.replace(full, pooled_dim=3), {"drm": drm})


# --- an iteration ------------------------------------------------------------------


def tiny_transformer():
  return mmdit.MMDiTConfig(
    num_layers=3,
    num_heads=2,
    head_dim=8,
    dual_layers=(0,),
    context_dim=12,
    pooled_dim=20,
    pos_embed_size=6,
    pos_embed_base=6,
  )


def tiny_rewards(full):
  """By the names of the rewards in the recipes."""
  drm = conv_head.ConvHeadConfig(base_channels=4, num_groups=2, hidden=8)
  tapped = full.truncate(2, has_output=False, image_taps=(1, 2), text_taps=(2,))
  dina = qformer_head.QFormerHeadConfig(
    token_dim=full.width, width=16, num_image_taps=2, num_text_taps=1, num_heads=2
  )
  return {
    "drm": reward.RewardConfig(full.truncate(2, has_output=True), drm),
    "dina": reward.RewardConfig(tapped, dina, lora.LoRAConfig(rank=2, alpha=4)),
  }


@pytest.fixture
def presets(monkeypatch):
  full = tiny_transformer()
  monkeypatch.setitem(build.TRANSFORMER_PRESETS, "tiny", lambda: full)
  for name, config in tiny_rewards(full).items():
    monkeypatch.setitem(build.REWARD_PRESETS, f"tiny_{name}", lambda c=config: c)


@pytest.fixture
def target():
  """8 fake chips, whose compiler is the CPU's."""
  chip = aot.Chip(2**30 + aot.RESERVE, peak_flops=1.0, memory_rate=1.0, link_rate=1.0)
  return aot.Target("fake:8", "tpu", jax.devices()[:8], chip, {})


def tiny(recipe):
  """A full-size recipe with its sizes made small; none of its folders exist."""
  c = runs.config_of(f"sd35m_{recipe}")
  c.aot.generator = "tiny"
  c.aot.rewards = {name: f"tiny_{name}" for name in c.aot.rewards}
  c.aot.prompts_per_device = 2
  c.model.dtype = "float32"
  c.lora.update(rank=2, alpha=4)
  c.prompts.t5_length = 3
  c.rollout.update(height=64, width=64, num_steps=4)
  c.train.update(micro_batches=1)
  if recipe == "refl":
    c.loss.window = (2, 4)
  else:
    c.group.group_size = 4
  return c


def per_pass(config):
  full = tiny_transformer()
  return flops.mmdit(full, flops.image_tokens(full, 8, 8), 77 + 3)


@pytest.mark.parametrize("recipe", ["step_grpo", "flow_grpo"])
def test_both_programs_of_an_iteration(presets, target, recipe):
  config = tiny(recipe)
  reports = dict(train_align.aot_reports(config, target, recipe))
  assert config.train.prompts == 48  # the caller's is left alone
  collect, update = reports["collect"], reports["update"]
  assert list(reports) == ["collect", "update"] and collect.fits and update.fits
  assert update.settings["train.prompts"] == 16
  rows = json.loads(json.dumps([report.to_dict() for report in reports.values()]))
  cells = [line.split(" | ") for line in benchmark.alignment_table(rows).splitlines()]
  assert {len(line) for line in (cells[0], *cells[2:])} == {12}
  assert [line[3] for line in cells[2:]] == ["64 (8)", "32 (4)"]

  # What one hands to the other: 8 samples on each chip, with their trajectories.
  samples, latent = 8, 8 * 8 * 16 * 4
  k = config.group.candidates if recipe == "step_grpo" else 1
  trajectory = samples * 4 * (1 + k) * latent
  contexts = 2 * samples * 80 * 16 * 4  # conditional and not, of width 16
  assert trajectory + contexts < collect.memory.outputs
  assert collect.memory.outputs < 1.1 * (trajectory + contexts + samples * latent)
  # The state is donated; frozen weights and the experience are arguments.
  handed = collect.memory.outputs - samples * latent  # x0 and scores are not read
  assert handed < update.memory.arguments
  assert 0 < update.memory.aliased <= update.memory.outputs
  assert "all-reduce" in update.program.collective_bytes

  # Two updates make an iteration.
  mesh = sharding.make_mesh(devices=target.devices)
  config.train.prompts, config.eval.prompts = 16, 8
  model = train_align.abstract_denoiser(config, scan_blocks=True, attention_impl="xla")
  programs, _ = train_align.abstract_run(config, mesh, model)
  total = 8 * (collect.model_flops + 2 * update.model_flops)
  assert total == pytest.approx(programs.cost * per_pass(config))


def test_nothing_that_is_collected_is_copied_to_all(presets, target):
  """By the compiler's own account, where nothing tells it the outputs' places."""
  config = tiny("step_grpo")
  config.train.prompts, config.eval.prompts = 16, 8
  mesh = sharding.make_mesh(devices=target.devices)
  model = train_align.abstract_denoiser(config, scan_blocks=True, attention_impl="xla")
  programs, compiled = train_align.abstract_run(config, mesh, model)
  function, args = compiled["collect"]
  with jax.set_mesh(mesh):
    free = jax.jit(function.__wrapped__).lower(*args).compile()
    made = jax.eval_shape(function, *args)[0]
  places = free.output_shardings[0]
  for name in ("x0", "signal", "inputs", "experience"):
    leaves = jax.tree.leaves_with_path(getattr(made, name))
    of_leaves = jax.tree.leaves(getattr(places, name))
    for (path, leaf), place in zip(leaves, of_leaves, strict=True):
      share = np.prod(place.shard_shape(leaf.shape)) / np.prod(leaf.shape)
      everywhere = ".at." in jax.tree_util.keystr(path)  # the schedule
      assert share == (1 if everywhere else 1 / 8), (name, path, leaf.shape, place)


def test_refl_is_one_program(presets, target):
  config = tiny("refl")
  config.real.update(weight=0.5, batch_size=16)
  reports = dict(train_align.aot_reports(config, target, "refl"))
  assert list(reports) == ["update"] and reports["update"].fits
  assert reports["update"].settings["group.group_size"] == 1


def test_what_does_not_fit_is_told_what_to_change(presets, target):
  chip = dataclasses.replace(target.chip, memory=aot.RESERVE + 1)
  small = dataclasses.replace(target, chip=chip)
  reports = dict(train_align.aot_reports(tiny("step_grpo"), small, "step_grpo"))
  assert not any(report.fits for report in reports.values())
  keys = {
    name: [text.split(":")[0] for text in report.advice]
    for name, report in reports.items()
  }
  assert keys["collect"] == [
    "train.rollout_parts",
    "group.chunk",
    "mesh.fsdp",
    "train.prompts",
  ]
  assert keys["update"] == [
    "model.remat",
    "train.micro_batches",
    "mesh.fsdp",
    "train.prompts",
  ]


def test_unknown_presets(presets, target):
  config = tiny("step_grpo")
  config.aot.rewards = {"drm": "drm_3b"}
  with pytest.raises(ValueError, match="aot.rewards.drm='drm_3b': use one of .*drm_2b"):
    next(train_align.aot_reports(config, target, "step_grpo"))
  config.aot.rewards = {"other": "tiny_drm"}
  with pytest.raises(ValueError, match=r"aot.rewards are \['other'\], but .*\['drm'\]"):
    next(train_align.aot_reports(config, target, "step_grpo"))
  config = tiny("step_grpo")
  config.aot.generator = "sd4"
  with pytest.raises(ValueError, match="aot.generator='sd4': use one of"):
    next(train_align.aot_reports(config, target, "step_grpo"))


@pytest.mark.parametrize("recipe", ["step_grpo", "flow_grpo", "lpo", "refl"])
def test_recipes_name_presets(recipe):
  config = runs.config_of(f"sd35m_{recipe}")
  made = train_align.abstract_denoiser(config, scan_blocks=True, attention_impl="xla")
  assert list(made.rewards) == list(config.rewards)
  want = {"drm": "nothing", "dina": "weights"}
  assert {n: part.sharing for n, part in made.rewards.items()} == {
    name: want[name] for name in config.rewards
  }


def test_the_command():
  """In a process of its own: its flags are defined where it is the main one."""
  script = runs.ROOT / "train" / "align.py"
  config = runs.ROOT / "configs" / "sd35m_step_grpo.py"
  run = subprocess.run(
    [sys.executable, str(script), f"--config={config}", "--aot=h100"],
    env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 1
  assert run.stderr.startswith("error: no target 'h100'"), run.stderr[-2000:]
