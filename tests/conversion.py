"""Shared by the conversion tests: both scripts in-process, golden files, comparisons.

Needs the `convert` extra.
"""

import contextlib
import functools
import gc
import io
import pathlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from flax import nnx
import flax_to_torch
import jax
import numpy as np
import safetensors.torch
import torch
import torch_to_flax

from lrm_jax import build, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import features
from tests import helpers

# The scripts collect garbage after each component, which takes longer the more
# objects live: what the imports made is not looked through again.
gc.freeze()

GOLDEN = helpers.GOLDEN
SD35 = GOLDEN / "dina" / "sd35"
DINA = GOLDEN / "dina" / "reward"
DRM = GOLDEN / "drm" / "model.safetensors"
FILES = {
  "transformer": "diffusion_pytorch_model.safetensors",
  "vae": "diffusion_pytorch_model.safetensors",
  "text_encoder": "model.safetensors",
  "text_encoder_2": "model.safetensors",
  "text_encoder_3": "model.safetensors",
}


def to_flax(out, *args) -> str:
  """torch_to_flax.py with --out; what it printed."""
  return _call(torch_to_flax.main, [*args, "--out", out])


def to_torch(model, fmt: str, out, *args) -> str:
  """flax_to_torch.py; what it printed."""
  return _call(
    flax_to_torch.main, ["--model", model, "--format", fmt, "--out", out, *args]
  )


def _call(main, args) -> str:
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    main([str(a) for a in args])
  return printed.getvalue()


class Golden:
  """The golden models converted once: `dina` (verified) and, on it, `drm`."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.verified = ""

  @functools.cached_property
  def dina(self) -> pathlib.Path:
    out = self.folder / "dina"
    self.verified = to_flax(out, "--sd35", SD35, "--reward", DINA, "--verify")
    return out

  @functools.cached_property
  def drm(self) -> pathlib.Path:
    to_flax(self.folder / "drm", "--base", self.dina, "--reward", DRM)
    return self.folder / "drm"


def tensors(path: pathlib.Path) -> dict[str, torch.Tensor]:
  """A state-dict file; all shards of it, where `path` names an index."""
  if path.name.endswith(".index.json"):
    files = sorted(path.parent.glob("*.safetensors"))
    return {k: v for f in files for k, v in tensors(f).items()}
  if path.suffix == ".safetensors":
    return safetensors.torch.load_file(path)
  return dict(torch.load(path, weights_only=True))


def assert_same_tensors(got: pathlib.Path, want: pathlib.Path):
  """The same keys, dtypes, shapes and bits."""
  a, b = tensors(got), tensors(want)
  assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
  for key in b:
    assert a[key].dtype == b[key].dtype, key
    assert torch.equal(a[key], b[key]), key


def leaves(folder, name: str) -> dict[str, np.ndarray]:
  """A component's parameters by path."""
  path, _ = folder_lib.find(folder, name)
  return weights.flatten(folder_lib.load_params(path))


def inputs(seed: int = 0, *, context_dim: int, pooled_dim: int) -> tuple:
  """Noisy latents (NCHW), t, context and pooled, as the torch models take them."""
  g = torch.Generator().manual_seed(seed)
  return (
    torch.randn(2, 16, 6, 8, generator=g),
    torch.tensor([100.0, 900.0]),
    torch.randn(2, 5, context_dim, generator=g),
    torch.randn(2, pooled_dim, generator=g),
  )


def as_ours(x, t, context, pooled) -> tuple:
  """The same inputs as our models take them: NHWC, sigma."""
  cond = features.Cond(context=np.asarray(context), pooled=np.asarray(pooled))
  return helpers.nhwc(x), np.asarray(t) / 1000, cond


def scorer(folder, method: str = "__call__"):
  """`args of as_ours -> (b,)` scores of a folder's reward model."""
  model, _ = build.load_reward(folder)
  run = jax.jit(lambda p, *a: getattr(nnx.merge(model.graphdef, p), method)(*a))
  return lambda args: np.asarray(run(model.params, *args))
