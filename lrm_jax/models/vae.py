"""SD3's image autoencoder: 8x downsampling to 16 channels, without quant convolutions.

Axes: b batch, H W pixels, h w latent cells, c channels. Everything is NHWC and float32
by default: the decoder's activations leave bfloat16's useful range. (On a GPU float32
matmuls run as TF32 unless the caller sets `jax.default_matmul_precision`.)
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lrm_jax.models import layers

EPS = 1e-6  # of every group norm, those of the attentions included
LOGVAR_RANGE = (-30.0, 20.0)
# Queries attended at a time: 1024 px have 16384 of them, whose full matrix of
# logits would take 1 GiB per image.
QUERY_CHUNK = 4096

# What diffusers' AutoencoderKL can be configured to do and this file does not:
# key -> (the value it assumes when the key is absent, the one value supported).
_FIXED = {
  "act_fn": ("silu", "silu"),
  "use_quant_conv": (True, False),
  "use_post_quant_conv": (True, False),
  "mid_block_add_attention": (True, True),
  "latents_mean": (None, None),
  "latents_std": (None, None),
}
# sample_size only sets diffusers' tiling, force_upcast only its choice of dtype.
_WITHOUT_EFFECT = {"sample_size", "force_upcast", "down_block_types", "up_block_types"}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes of the autoencoder and the affine map to the diffusion model's latents."""

  block_out_channels: tuple[int, ...]
  layers_per_block: int
  latent_channels: int
  in_channels: int = 3
  out_channels: int = 3
  norm_num_groups: int = 32
  scaling_factor: float = 1.5305
  shift_factor: float = 0.0609

  def __post_init__(self):
    for width in self.block_out_channels:
      if width % self.norm_num_groups:
        raise ValueError(
          f"block_out_channels={self.block_out_channels}: {width} is not a multiple "
          f"of norm_num_groups={self.norm_num_groups}"
        )

  @property
  def downsampling(self) -> int:
    """Pixels per latent cell along each side."""
    return 2 ** (len(self.block_out_channels) - 1)

  @classmethod
  def sd3(cls) -> "VAEConfig":
    """The autoencoder of SD3 and SD3.5, all sizes."""
    return cls(
      block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16
    )

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "VAEConfig":
    """From the `vae/config.json` of a diffusers folder.

    Raises:
      ValueError: missing fields, unknown fields, and whatever this file does not
        implement; all in one message.
    """
    fields = [f.name for f in dataclasses.fields(cls)]
    problems = [f"{k} is missing" for k in fields if config.get(k) is None]
    for key, (default, supported) in _FIXED.items():
      if (value := config.get(key, default)) != supported:
        problems.append(f"{key}={value!r} is not supported, only {supported!r} is")
    for key, kind in (
      ("down_block_types", "DownEncoderBlock2D"),
      ("up_block_types", "UpDecoderBlock2D"),
    ):
      want = [kind] * len(config.get("block_out_channels") or ())
      if list(config.get(key, ())) != want:
        problems.append(f"{key}={config.get(key)!r} is not supported, only {want} is")
    known = {*fields, *_FIXED, *_WITHOUT_EFFECT}
    problems += [
      f"{key}={config[key]!r} is not a known field"
      for key in config
      if key not in known and not key.startswith("_")
    ]
    if problems:
      raise ValueError("VAE config: " + "; ".join(problems))
    values = {k: config[k] for k in fields}
    values["block_out_channels"] = tuple(values["block_out_channels"])
    return cls(**values)


class Conv(nnx.Module):
  """2-D convolution with bias; `kernel (height, width, c_in, c_out)`."""

  def __init__(
    self,
    c_in: int,
    c_out: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    dtype: layers.Dtype,
    param_dtype: layers.Dtype,
    rngs: nnx.Rngs,
  ):
    shape = (3, 3, c_in, c_out)
    self.kernel = nnx.Param(layers.kernel_init(rngs.params(), shape, param_dtype))
    self.bias = nnx.Param(jnp.zeros((c_out,), param_dtype))
    self.stride = (stride, stride)
    self.padding = (padding, padding)
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      self.stride,
      self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
  """Norm over space and the channels of a group; statistics in float32."""

  def __init__(self, dim: int, groups: int, *, param_dtype: layers.Dtype):
    self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
    self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))
    self.groups = groups

  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    y = x.astype(jnp.float32).reshape(b, h * w, self.groups, c // self.groups)
    y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=(1, 3), keepdims=True) + EPS)
    y = y.reshape(b, h, w, c) * self.scale[...].astype(jnp.float32)
    return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class ResBlock(nnx.Module):
  """Two norm-SiLU-convolution stages beside a shortcut."""

  def __init__(self, c_in: int, c_out: int, config: VAEConfig, **kw):
    groups, param_dtype = config.norm_num_groups, kw["param_dtype"]
    self.norm1 = GroupNorm(c_in, groups, param_dtype=param_dtype)
    self.conv1 = Conv(c_in, c_out, **kw)
    self.norm2 = GroupNorm(c_out, groups, param_dtype=param_dtype)
    self.conv2 = Conv(c_out, c_out, **kw)
    # A 1x1 convolution is a Dense on channels-last data.
    self.shortcut = None if c_in == c_out else layers.Dense(c_in, c_out, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
  """Single-head self-attention over all cells, residual, with its own norm."""

  def __init__(self, dim: int, config: VAEConfig, **kw):
    self.norm = GroupNorm(dim, config.norm_num_groups, param_dtype=kw["param_dtype"])
    self.qkv = layers.Dense(dim, 3 * dim, groups=3, **kw)
    self.out = layers.Dense(dim, dim, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    q, k, v = self.qkv.projections(self.norm(x))
    k, v = k.reshape(b, h * w, 1, c), v.reshape(b, h * w, 1, c)

    # Some rows of queries at a time; along the rows and not the batch, so that a
    # batch split over devices stays split.
    rows = math.gcd(h, max(1, QUERY_CHUNK // w))
    q = q.reshape(b, h // rows, rows * w, 1, c).swapaxes(0, 1)
    y = jax.lax.map(lambda chunk: jax.nn.dot_product_attention(chunk, k, v), q)
    y = y.swapaxes(0, 1).reshape(b, h, w, c)
    return x + self.out(y)


class Mid(nnx.Module):
  """The blocks at the lowest resolution, the same in both halves."""

  def __init__(self, dim: int, config: VAEConfig, **kw):
    self.resnets = nnx.List([ResBlock(dim, dim, config, **kw) for _ in range(2)])
    self.attn = Attention(dim, config, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.resnets[1](self.attn(self.resnets[0](x)))


class Level(nnx.Module):
  """The residual blocks of one resolution, and the convolution that leaves it.

  `resample` is the strided convolution of an encoder level, the convolution after
  the upsampling of a decoder level, and None in the last level of either.
  """

  def __init__(
    self,
    c_in: int,
    c_out: int,
    num: int,
    config: VAEConfig,
    resample: Conv | None,
    **kw,
  ):
    widths = itertools.pairwise([c_in] + [c_out] * num)
    self.resnets = nnx.List([ResBlock(a, b, config, **kw) for a, b in widths])
    self.resample = resample

  def __call__(self, x: jax.Array) -> jax.Array:
    for block in self.resnets:
      x = block(x)
    return x


class Encoder(nnx.Module):
  """(b H W in_channels) -> (b h w 2*latent_channels)."""

  def __init__(self, config: VAEConfig, **kw):
    widths = config.block_out_channels
    self.conv_in = Conv(config.in_channels, widths[0], **kw)
    levels = []
    for i, c in enumerate(widths):
      # One row of zeros below and one column to the right, none on the other sides.
      down = {"stride": 2, "padding": (0, 1)}
      resample = Conv(c, c, **down, **kw) if i < len(widths) - 1 else None
      c_in = widths[max(i - 1, 0)]
      levels.append(Level(c_in, c, config.layers_per_block, config, resample, **kw))
    self.levels = nnx.List(levels)
    self.mid = Mid(widths[-1], config, **kw)
    self.norm_out = GroupNorm(
      widths[-1], config.norm_num_groups, param_dtype=kw["param_dtype"]
    )
    self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    for level in self.levels:
      x = level(x)
      if level.resample is not None:
        x = level.resample(x)
    x = self.mid(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
  """(b h w latent_channels) -> (b H W out_channels). Level 0 is the coarsest."""

  def __init__(self, config: VAEConfig, **kw):
    widths = config.block_out_channels[::-1]
    self.conv_in = Conv(config.latent_channels, widths[0], **kw)
    self.mid = Mid(widths[0], config, **kw)
    levels = []
    for i, c in enumerate(widths):
      resample = Conv(c, c, **kw) if i < len(widths) - 1 else None
      c_in = widths[max(i - 1, 0)]
      num = config.layers_per_block + 1
      levels.append(Level(c_in, c, num, config, resample, **kw))
    self.levels = nnx.List(levels)
    self.norm_out = GroupNorm(
      widths[-1], config.norm_num_groups, param_dtype=kw["param_dtype"]
    )
    self.conv_out = Conv(widths[-1], config.out_channels, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.mid(self.conv_in(x))
    for level in self.levels:
      x = level(x)
      if level.resample is not None:
        x = level.resample(_upsample(x))
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VAE(nnx.Module):
  """The autoencoder. `encode` and `decode` know nothing of the latents' scaling."""

  def __init__(
    self,
    config: VAEConfig,
    *,
    dtype: layers.Dtype = jnp.float32,
    param_dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.encoder = Encoder(config, **kw)
    self.decoder = Decoder(config, **kw)
    self.config = config

  def encode(
    self, image: Float[Array, "b H W c"]
  ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
    """Image in [-1, 1] -> mean and log-variance of the posterior, unscaled.

    Raises:
      ValueError: sides that are not multiples of the downsampling factor.
    """
    side = self.config.downsampling
    if image.shape[1] % side or image.shape[2] % side:
      raise ValueError(
        f"image of shape {image.shape}: height {image.shape[1]} and width "
        f"{image.shape[2]} must be multiples of {side}; crop or resize it first"
      )
    mean, logvar = jnp.split(self.encoder(image), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
    """Unscaled latents -> image, nominally in [-1, 1] and not clipped."""
    return self.decoder(z)


def sample(
  mean: Float[Array, "b h w z"], logvar: Float[Array, "b h w z"], key: PRNGKeyArray
) -> Float[Array, "b h w z"]:
  """A draw from the posterior that `encode` returns."""
  return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


def scale_latents(z: Float[Array, "*dims"], config: VAEConfig) -> Float[Array, "*dims"]:
  """Autoencoder latents -> what the diffusion model is trained on."""
  return (z - config.shift_factor) * config.scaling_factor


def unscale_latents(
  x0: Float[Array, "*dims"], config: VAEConfig
) -> Float[Array, "*dims"]:
  """The inverse of `scale_latents`."""
  return x0 / config.scaling_factor + config.shift_factor


def _upsample(x: jax.Array) -> jax.Array:
  """Each cell becomes a 2 x 2 square."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
