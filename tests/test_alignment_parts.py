"""Parts of alignment with answers by hand: costs, late rewards, evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import alignment, denoiser, flow, policy, sample, scorer
from lrm_jax.align import experience
from lrm_jax.models import features, lora
from tests.generating import Folders

LATENT = (4, 4, 16)
SCHEDULE = sample.make_schedule(flow.sampling_sigmas(4, 3.0))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """A policy on the tiny SD3.5, of 6 blocks, with a reward on the first 2."""
  folders = Folders(tmp_path_factory.mktemp("parts"))
  model = denoiser.load(folders.sd35, {"head": folders.head})
  made = policy.make(model, lora.LoRAConfig(2, 4, lora.JOINT_ATTENTION))
  levels = {"head": scorer.Level.of(folders.head, model.rewards["head"].scoring)}
  return made, levels


# --- what an iteration costs -------------------------------------------------------

GUIDED, THIRD = 2, 1 / 3
STEP = alignment.Recipe("step_grpo", {"head": 1.0}, candidates=4, kl_coef=0.01)


@pytest.mark.parametrize(
  "recipe, scale, collect, update",
  [
    # A rollout of 4 guided steps; 4 candidates scored behind 3 of them. Training on 3
    # steps twice: 3 passes with gradients and one of the reference, guided.
    (STEP, 4.5, 4 * GUIDED + 3 * 4 * THIRD, 2 * 3 * 4 * GUIDED),
    (STEP, 1.0, 4 + 3 * 4 * THIRD, 2 * 3 * 4),
    (dataclasses.replace(STEP, kl_coef=0.0), 1.0, 4 + 3 * 4 * THIRD, 2 * 3 * 3),
    (dataclasses.replace(STEP, method="lpo", kl_coef=0.0), 1.0, 8, 2 * 3 * 4),
    # Finished samples are scored once.
    (dataclasses.replace(STEP, method="flow_grpo"), 4.5, 8 + THIRD, 48),
    # A reward of pixels costs no pass.
    (alignment.Recipe("flow_grpo", {}, {"hps": 1.0}), 4.5, 8, 48),
  ],
)
def test_passes(loaded, recipe, scale, collect, update):
  schedule = dataclasses.replace(SCHEDULE, explore=np.array([True] * 3 + [False]))
  found = alignment.passes(
    loaded[0],
    recipe,
    schedule,
    num_trained=3,
    inner_epochs=2,
    guidance_scale=scale,
  )
  assert found == pytest.approx({"collect": collect, "update": update})


@pytest.mark.parametrize("scale, steps", [(1.0, 2.5), (4.5, 5.0)])
def test_passes_of_refl(loaded, scale, steps):
  """2 or 3 steps before the one with gradients, and the reward behind it."""
  found = alignment.passes(
    loaded[0],
    None,
    SCHEDULE,
    num_trained=3,
    inner_epochs=1,
    guidance_scale=scale,
    refl=("head", (2, 4)),
  )
  assert found == pytest.approx({"update": steps + 3 * (1 + THIRD)})


# --- rewards of finished samples, given later --------------------------------------


def collected(chosen, k: int) -> alignment.Collected:
  """Of so many steps and samples, with a signal of 10 everywhere."""
  chosen = jnp.asarray(chosen, jnp.int32)
  steps, b = chosen.shape
  made = experience.Experience(
    at=sample.make_schedule(flow.sampling_sigmas(steps, 3.0)),
    x=jnp.zeros((steps, b, 1, 1, 1)),
    x_next=jnp.zeros((steps, b, k, 1, 1, 1)),
    log_prob=jnp.zeros((steps, b, k)),
    chosen=chosen,
    scores={},
  )
  return alignment.Collected(
    x0=jnp.zeros((b, 1, 1, 1)),
    final={},
    experience=made,
    signal=jnp.full((steps, b, k), 10.0),
    inputs=(),
  )


def test_finished_scores_go_to_the_transitions_that_led_to_them():
  recipe = dataclasses.replace(STEP, finished={"hps": 2.0}, group_size=2)
  chosen = [[0, 1, 2, 0], [2, 2, 1, 0]]
  made, metrics = alignment.with_finished(
    recipe, collected(chosen, 3), {"hps": jnp.array([1.0, 3.0, 5.0, 5.0])}
  )
  # The first prompt's are -1 and 1 (less by the 1e-4 of the deviation); the second's
  # scores are equal.
  advantages = 2 * np.array([-1, 1, 0, 0])
  want = np.full((2, 4, 3), 10.0)
  for step, row in enumerate(chosen):
    for i, carried in enumerate(row):
      want[step, i, carried] += advantages[i]
  np.testing.assert_allclose(made.signal, want, atol=3e-4)
  assert metrics == {"collect/zero_std_finished": 0.5}


def test_finished_scores_are_normalised_before_they_are_added():
  recipe = alignment.Recipe(
    "flow_grpo", {}, {"one": 1.0, "two": -0.5, "three": 0.0}, group_size=2
  )
  scores = {
    "one": jnp.array([0.0, 1e4, 2.0, 1.0]),
    "two": jnp.array([3.0, 5.0, jnp.nan, 1.0]),
    "three": jnp.array([0.0, 9.0, 0.0, 9.0]),
  }
  made, _ = alignment.with_finished(recipe, collected(np.zeros((3, 4)), 1), scores)
  # One of a group with a score that is not finite is alone: it gets none.
  want = 10 + np.array([-1 + 0.5, 1 - 0.5, 1, -1])
  np.testing.assert_allclose(
    made.signal, np.broadcast_to(want[None, :, None], (3, 4, 1)), atol=3e-4
  )


# --- evaluation --------------------------------------------------------------------


def test_diversity():
  same = jnp.broadcast_to(jnp.arange(48.0).reshape(1, 1, 4, 4, 3), (2, 3, 4, 4, 3))
  np.testing.assert_array_equal(alignment._distance(same), [0, 0])
  # Two samples that differ by 3 in half of their values.
  two = jnp.zeros((1, 2, 4, 4, 2)).at[0, 1, ..., 0].set(3)
  np.testing.assert_allclose(alignment._distance(two), np.sqrt(9 / 2), rtol=1e-6)
  # Three: the mean over the pairs, of which there are as many as samples.
  x = np.random.default_rng(0).normal(size=(4, 3, 4, 4, 2))
  pairs = [(x[:, i] - x[:, j]) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))]
  want = np.sqrt(np.mean(pairs, axis=(0, 2, 3, 4)))
  found = alignment._distance(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, want, rtol=1e-5)


def test_evaluations_can_be_compared(loaded):
  made, levels = loaded
  evaluate = jax.jit(
    alignment.make_evaluate(made, levels, LATENT, num=3, guidance_scale=1.0)
  )
  config, draw = made.denoiser.config, np.random.default_rng(0).normal
  cond, uncond = (
    features.Cond(
      draw(size=(n, 5, config.context_dim)).astype(np.float32),
      draw(size=(n, config.pooled_dim)).astype(np.float32),
    )
    for n in (2, 1)
  )
  prompts = alignment.Prompts(cond, uncond)
  adapters = made.init(jax.random.key(0))

  def run(adapters, key):
    params = jax.tree.map(jnp.asarray, made.denoiser.params)
    return evaluate(params, adapters, prompts, SCHEDULE, jax.random.key(key))

  x0, scores, distance = run(adapters, 7)
  assert x0.shape == (6, *LATENT) and scores["head"].shape == (6,)
  assert distance.shape == (2,) and np.all(distance > 0.1)
  samples = x0.reshape(2, 3, *LATENT)
  np.testing.assert_allclose(distance, alignment._distance(samples), rtol=1e-6)
  again = run(adapters, 7)
  jax.tree.map(np.testing.assert_array_equal, again, (x0, scores, distance))
  assert np.abs(run(adapters, 8)[0] - x0).max() > 0.1
  other = {path: leaf + 0.02 for path, leaf in adapters.items()}
  moved = run(other, 7)[0]
  # The same noise: it is the adapters that move a sample, and not far.
  assert 1e-3 < np.abs(moved - x0).mean() < 0.5 * np.mean(distance)
  assert evaluate._cache_size() == 1


def test_one_sample_has_no_diversity(loaded):
  with pytest.raises(ValueError, match=r"1 sample\(s\) of a prompt have no diversity"):
    alignment.make_evaluate(*loaded, LATENT, num=1, guidance_scale=1.0)
