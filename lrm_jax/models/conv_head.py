"""DRM's convolutional reward head (arXiv 2605.25661).

It reads the backbone's unpatchified output, i.e. what the pretrained final norm and
projection make of the last kept block.

Axes: b batch, H W latent pixels, C latent channels.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from lrm_jax.models import features, layers
from lrm_jax.models.layers import Dtype

NORM_EPS = 1e-5  # torch.nn.GroupNorm's default


@dataclasses.dataclass(frozen=True)
class ConvHeadConfig:
  """Architecture: three stride-2 convolutions of 1, 2, 2 x `base_channels`."""

  in_channels: int = 16
  base_channels: int = 256
  num_groups: int = 32
  hidden: int = 512
  dropout: float = 0.1

  def __post_init__(self):
    if self.base_channels % self.num_groups:
      raise ValueError(
        f"ConvHeadConfig.base_channels={self.base_channels} must be a multiple of "
        f"num_groups={self.num_groups}"
      )


class Down(nnx.Module):
  """3x3 convolution of stride 2, GroupNorm, ReLU."""

  def __init__(self, d_in: int, d_out: int, num_groups: int, *, kw: dict):
    self.conv = nnx.Conv(d_in, d_out, (3, 3), strides=2, padding=((1, 1), (1, 1)), **kw)
    # Statistics over whole feature maps: float32, without the E[x^2] - E[x]^2 shortcut.
    self.norm = nnx.GroupNorm(
      d_out,
      num_groups,
      epsilon=NORM_EPS,
      use_fast_variance=False,
      dtype=jnp.float32,
      param_dtype=kw["param_dtype"],
      rngs=kw["rngs"],
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.relu(self.norm(self.conv(x)))


class ConvHead(nnx.Module):
  """Backbone output (b H W C) -> score (b,)."""

  uses_velocity = True

  def __init__(
    self,
    config: ConvHeadConfig,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    c, g = config.base_channels, config.num_groups
    self.down = nnx.List(
      [
        Down(config.in_channels, c, g, kw=kw),
        Down(c, 2 * c, g, kw=kw),
        Down(2 * c, 2 * c, g, kw=kw),
      ]
    )
    self.up = layers.Dense(2 * c, config.hidden, **kw)
    # float32, as every score (see qformer_head).
    self.out = layers.Dense(config.hidden, 1, param_dtype=param_dtype, rngs=rngs)
    self.config = config

  def __call__(
    self,
    velocity: jax.Array | None,
    feats: features.Features,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """-> (b,) float32. `key` turns dropout on.

    Raises:
      ValueError: the backbone has no output layer.
    """
    del feats
    if velocity is None:
      raise ValueError("ConvHead reads the backbone's output: set has_output=True")
    x = velocity
    for down in self.down:
      x = down(x)
    x = jnp.mean(x, axis=(1, 2))
    x = layers.dropout(jax.nn.relu(self.up(x)), self.config.dropout, key)
    return self.out(x)[..., 0]
