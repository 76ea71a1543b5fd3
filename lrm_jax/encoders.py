"""Into and out of latent space: prompts to `Cond`, images to latents and back.

Axes: b batch, H W pixels, h w c latent, l tokens, d context width, e pooled width.
"""

from collections.abc import Mapping, Sequence
import functools
import hashlib
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax import build, text, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import features, vae


def encode_image(graphdef, config, params, image, key, ids):
  """Scaled latents of images; a draw from the posterior with a key, else its mean.

  Args:
    graphdef, config, params: of a `vae.VAE` (`build.load_vae`).
    image: (b H W 3) floats in [-1, 1].
    key: None, or the key that each image's draw is folded from with its id.
    ids: (b) integers.

  Returns: (b h w c) float32, as the model takes them: shifted and scaled.
  """
  z, logvar = nnx.merge(graphdef, params).encode(image)
  if key is not None:

    def draw(mean, logvar, i):
      return vae.sample(mean[None], logvar[None], jax.random.fold_in(key, i))[0]

    z = jax.vmap(draw)(z, logvar, ids)
  return vae.scale_latents(z, config)


def decode_latents(graphdef, config, params, latents):
  """Images (b H W 3) uint8 of scaled latents (b h w c); what is not finite is black.

  Args:
    graphdef, config, params: of a `vae.VAE` (`build.load_vae`).
  """
  image = nnx.merge(graphdef, params).decode(vae.unscale_latents(latents, config))
  values = jnp.nan_to_num(jnp.clip(image, -1, 1) * 127.5 + 127.5)
  return jnp.round(values).astype(jnp.uint8)


def _encode(graphdefs, t5_shape, dtype, params, ids):
  out = {
    name: nnx.merge(graphdef, params[name])(ids[name])
    for name, graphdef in graphdefs.items()
  }
  if "t5" not in out:
    out["t5"] = text.no_t5(ids["clip_l"].shape[0], *t5_shape, dtype)
  return text.embed(out["clip_l"], out["clip_g"], out["t5"])


class TextEncoder:
  """CLIP-L, CLIP-G and, where the folder has one, T5, with their tokenizers.

  Attributes:
    params: on the devices, as `sharding` places them.
    encode: jitted `(params, ids) -> features.Cond`; float32 encoders want
      `jax.default_matmul_precision("highest")` around it.
    context_shape: (l, d) of one prompt's context.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    t5_length: int,
    context_dim: int,
    dtype: str = "float32",
    sharding: Any = None,
  ):
    """Loads the encoders.

    Args:
      t5_length: tokens of T5, 1 to 512; without a T5 in the folder, zeros so many.
      context_dim: width of the transformer's context.
      dtype: `float32` or `bfloat16`, of parameters and results.
      sharding: of the parameters; None: the default device.

    Raises:
      FolderError: the folder has no text encoders or no tokenizers.
    """
    jax_dtype = build.dtype(dtype)
    models = {
      name: build.load_clip(folder, name, dtype=jax_dtype)
      for name in ("clip_l", "clip_g")
    }
    has_t5 = folder_lib.has(folder, "t5")
    if has_t5:
      models["t5"] = build.load_t5(folder, dtype=jax_dtype)
    self._tokenizer_folder = build.tokenizer_folder(folder)
    self._tokenizers = text.Tokenizers.load(self._tokenizer_folder, with_t5=has_t5)
    self._t5_length = t5_length
    self.context_shape = (text.CLIP_LENGTH + t5_length, context_dim)
    self.params = build.to_device(
      {name: model.params for name, model in models.items()}, sharding
    )
    self.encode = jax.jit(
      functools.partial(
        _encode,
        {name: model.graphdef for name, model in models.items()},
        (t5_length, context_dim),
        jax_dtype,
      )
    )

  def tokenize(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids of each encoder, (b, its length) int32; see `text.Tokenizers`."""
    return self._tokenizers.tokenize(prompts, self._t5_length)

  def __call__(self, ids: Mapping[str, Any]) -> features.Cond:
    """What the transformer is conditioned on: context (b l d), pooled (b e)."""
    return self.encode(self.params, dict(ids))

  def fingerprint(self) -> str:
    """A text that encoders of other values, dtype or tokenizers do not share.

    Reads all parameters, which takes some ten seconds at full size.
    """
    digest = hashlib.sha256(weights.digest(self.params).encode())
    for path in sorted(self._tokenizer_folder.glob("tokenizer*/*")):
      digest.update(f"{path.parent.name}/{path.name}".encode())
      digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"
