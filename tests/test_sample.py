"""The ODE sampler: golden latents, known answers."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import flow, sample
from lrm_jax.models import features
from tests import golden_models, helpers


@pytest.mark.parametrize("num_steps", [1, 7])
def test_exact_velocity_of_a_point_lands_on_it(num_steps):
  # All data at x0: v(x, sigma) = (x - x0) / sigma, along which Euler is exact.
  x0 = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  noise = jax.random.normal(jax.random.key(1), x0.shape)

  def velocity(inputs, x, sigma):
    return (x - inputs) / sigma[:, None, None, None]

  out = sample.euler(velocity, x0, noise, flow.sampling_sigmas(num_steps, 3.0))
  np.testing.assert_allclose(out, x0, atol=2e-5)


def test_guidance_is_one_call_and_extrapolates():
  calls = []

  def velocity(inputs, x, sigma):
    calls.append(x.shape)
    return inputs[:, None, None, None] * jnp.ones_like(x)

  guided = sample.guide(velocity, 4.5)
  x = jnp.zeros((2, 2, 2, 1))
  v = guided((jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])), x, jnp.ones(2))
  assert calls == [(4, 2, 2, 1)]
  np.testing.assert_allclose(v[:, 0, 0, 0], [0.5 + 4.5 * 0.5, 3.0 - 4.5])


def test_golden_latents_six_steps_cfg():
  expected = helpers.golden("dina/expected")
  model = golden_models.transformer()
  cond = features.Cond(expected["prompt_embeds"], expected["pooled_prompt_embeds"])
  count = len(expected["prompt_embeds"])
  uncond = features.Cond(
    np.repeat(expected["negative_prompt_embeds"], count, axis=0),
    np.repeat(expected["negative_pooled_prompt_embeds"], count, axis=0),
  )

  @jax.jit
  def run(params, inputs, noise):
    def velocity(cond, x, sigma):
      return nnx.merge(model.graphdef, params)(x, 1000.0 * sigma, cond)[0]

    sigmas = flow.sampling_sigmas(6, 3.0)
    return sample.euler(sample.guide(velocity, 4.5), inputs, noise, sigmas)

  with jax.default_matmul_precision("highest"):
    out = run(model.params, (cond, uncond), helpers.nhwc(expected["euler/init_noise"]))
  assert (
    helpers.rel_err(helpers.nchw(out), expected["euler/latents_6steps_cfg4.5"]) < 1e-4
  )
