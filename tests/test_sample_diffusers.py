"""Our sampler against diffusers' StableDiffusion3Pipeline, at sizes of our own choice.

Needs the `convert` extra.
"""

import dataclasses
import json
import pathlib
import shutil
import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch

from lrm_jax import build, encoders, flow, sample
from lrm_jax import folder as folder_lib
from lrm_jax.models import vae
from tests import conversion, helpers, torch_models


@dataclasses.dataclass(frozen=True)
class Case:
  """A random pipeline folder, and what is asked of it.

  Attributes:
    latent: (H, W) of the latents.
    shift: of the schedule; the released one is 3.
    has_t5: whether the folder has the third text encoder.
  """

  sizes: dict
  latent: tuple[int, int]
  shift: float = 3.0
  has_t5: bool = True
  t5_length: int = 16


CASES = {
  "wide": Case(
    sizes=dict(seed=11, layers=2, heads=3, head_dim=8, dual=(0,), joint_dim=40),
    latent=(4, 6),
  ),
  "deep": Case(
    sizes=dict(
      seed=12,
      layers=5,
      heads=2,
      head_dim=12,
      dual=(0, 2),
      joint_dim=28,
      clip_widths=(8, 12),
      clip_projections=(8, 12),
      vae_channels=(4, 8, 8),
      vae_layers=2,
    ),
    latent=(8, 2),
    shift=1.5,
    has_t5=False,
    t5_length=5,
  ),
  "single": Case(  # no dual attention, as in SD3.5 Large
    sizes=dict(
      seed=13, layers=3, head_dim=16, dual=(), pos_embed_max_size=6, text_layers=1
    ),
    latent=(12, 10),
    t5_length=32,
  ),
}
PROMPTS = [
  "a photo of a cat",
  "two dogs playing chess, studio light, 35mm, and much that is cut off " * 4,
  "x",
]
NEGATIVE = ["blurry, low quality", "", "a girl walking in the street"]
GUIDANCE = (1.0, 2.5, 7.0)


def write_pipeline(path: pathlib.Path, case: Case) -> pathlib.Path:
  """The case's folder."""
  torch_models.make_sd35_folder(path, **case.sizes)
  file = path / "scheduler" / "scheduler_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": case.shift}))
  if not case.has_t5:
    shutil.rmtree(path / "text_encoder_3")
    shutil.rmtree(path / "tokenizer_3")
    file = path / "model_index.json"
    without = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    file.write_text(json.dumps(json.loads(file.read_text()) | without))
  return path


class Both:
  """A folder loaded twice: by diffusers, and converted for us."""

  def __init__(self, case: Case, root: pathlib.Path):
    self.case = case
    sd35 = write_pipeline(root / "sd35", case)
    missing = {} if case.has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    self.pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd35, **missing)
    self.pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(1)
    self.noise = torch.randn(len(PROMPTS), 16, *case.latent, generator=g)

    folder = root / "flax"
    conversion.to_flax(folder, "--sd35", sd35)
    self.shift = folder_lib.find(folder, "scheduler")[1]["shift"]
    self.transformer = build.load_transformer(folder)
    self.vae = build.load_vae(folder)
    encoder = encoders.TextEncoder(
      folder,
      t5_length=case.t5_length,
      context_dim=self.transformer.config.context_dim,
    )
    with warnings.catch_warnings():  # prompts too long, on purpose
      warnings.simplefilter("ignore", UserWarning)
      self.inputs = tuple(encoder(encoder.tokenize(p)) for p in (PROMPTS, NEGATIVE))
    self.run = jax.jit(self._rollout)
    self._decode = jax.jit(
      lambda params, z: nnx.merge(self.vae.graphdef, params).decode(z)
    )

  def theirs(self, num_steps: int, guidance_scale: float, output_type: str):
    """Latents NCHW or images (b height width 3) in [0, 1]."""
    scale = self.pipe.vae_scale_factor
    height, width = (scale * n for n in self.case.latent)
    out = self.pipe(
      PROMPTS,
      negative_prompt=NEGATIVE,
      height=height,
      width=width,
      num_inference_steps=num_steps,
      guidance_scale=guidance_scale,
      max_sequence_length=self.case.t5_length,
      latents=self.noise.clone(),
      output_type=output_type,
    )
    return np.asarray(out.images)

  def _rollout(self, params, inputs, noise, schedule, guidance_scale):
    def velocity(cond, x, sigma):
      return nnx.merge(self.transformer.graphdef, params)(x, 1000.0 * sigma, cond)[0]

    guided = sample.guide(velocity, guidance_scale)
    euler = sample.find_sampler("euler")
    return sample.rollout(guided, inputs, noise, schedule, sampler=euler)[0]

  def ours(self, num_steps: int, guidance_scale: float) -> jax.Array:
    """Latents NHWC."""
    schedule = sample.make_schedule(flow.sampling_sigmas(num_steps, self.shift))
    noise = jnp.asarray(helpers.nhwc(self.noise))
    return self.run(
      self.transformer.params, self.inputs, noise, schedule, guidance_scale
    )

  def decode(self, x: jax.Array) -> jax.Array:
    """Images (b height width 3) in [0, 1]."""
    z = vae.unscale_latents(x, self.vae.config)
    return jnp.clip((self._decode(self.vae.params, z) + 1) / 2, 0, 1)


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
  return Both(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_latents_of_the_pipeline(both, num_steps):
  got, compiled = {}, both.run._cache_size()
  for guidance_scale in GUIDANCE:
    got[guidance_scale] = helpers.nchw(both.ours(num_steps, guidance_scale))
    want = both.theirs(num_steps, guidance_scale, "latent")
    assert helpers.rel_err(got[guidance_scale], want) < 1e-4, guidance_scale
  # The prompts matter, and so does the scale.
  assert helpers.rel_err(got[7.0], got[1.0]) > 1e-2
  assert both.run._cache_size() <= compiled + 1  # once for all scales


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_images_of_the_pipeline(both, guidance_scale):
  want = both.theirs(3, guidance_scale, "np")
  images = both.decode(both.ours(3, guidance_scale))
  assert want.min() < want.max() and np.mean((want > 0) & (want < 1)) > 0.2
  assert helpers.rel_err(images, want) < 1e-4


def test_the_cases_differ(both):
  """What the cases are there for is there."""
  config, case = both.transformer.config, both.case
  assert config.num_layers == case.sizes["layers"]
  assert both.pipe.scheduler.config.shift == both.shift == case.shift
  assert (both.pipe.text_encoder_3 is not None) == case.has_t5
  assert both.inputs[0].context.shape[1] == 77 + case.t5_length
