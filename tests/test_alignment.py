"""Programs of alignment on a tiny SD3.5: first updates, devices, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import (
  alignment,
  build,
  denoiser,
  flow,
  optim,
  policy,
  sample,
  scorer,
  sharding,
  train_state,
)
from lrm_jax import folder as folder_lib
from lrm_jax.models import features, lora
from tests.generating import Folders

LATENT = (4, 4, 16)
NUM_PROMPTS = 8
SCHEDULE = sample.make_schedule(flow.sampling_sigmas(4, 3.0))
STEPS = jnp.arange(3)  # not the last one, as Flow-GRPO
STEP_GRPO = alignment.Recipe(
  "step_grpo",
  {"head": 1.0},
  group_size=1,
  candidates=4,
  clip_range=1e-3,
  kl_coef=0.01,
)
FLOW_GRPO = dataclasses.replace(STEP_GRPO, method="flow_grpo", group_size=2)
LPO = dataclasses.replace(STEP_GRPO, method="lpo", threshold=(0.0, 0.0), beta=50.0)
RECIPES = {"step": STEP_GRPO, "flow": FLOW_GRPO, "lpo": LPO}


class Run:
  """A policy and its optimizer, on the devices of a mesh."""

  def __init__(self, folders: Folders, num_devices: int):
    self.mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    everywhere = sharding.replicated(self.mesh)
    model = denoiser.load(folders.sd35, {"head": folders.head})
    self.model = model.to_device(everywhere)
    config = lora.LoRAConfig(4, 8, lora.JOINT_ATTENTION)
    self.policy = policy.make(self.model, config)
    entry = folder_lib.find(folders.head, "reward")[1]
    scoring = build.config_from_dict(entry["scoring"])
    self.levels = {"head": scorer.Level.of(folders.head, scoring)}
    self.tx = optim.make_tx(lambda step: 3e-3, weight_decay=0.0, clip_norm=1.0)
    dims = self.model.config
    shapes = (7, dims.context_dim), (dims.pooled_dim,)
    draw = np.random.default_rng(0).normal
    cond, uncond = (
      features.Cond(*(draw(size=(n, *shape)).astype(np.float32) for shape in shapes))
      for n in (NUM_PROMPTS, 1)
    )
    split = sharding.batch_sharding(self.mesh)
    self.prompts = alignment.Prompts(
      jax.device_put(cond, split), jax.device_put(uncond, everywhere)
    )
    self._programs: dict = {}

  def start(self, *, use_ema: bool = True) -> train_state.TrainState:
    adapters = self.policy.init(jax.random.key(0))
    state = train_state.create(adapters, self.tx, use_ema=use_ema)
    return jax.device_put(state, sharding.replicated(self.mesh))

  def programs(self, name: str, micro_batches: int = 1):
    """(collect, update), compiled once."""
    recipe = dataclasses.replace(RECIPES[name], micro_batches=micro_batches)
    if name not in self._programs:
      collect = alignment.make_collect(self.policy, recipe, self.levels, LATENT)
      self._programs[name] = jax.jit(collect)
    if (name, micro_batches) not in self._programs:
      update = alignment.make_update(self.policy, recipe, self.tx, ema_decay=0.9)
      self._programs[name, micro_batches] = jax.jit(update, donate_argnums=0)
    return self._programs[name], self._programs[name, micro_batches]

  def iterate(self, name, state, key, **kw):
    collect, update = self.programs(name, **kw)
    with jax.set_mesh(self.mesh):
      params = self.model.params
      made, collected = collect(params, state.params, self.prompts, SCHEDULE, key)
      state, updated = update(state, params, made, STEPS)
    return state, made, {**collected, **updated}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return Folders(tmp_path_factory.mktemp("alignment"))


@pytest.fixture(scope="module")
def one(folders):
  return Run(folders, 1)


@pytest.mark.parametrize("name", ["step", "flow"])
def test_first_update(one, name):
  state, made, metrics = one.iterate(name, one.start(), jax.random.key(1))
  samples = NUM_PROMPTS * (2 if name == "flow" else 1)
  k = 1 if name == "flow" else 4
  assert made.signal.shape == (4, samples, k)
  assert made.x0.shape == (samples, *LATENT)
  assert abs(metrics["train/ratio"] - 1) < 1e-5 and metrics["train/clip_frac"] == 0
  assert metrics["train/kl"] < 1e-9 and metrics["collect/zero_std"] == 0
  assert metrics["train/grad_norm"] > 0
  moved = [np.abs(a).max() for p, a in state.params.items() if p.endswith("lora_b")]
  assert min(moved) > 0 and state.step == 1
  # The average has seen one update of a tenth of the step.
  path = next(p for p in state.params if p.endswith("lora_b"))
  np.testing.assert_allclose(state.ema[path], 0.1 * state.params[path], rtol=1e-4)


def test_finished_samples_are_scored_as_published(one, folders):
  _, made, metrics = one.iterate("step", one.start(), jax.random.key(1))
  entry = scorer.Scorer.load(folders.head)
  keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(2)]
  for i, key in enumerate(keys):
    cond = jax.tree.map(lambda a, i=i: a[i : i + 1], one.prompts.cond)
    want = entry.score(np.asarray(made.x0[i : i + 1]), cond, key=key, indices=[0])
    np.testing.assert_allclose(made.final["head"][i], want[0], rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(metrics["reward/head"], made.final["head"].mean())


def test_micro_batches_change_nothing(one):
  whole, _, a = one.iterate("step", one.start(), jax.random.key(1))
  parts, _, b = one.iterate("step", one.start(), jax.random.key(1), micro_batches=4)
  np.testing.assert_allclose(a["train/grad_norm"], b["train/grad_norm"], rtol=1e-4)
  for path, leaf in whole.params.items():
    np.testing.assert_allclose(leaf, parts.params[path], atol=2e-4)
  with pytest.raises(
    ValueError, match="8 samples do not make 1 minibatches of 3 equal"
  ):
    one.iterate("step", one.start(), jax.random.key(1), micro_batches=3)


@pytest.mark.parametrize("name", ["step", "flow"])
def test_rollouts_in_parts_change_nothing(one, name):
  args = one.model.params, one.start().params, one.prompts, SCHEDULE, jax.random.key(1)

  def collect(parts):
    recipe = dataclasses.replace(RECIPES[name], rollout_parts=parts)
    made = alignment.make_collect(one.policy, recipe, one.levels, LATENT)
    return jax.jit(made)(*args)

  with jax.set_mesh(one.mesh):
    whole, parts = one.programs(name)[0](*args), collect(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), whole, parts)
    with pytest.raises(ValueError, match="samples do not make 3 equal parts"):
      collect(3)


def test_eight_devices_learn_what_one_does(one, folders):
  eight = Run(folders, 8)
  states, curves = [], []
  for run in (one, eight):
    state, curve = run.start(), []
    for i in range(2):
      state, _, metrics = run.iterate("step", state, jax.random.key(i))
      curve.append(float(metrics["reward/head"]))
    states.append(state)
    curves.append(curve)
  np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)
  for path, leaf in states[0].params.items():
    np.testing.assert_allclose(leaf, states[1].params[path], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "flow", "lpo"])
def test_updates_raise_the_reward(one, name):
  state = one.start()
  _, _, before = one.iterate(name, one.start(), jax.random.key(99))
  for i in range(12):
    state, _, metrics = one.iterate(name, state, jax.random.key(i))
    assert all(np.isfinite(value) for value in metrics.values()), metrics
  _, _, after = one.iterate(name, state, jax.random.key(99))
  assert after["reward/head"] > before["reward/head"] + 0.01, (before, after)


@pytest.mark.slow
def test_refl_raises_the_reward(one):
  update = jax.jit(
    alignment.make_refl_update(
      one.policy,
      "head",
      one.levels["head"],
      one.tx,
      LATENT,
      guidance_scale=4.5,
      window=(2, 4),
      target=2.0,
      ema_decay=None,
    )
  )
  state, rewards = one.start(use_ema=False), []
  with jax.set_mesh(one.mesh):
    for i in range(10):
      key = jax.random.key(i % 2)
      state, metrics = update(state, one.model.params, one.prompts, SCHEDULE, key)
      rewards.append(float(metrics["train/reward"]))
  assert rewards[-2] > rewards[0] and rewards[-1] > rewards[1], rewards
  assert update._cache_size() == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(method="ppo"), "method='ppo': use one of step_grpo, flow_grpo, lpo"),
    (dict(weights={"head": 0.0}), "optimise nothing"),
    (dict(candidates=1), "candidates=1: step_grpo compares them"),
    (dict(method="flow_grpo", group_size=1), "group_size=1"),
    (dict(sampler="euler"), "sampler='euler' has no log-probabilities"),
    (dict(sampler="sd"), "sampler 'sd'"),
    (dict(micro_batches=0), "micro_batches=0"),
    (dict(minibatches=0), "minibatches=0"),
    (dict(global_std=True), "step_grpo compares no finished samples"),
    (dict(finished={"hps": 1.0}), "group_size=1: step_grpo compares finished"),
    (dict(method="lpo", group_size=2, finished={"hps": 1.0}), "cannot learn from"),
  ],
)
def test_impossible_recipes(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(STEP_GRPO, **change)


def test_rewards_that_are_not_there(one):
  recipe = dataclasses.replace(STEP_GRPO, weights={"hps": 1.0})
  with pytest.raises(ValueError, match=r"weights of \['hps'\], but the rewards are"):
    alignment.make_collect(one.policy, recipe, one.levels, LATENT)
