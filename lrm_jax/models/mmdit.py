"""SD3.5's transformer (MMDiT-X): Medium with dual attention, and Large.

Two streams, image tokens x and text tokens c, meet in one joint attention per block
(Esser et al. 2024, fig. 2); the first blocks of Medium add an image-only attention.
As a reward backbone the model keeps its first N blocks and returns the tokens of
chosen blocks ("taps").

Axes: b batch, H W latent pixels, h w patches (the grid), n = h w image tokens,
l text tokens, d width, p patch, C latent channels. Latents are NHWC.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax.models import attention, features, layers
from lrm_jax.models.layers import Dtype

NORM_EPS = 1e-6  # layer norms and query/key norms, as in the original
TIME_DIM = 256  # width of the sinusoidal timestep embedding
OUTPUT = ("out", "out_modulation")  # the parameters of the output layer

# What the backward pass recomputes of each block: nothing, all but attention (a
# quarter of a block's time and few bytes), everything.
REMATS = {
  "none": None,
  "attention": functools.partial(jax.checkpoint, policy=attention.save_attention),
  "full": jax.checkpoint,
}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
  """Architecture. Widths in channels, counts in blocks.

  Attributes:
    num_layers: blocks that are built (fewer than published in a truncated backbone).
    num_heads, head_dim: attention heads; the width d is their product.
    dual_layers: indices of blocks with a second, image-only self-attention.
    last_context_pre_only: the last block does not update the text stream (true for
      the full model, whose text tokens nobody reads after it).
    has_output: final norm and projection to a velocity exist.
    patch_size, in_channels, out_channels: of the latent.
    context_dim, pooled_dim: of the prompt embeddings.
    pos_embed_size: side of the position table, in patches; the crop for a latent is
      taken from its centre.
    pos_embed_base: side for which the sincos frequencies are laid out (only read
      when parameters are initialised; a checkpoint brings its own table).
    image_taps, text_taps: after how many blocks each stream's tokens are returned;
      0 is the embeddings.
  """

  num_layers: int
  num_heads: int
  head_dim: int
  dual_layers: tuple[int, ...] = ()
  last_context_pre_only: bool = True
  has_output: bool = True
  patch_size: int = 2
  in_channels: int = 16
  out_channels: int = 16
  context_dim: int = 4096
  pooled_dim: int = 2048
  pos_embed_size: int = 192
  pos_embed_base: int = 64
  image_taps: tuple[int, ...] = ()
  text_taps: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ("num_layers", "num_heads", "head_dim", "patch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"MMDiTConfig.{name}={getattr(self, name)} must be >= 1")
    for name in ("image_taps", "text_taps"):
      taps = getattr(self, name)
      if list(taps) != sorted(set(taps)):
        raise ValueError(f"MMDiTConfig.{name}={taps} must be increasing")
      if taps and not 0 <= taps[0] <= taps[-1] <= self.num_layers:
        raise ValueError(
          f"MMDiTConfig.{name}={taps} must lie within 0..num_layers={self.num_layers}"
        )
    if not all(0 <= i < self.num_layers for i in self.dual_layers):
      raise ValueError(
        f"MMDiTConfig.dual_layers={self.dual_layers} must lie within "
        f"0..num_layers-1={self.num_layers - 1}"
      )
    if self.width % 4:
      raise ValueError(f"width {self.width} must be a multiple of 4 (sincos table)")

  @property
  def width(self) -> int:
    return self.num_heads * self.head_dim

  @property
  def segments(self) -> tuple[int, ...]:
    """Lengths of the runs of equal blocks; each run is one stacked module."""
    return tuple(n for _, n in layers.run_lengths(self._kinds()))

  def _kinds(self) -> list[tuple[bool, bool]]:
    """(dual, context_pre_only) of each block."""
    last = self.num_layers - 1
    return [
      (i in self.dual_layers, i == last and self.last_context_pre_only)
      for i in range(self.num_layers)
    ]

  @classmethod
  def sd35_medium(cls) -> "MMDiTConfig":
    """stabilityai/stable-diffusion-3.5-medium: 2,243,171,520 parameters."""
    return cls(
      num_layers=24,
      num_heads=24,
      head_dim=64,
      dual_layers=tuple(range(13)),
      pos_embed_size=384,
    )

  @classmethod
  def sd35_large(cls) -> "MMDiTConfig":
    """stabilityai/stable-diffusion-3.5-large: 8,056,627,520 parameters."""
    return cls(num_layers=38, num_heads=38, head_dim=64, pos_embed_size=192)

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "MMDiTConfig":
    """From an SD3Transformer2DModel's `config.json`.

    Raises:
      ValueError: a missing field, or a setting this model does not have.
    """
    fields = {
      "num_layers": "num_layers",
      "num_heads": "num_attention_heads",
      "head_dim": "attention_head_dim",
      "patch_size": "patch_size",
      "in_channels": "in_channels",
      "context_dim": "joint_attention_dim",
      "pooled_dim": "pooled_projection_dim",
      "pos_embed_size": "pos_embed_max_size",
    }
    needed = {*fields.values(), "sample_size", "qk_norm", "dual_attention_layers"}
    if missing := sorted(needed - set(config)):
      raise ValueError(f"transformer config lacks {', '.join(missing)}")
    if config["qk_norm"] != "rms_norm":
      raise ValueError(
        f"transformer config has qk_norm={config['qk_norm']!r}; SD3.5 has 'rms_norm' "
        "(SD3 without query/key norms is another model)"
      )
    kwargs = {ours: config[theirs] for ours, theirs in fields.items()}
    made = cls(
      **kwargs,
      out_channels=config.get("out_channels") or config["in_channels"],
      dual_layers=tuple(config["dual_attention_layers"]),
      pos_embed_base=config["sample_size"] // config["patch_size"],
    )
    if config.get("caption_projection_dim", made.width) != made.width:
      raise ValueError(
        f"caption_projection_dim={config['caption_projection_dim']} differs from the "
        f"width {made.width}"
      )
    return made

  def to_diffusers(self) -> dict[str, Any]:
    """The fields of diffusers' SD3Transformer2DModel, the inverse of from_diffusers."""
    return {
      "_class_name": "SD3Transformer2DModel",
      "num_layers": self.num_layers,
      "num_attention_heads": self.num_heads,
      "attention_head_dim": self.head_dim,
      "patch_size": self.patch_size,
      "in_channels": self.in_channels,
      "out_channels": self.out_channels,
      "joint_attention_dim": self.context_dim,
      "caption_projection_dim": self.width,
      "pooled_projection_dim": self.pooled_dim,
      "pos_embed_max_size": self.pos_embed_size,
      "sample_size": self.pos_embed_base * self.patch_size,
      "dual_attention_layers": list(self.dual_layers),
      "qk_norm": "rms_norm",
    }

  def truncate(
    self,
    num_layers: int,
    *,
    has_output: bool,
    image_taps: tuple[int, ...] = (),
    text_taps: tuple[int, ...] = (),
  ) -> "MMDiTConfig":
    """The first `num_layers` blocks as a backbone.

    Raises:
      ValueError: `num_layers` outside 1..num_layers.
    """
    if not 1 <= num_layers <= self.num_layers:
      raise ValueError(
        f"cannot keep {num_layers} of {self.num_layers} blocks: choose 1.."
        f"{self.num_layers}"
      )
    return dataclasses.replace(
      self,
      num_layers=num_layers,
      dual_layers=tuple(i for i in self.dual_layers if i < num_layers),
      last_context_pre_only=(
        self.last_context_pre_only and num_layers == self.num_layers
      ),
      has_output=has_output and self.has_output,
      image_taps=image_taps,
      text_taps=text_taps,
    )

  def tail(self, start: int) -> "MMDiTConfig":
    """The blocks that `truncate(start)` cuts off, and the output; without taps.

    Raises:
      ValueError: no block on one of the sides, or no output layer.
    """
    if not 1 <= start < self.num_layers:
      raise ValueError(
        f"cannot split {self.num_layers} blocks before block {start}: choose 1.."
        f"{self.num_layers - 1}"
      )
    if not self.has_output:
      raise ValueError("MMDiTConfig.has_output=False: a tail ends in the output layer")
    return dataclasses.replace(
      self,
      num_layers=self.num_layers - start,
      dual_layers=tuple(i - start for i in self.dual_layers if i >= start),
      image_taps=(),
      text_taps=(),
    )


def sincos_table(size: int, base: int, dim: int) -> np.ndarray:
  """The two factors of the 2-D sincos position table, `(2, size, dim / 2)` float32.

  The full `(size, size, dim)` table is separable: its first half of channels depends
  on the column only, its second half on the row only. [0] are the columns' values,
  [1] the rows'. Source: diffusers' get_2d_sincos_pos_embed with interpolation 1.
  """
  omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
  angles = np.outer(np.arange(size, dtype=np.float64) / (size / base), omega)
  axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return np.stack([axis, axis]).astype(np.float32)


class Table(nnx.Variable):
  """A constant array of a checkpoint: loaded and saved, never trained."""


class JointAttention(nnx.Module):
  """Attention of the image tokens, jointly with the text tokens or alone."""

  def __init__(
    self,
    config: MMDiTConfig,
    *,
    context: bool,
    context_pre_only: bool,
    attention_impl: str,
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    d = config.width
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    norm = dict(eps=NORM_EPS, param_dtype=param_dtype)
    self.qkv = layers.Dense(d, 3 * d, groups=3, **kw)
    self.out = layers.Dense(d, d, **kw)
    self.q_norm = layers.RMSNorm(config.head_dim, **norm)
    self.k_norm = layers.RMSNorm(config.head_dim, **norm)
    if context:
      self.context_qkv = layers.Dense(d, 3 * d, groups=3, **kw)
      self.context_q_norm = layers.RMSNorm(config.head_dim, **norm)
      self.context_k_norm = layers.RMSNorm(config.head_dim, **norm)
      if not context_pre_only:
        self.context_out = layers.Dense(d, d, **kw)
    self.context_pre_only = context_pre_only
    self.head_dim = config.head_dim
    self.attention_impl = attention_impl

  def _heads(self, qkv, q_norm, k_norm):
    q, k, v = (a.reshape(*a.shape[:2], -1, self.head_dim) for a in qkv)
    q, k = q_norm(q), k_norm(k)
    if attention.resolve(self.attention_impl, q.dtype) == "cudnn":
      # Or XLA:GPU writes them in float32, for the norm's scale to join the padding.
      q, k = jax.lax.optimization_barrier((q, k))
    return q, k, v

  def _attend(self, q, k, v):
    y = attention.attention(q, k, v, self.attention_impl)
    return y.reshape(*y.shape[:2], -1)

  def image_only(self, x: jax.Array) -> jax.Array:
    qkv = self._heads(self.qkv.projections(x), self.q_norm, self.k_norm)
    return self.out(self._attend(*qkv))

  def joint(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    image = self._heads(self.qkv.projections(x), self.q_norm, self.k_norm)
    text = self.context_qkv.projections(c)
    text = self._heads(text, self.context_q_norm, self.context_k_norm)
    # Text first: order is free (no positions, no mask), and a padded suffix then
    # serves every image size.
    qkv = (jnp.concatenate(tx, axis=1) for tx in zip(text, image, strict=True))
    y = self._attend(*qkv)
    num_text = c.shape[1]
    c_out = None if self.context_pre_only else self.context_out(y[:, :num_text])
    return self.out(y[:, num_text:]), c_out


def _modulate(x, shift, scale, dtype):
  """adaLN: float32 throughout, cast once."""
  y = layers.layer_norm(x, eps=NORM_EPS)
  scale, shift = scale.astype(jnp.float32), shift.astype(jnp.float32)
  return (y * (1 + scale[:, None]) + shift[:, None]).astype(dtype)


class Block(nnx.Module):
  """One MMDiT(-X) block. diffusers' JointTransformerBlock, Esser et al. fig. 2b."""

  def __init__(
    self,
    config: MMDiTConfig,
    *,
    dual: bool,
    context_pre_only: bool,
    attention_impl: str,
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    d = config.width
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    # adaLN-Zero: a fresh block starts as the identity.
    zero = dict(kernel_init=layers.zeros_init, **kw)
    attn = dict(context_pre_only=context_pre_only, attention_impl=attention_impl, **kw)
    self.modulation = layers.Dense(d, (9 if dual else 6) * d, **zero)
    self.context_modulation = layers.Dense(
      d, (2 if context_pre_only else 6) * d, **zero
    )
    self.attn = JointAttention(config, context=True, **attn)
    if dual:
      self.attn2 = JointAttention(config, context=False, **attn)
    self.mlp = layers.Mlp(d, 4 * d, d, act=layers.gelu_tanh, **kw)
    if not context_pre_only:
      self.context_mlp = layers.Mlp(d, 4 * d, d, act=layers.gelu_tanh, **kw)
    self.dual = dual
    self.context_pre_only = context_pre_only
    self.dtype = dtype

  def __call__(
    self, x: jax.Array, c: jax.Array, temb: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """x (b n d), c (b l d), temb (b d) -> (x, c)."""
    temb = jax.nn.silu(temb)
    image = jnp.split(self.modulation(temb), 9 if self.dual else 6, axis=-1)
    text = jnp.split(
      self.context_modulation(temb), 2 if self.context_pre_only else 6, axis=-1
    )
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = image[:6]

    if self.context_pre_only:
      # The one place where scale comes first (AdaLayerNormContinuous).
      c_in = _modulate(c, text[1], text[0], self.dtype)
    else:
      c_in = _modulate(c, text[0], text[1], self.dtype)
    x_out, c_out = self.attn.joint(_modulate(x, shift, scale, self.dtype), c_in)
    if self.dual:
      shift2, scale2, gate2 = image[6:]
      x_out2 = self.attn2.image_only(_modulate(x, shift2, scale2, self.dtype))
      x = x + gate[:, None] * x_out + gate2[:, None] * x_out2
    else:
      x = x + gate[:, None] * x_out
    x_mlp = self.mlp(_modulate(x, shift_mlp, scale_mlp, self.dtype))
    x = x + gate_mlp[:, None] * x_mlp

    if not self.context_pre_only:
      c = c + text[2][:, None] * c_out
      c_mlp = self.context_mlp(_modulate(c, text[3], text[4], self.dtype))
      c = c + text[5][:, None] * c_mlp
    return x, c


class _Blocks(nnx.Module):
  """Blocks and, where the config has one, the output layer behind them.

  Parameters of equal consecutive blocks are stacked: `blocks/<segment>/...` with a
  leading layer axis, the one canonical layout of checkpoints. With
  `scan_blocks=True` the blocks run under `lax.scan` on these stacks (fast to compile;
  CPU and TPU). With False there is one module per layer, `blocks/<segment>/<i>/...`
  (on a GPU a scan copies every layer's weights each pass); `unstack_params` and
  `stack_params` convert. `remat` is one of REMATS.
  """

  def __init__(
    self,
    config: MMDiTConfig,
    *,
    scan_blocks: bool = True,
    remat: str = "none",
    attention_impl: str = "auto",
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if remat not in REMATS:
      raise ValueError(f"remat={remat!r}: use one of {', '.join(REMATS)}")
    d, p = config.width, config.patch_size

    def make_block(kind):
      dual, pre_only = kind

      def make(rngs):
        return Block(
          config,
          dual=dual,
          context_pre_only=pre_only,
          attention_impl=attention_impl,
          dtype=dtype,
          param_dtype=param_dtype,
          rngs=rngs,
        )

      return make

    self.blocks = nnx.List()
    for kind, length in layers.run_lengths(config._kinds()):
      make = make_block(kind)
      if scan_blocks:
        self.blocks.append(layers.stack_blocks(make, length, rngs))
      else:
        self.blocks.append(nnx.List([make(rngs) for _ in range(length)]))

    if config.has_output:
      zero = dict(
        kernel_init=layers.zeros_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
      )
      self.out_modulation = layers.Dense(d, 2 * d, **zero)
      self.out = layers.Dense(d, p * p * config.out_channels, **zero)
    self.config = config
    self.scan_blocks = scan_blocks
    self.remat = remat
    self.dtype = dtype

  def output(self, tokens: features.Tokens) -> jax.Array | None:
    """Velocity (b H W out_channels) float32 of the tokens after the last block.

    None without an output layer.
    """
    if not self.config.has_output:
      return None
    scale, shift = jnp.split(self.out_modulation(jax.nn.silu(tokens.temb)), 2, axis=-1)
    y = self.out(_modulate(tokens.image, shift, scale, self.dtype))
    return unpatchify(y.astype(jnp.float32), tokens.grid, self.config.patch_size)

  def _run_blocks(self, x, c, temb):
    """All blocks. Returns x, c and the tapped tokens of both streams."""
    image, text = {0: x}, {0: c}
    start = 0

    def apply(graphdef, params, x, c):
      return nnx.merge(graphdef, params)(x, c, temb)

    if (remat := REMATS[self.remat]) is not None:
      apply = remat(apply, static_argnums=0)

    for segment, length in zip(self.blocks, self.config.segments, strict=True):
      ends = self._tap_ends(start, length)
      if not self.scan_blocks:
        for i, block in enumerate(segment):
          x, c = apply(*nnx.split(block), x, c)
          image[start + i + 1], text[start + i + 1] = x, c
      else:
        graphdef, params = nnx.split(segment)

        def body(carry, layer_params, graphdef=graphdef):
          return apply(graphdef, layer_params, *carry), None

        sizes = np.diff([0, *ends])
        if len(sizes) > 1 and len(set(sizes)) == 1:
          # Evenly spaced taps: one scan over runs, each a scan over its layers, so
          # that the outer ys are exactly the taps and no weight is sliced out.
          num = len(sizes)
          runs = jax.tree.map(
            lambda a, k=num: a.reshape(k, a.shape[0] // k, *a.shape[1:]), params
          )

          def run(carry, run_params, body=body):
            carry, _ = jax.lax.scan(body, carry, run_params)
            return carry, carry

          (x, c), (xs, cs) = jax.lax.scan(run, (x, c), runs)
          for i, end in enumerate(ends):
            image[start + end], text[start + end] = xs[i], cs[i]
        else:
          for first, end in zip([0, *ends[:-1]], ends, strict=True):
            part = jax.tree.map(lambda a, f=first, e=end: a[f:e], params)
            (x, c), _ = jax.lax.scan(body, (x, c), part)
            image[start + end], text[start + end] = x, c
      start += length
    return (
      x,
      c,
      tuple(image[i] for i in self.config.image_taps),
      tuple(text[i] for i in self.config.text_taps),
    )

  def _tap_ends(self, start: int, length: int) -> list[int]:
    """Where a segment's scan must stop, relative to it: at its taps and its end."""
    taps = {*self.config.image_taps, *self.config.text_taps}
    return sorted({t - start for t in taps if start < t < start + length} | {length})


class MMDiT(_Blocks):
  """The transformer: `(x, t, cond) -> (velocity or None, Features)`.

  Parameters, `scan_blocks` and `remat`: see `_Blocks`.
  """

  def __init__(
    self,
    config: MMDiTConfig,
    *,
    scan_blocks: bool = True,
    remat: str = "none",
    attention_impl: str = "auto",
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    d, p = config.width, config.patch_size
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    mlp = dict(act=jax.nn.silu, **kw)
    self.patch_embed = layers.Dense(p * p * config.in_channels, d, **kw)
    self.pos_embed = Table(
      jnp.asarray(sincos_table(config.pos_embed_size, config.pos_embed_base, d))
    )
    self.time_embed = layers.Mlp(TIME_DIM, d, d, **mlp)
    self.text_embed = layers.Mlp(config.pooled_dim, d, d, **mlp)
    self.context_embed = layers.Dense(config.context_dim, d, **kw)
    super().__init__(
      config, scan_blocks=scan_blocks, remat=remat, attention_impl=attention_impl, **kw
    )

  def embed(self, cond: features.Cond) -> features.Embedded:
    """What of a prompt's work depends on neither x nor t."""
    return features.Embedded(
      context=self.context_embed(cond.context), pooled=self.text_embed(cond.pooled)
    )

  def run(
    self, x: jax.Array, t: jax.Array, cond: features.Cond | features.Embedded
  ) -> tuple[features.Tokens, features.Features]:
    """All blocks; arguments as of a call.

    Returns: the tokens after the last block, and the Features with this config's taps.
    """
    text = self.embed(cond) if isinstance(cond, features.Cond) else cond
    temb = self.time_embed(layers.timestep_embedding(t, TIME_DIM)) + text.pooled
    patches, grid = patchify(x, self.config.patch_size)
    x = self.patch_embed(patches)
    x = (x.astype(jnp.float32) + self._positions(grid)).astype(self.dtype)
    x, c, image_taps, text_taps = self._run_blocks(x, text.context, temb)
    return (
      features.Tokens(image=x, text=c, temb=temb, grid=grid),
      features.Features(temb=temb, image=image_taps, text=text_taps, grid=grid),
    )

  def __call__(
    self, x: jax.Array, t: jax.Array, cond: features.Cond | features.Embedded
  ) -> tuple[jax.Array | None, features.Features]:
    """Velocity and tapped tokens of a noisy latent.

    Args:
      x: (b H W C) noisy latent; H and W multiples of the patch size, no larger than
        the position table.
      t: (b,) 1000 sigma.
      cond: context (b l context_dim), pooled (b pooled_dim); or what `embed` made of
        it, which gives the same numbers.

    Returns: velocity (b H W out_channels) float32, None without an output layer; and
      the Features with this config's taps.
    """
    tokens, feats = self.run(x, t, cond)
    return self.output(tokens), feats

  def _positions(self, grid: tuple[int, int]) -> jax.Array:
    """(n d) crop from the centre of the position table."""
    size = self.config.pos_embed_size
    h, w = grid
    if h > size or w > size:
      raise ValueError(
        f"latent of {h}x{w} patches exceeds the position table of {size}x{size}"
      )
    cols, rows = self.pos_embed[...].astype(jnp.float32)
    top, left = (size - h) // 2, (size - w) // 2
    cols = jnp.broadcast_to(cols[None, left : left + w], (h, w, cols.shape[-1]))
    rows = jnp.broadcast_to(rows[top : top + h, None], (h, w, rows.shape[-1]))
    return jnp.concatenate([cols, rows], axis=-1).reshape(h * w, -1)


class Tail(_Blocks):
  """The rest of a transformer: `tokens -> velocity (b H W out_channels)` float32.

  `MMDiT(full.truncate(start, has_output=False)).run` and then `Tail(full, start)` is
  the whole of `full`; `split_params` makes both their parameters.

  Keyword arguments as MMDiT's; `MMDiTConfig.tail` says what can be split.
  """

  def __init__(self, full: MMDiTConfig, start: int, **kw):
    super().__init__(full.tail(start), **kw)

  def __call__(self, tokens: features.Tokens) -> jax.Array:
    x, c, _, _ = self._run_blocks(tokens.image, tokens.text, tokens.temb)
    return self.output(tokens.replace(image=x, text=c))


def patchify(x: jax.Array, p: int) -> tuple[jax.Array, tuple[int, int]]:
  """(b H W C) -> (b n p*p*C), grid (h, w); channels ordered (row, column, C).

  Raises:
    ValueError: a side that is not a multiple of the patch size.
  """
  b, height, width, ch = x.shape
  if height % p or width % p:
    raise ValueError(f"latent of {height}x{width} is not a multiple of patch size {p}")
  h, w = height // p, width // p
  x = x.reshape(b, h, p, w, p, ch).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * w, p * p * ch), (h, w)


def unpatchify(x: jax.Array, grid: tuple[int, int], p: int) -> jax.Array:
  """(b n p*p*C) -> (b H W C), the inverse of `patchify`."""
  h, w = grid
  x = x.reshape(x.shape[0], h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(x.shape[0], h * p, w * p, -1)


def truncate_params(params: dict, full: MMDiTConfig, config: MMDiTConfig) -> dict:
  """Stacked parameters of `full` -> those of its truncation `config` (views).

  Takes some of the parameters as well, e.g. the adapters alone.
  """
  params = dict(params)
  blocks = {}
  for i, (length, kept) in enumerate(
    zip(full.segments, config.segments, strict=False)  # the rest is cut off
  ):
    if i not in params["blocks"]:
      continue
    stack = params["blocks"][i]
    blocks[i] = (
      stack if kept == length else jax.tree.map(lambda a, n=kept: a[:n], stack)
    )
  params["blocks"] = blocks
  if not config.has_output:
    params = {k: v for k, v in params.items() if k not in OUTPUT}
  return params


def split_params(params: dict, full: MMDiTConfig, start: int) -> tuple[dict, dict]:
  """Stacked parameters of `full` -> those of its first `start` blocks and of its Tail.

  Of numpy parameters both are views. Takes some of the parameters as well, e.g. the
  adapters alone. (`MMDiTConfig.tail` says what can be split.)
  """
  segments = full.tail(start).segments
  first = len(full.segments) - len(segments)  # the segment that holds block `start`
  tail: dict = {"blocks": {}}
  for i, kept in enumerate(segments):
    if first + i not in params["blocks"]:
      continue
    stack, length = params["blocks"][first + i], full.segments[first + i]
    tail["blocks"][i] = (
      stack if kept == length else jax.tree.map(lambda a, n=kept: a[-n:], stack)
    )
  tail |= {name: params[name] for name in OUTPUT if name in params}
  return truncate_params(params, full, full.truncate(start, has_output=False)), tail


def unstack_params(params: dict) -> dict:
  """Canonical stacked parameters -> one subtree per layer (`scan_blocks=False`)."""
  blocks = {}
  for i, stack in params["blocks"].items():
    length = jax.tree.leaves(stack)[0].shape[0]
    blocks[i] = {n: jax.tree.map(lambda a, n=n: a[n], stack) for n in range(length)}
  return {**params, "blocks": blocks}


def stack_params(params: dict) -> dict:
  """The inverse of `unstack_params`."""
  blocks = {}
  for i, segment in params["blocks"].items():
    per_layer = [segment[n] for n in sorted(segment)]
    stack = (
      np.stack if isinstance(jax.tree.leaves(segment)[0], np.ndarray) else jnp.stack
    )
    blocks[i] = jax.tree.map(lambda *a, stack=stack: stack(a), *per_layer)
  return {**params, "blocks": blocks}
