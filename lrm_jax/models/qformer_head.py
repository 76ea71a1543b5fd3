"""DiNa-LRM's Q-Former reward head (arXiv 2602.11146).

Learned queries read the tapped tokens of a diffusion backbone through two
cross-attentions. The token stage (`tokens`) is separate from the scoring stage
(`score`), so that the tokens of several noise levels can be scored in one pass.

Axes: b batch, n image tokens, l text tokens, q queries, d head width, e tap width
(d / 4), h attention heads, k head dim.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from lrm_jax.models import features, layers
from lrm_jax.models.layers import Dtype

# torch.nn.RMSNorm's default: the machine epsilon of float32.
NORM_EPS = float(jnp.finfo(jnp.float32).eps)


@dataclasses.dataclass(frozen=True)
class QFormerHeadConfig:
  """Architecture.

  Attributes:
    token_dim: width of the backbone's tokens and of temb.
    width: d.
    num_image_taps, num_text_taps: tapped tensors per stream; 0 text taps leave the
      text branch out.
    num_queries, num_heads: of the cross-attentions.
    project_in: a linear layer before each tap's modulation; always there where
      token_dim != width.
    dropout: rate after the attentions' and the FFN's output, in training.
  """

  token_dim: int = 1536
  width: int = 1536
  num_image_taps: int = 3
  num_text_taps: int = 3
  num_queries: int = 4
  num_heads: int = 8
  project_in: bool = False
  dropout: float = 0.0

  def __post_init__(self):
    if self.width % self.num_heads or self.width % 4:
      raise ValueError(
        f"QFormerHeadConfig.width={self.width} must be a multiple of 4 and of "
        f"num_heads={self.num_heads}"
      )
    if self.num_image_taps < 1:
      raise ValueError("QFormerHeadConfig.num_image_taps must be >= 1")


class FiLM(nnx.Module):
  """Modulates one tap's tokens by temb and projects them to the tap width."""

  def __init__(self, config: QFormerHeadConfig, *, kw: dict):
    d = config.width
    self.project_in = nnx.data(None)
    if config.project_in or config.token_dim != d:
      self.project_in = layers.Dense(config.token_dim, d, **kw)
    # Zero-init of the last layer: no modulation at the start.
    self.modulation = layers.Mlp(
      config.token_dim, 2 * d, 2 * d, act=jax.nn.silu, down_init=layers.zeros_init, **kw
    )
    embed = nnx.initializers.normal(0.02)
    self.layer_embed = nnx.Param(embed(kw["rngs"].params(), (d,), kw["param_dtype"]))
    self.out = layers.Dense(d, d // 4, **kw)
    self.dtype = kw["dtype"]

  def __call__(self, tokens: jax.Array, temb: jax.Array) -> jax.Array:
    """tokens (b n token_dim), temb (b token_dim) -> (b n e)."""
    x = tokens.astype(self.dtype)
    if self.project_in is not None:
      x = self.project_in(x)
    gamma, beta = jnp.split(self.modulation(temb)[:, None], 2, axis=-1)
    x = x * (1 + gamma) + beta + self.layer_embed[...].astype(self.dtype)
    return self.out(x)


class Branch(nnx.Module):
  """Keys and (optionally gated) values of one stream."""

  def __init__(self, d: int, *, gated: bool, kw: dict):
    self.norm = layers.RMSNorm(d, eps=NORM_EPS, param_dtype=kw["param_dtype"])
    self.k = layers.Dense(d, d, **kw)
    self.v = layers.Dense(d, d, **kw)
    self.gate = nnx.data(None)
    if gated:  # one gate per token; starts at sigmoid(0) = 1/2
      self.gate = layers.Mlp(
        d, d, 1, act=jax.nn.silu, down_init=layers.zeros_init, **kw
      )

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = self.norm(x)
    k, v = self.k(x), self.v(x)
    if self.gate is not None:
      v = v * jax.nn.sigmoid(self.gate(x))
    return k, v


class CrossAttention(nnx.Module):
  """Queries attend to image tokens and, in a separate softmax, to text tokens."""

  def __init__(self, config: QFormerHeadConfig, *, text: bool, gated: bool, kw: dict):
    d = config.width
    self.q_norm = layers.RMSNorm(d, eps=NORM_EPS, param_dtype=kw["param_dtype"])
    self.q = layers.Dense(d, d, **kw)
    self.image = Branch(d, gated=gated, kw=kw)
    self.text = Branch(d, gated=gated, kw=kw) if text else nnx.data(None)
    self.out = layers.Dense(d, d, **kw)
    self.num_heads = config.num_heads
    self.dropout = config.dropout

  def __call__(
    self,
    queries: jax.Array,
    image: jax.Array,
    text: jax.Array | None,
    key: jax.Array | None,
  ) -> jax.Array:
    """queries (b q d), image (b n d), text (b l d) -> (b q d), residual added."""
    q = self.q(self.q_norm(queries))
    y = self._attend(q, *self.image(image))
    if self.text is not None:
      y = y + self._attend(q, *self.text(text))
    return queries + layers.dropout(self.out(y), self.dropout, key)

  def _attend(self, q, k, v):
    q, k, v = (a.reshape(*a.shape[:2], self.num_heads, -1) for a in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return y.reshape(*y.shape[:2], -1)


class QFormerHead(nnx.Module):
  """Features -> score."""

  uses_velocity = False

  def __init__(
    self,
    config: QFormerHeadConfig,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    d, e = config.width, config.width // 4
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.image_taps = nnx.List(
      [FiLM(config, kw=kw) for _ in range(config.num_image_taps)]
    )
    self.text_taps = nnx.List(
      [FiLM(config, kw=kw) for _ in range(config.num_text_taps)]
    )
    self.image_merge = layers.Dense(config.num_image_taps * e, d, **kw)
    self.text_merge = nnx.data(None)
    if config.num_text_taps:
      self.text_merge = layers.Dense(config.num_text_taps * e, d, **kw)
    queries = nnx.initializers.normal(0.02)
    self.queries = nnx.Param(
      queries(rngs.params(), (config.num_queries, d), param_dtype)
    )
    self.attn1 = CrossAttention(
      config, text=config.num_text_taps > 0, gated=True, kw=kw
    )
    self.attn2 = CrossAttention(config, text=False, gated=False, kw=kw)
    self.mlp_norm = layers.RMSNorm(d, eps=NORM_EPS, param_dtype=param_dtype)
    self.mlp = layers.Mlp(d, 4 * d, d, act=layers.gelu_exact, **kw)
    # The score itself is always float32: a bfloat16 score of 10 has steps of 1/16,
    # and candidates late in a trajectory would tie.
    self.out = layers.Dense(d, 1, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.dtype = dtype

  def tokens(self, feats: features.Features) -> tuple[jax.Array, jax.Array | None]:
    """Tapped tokens -> image (b n d) and text (b l d, or None) of one noise level.

    Raises:
      ValueError: another number of taps than the head was built for.
    """
    found = (len(feats.image), len(feats.text))
    want = (self.config.num_image_taps, self.config.num_text_taps)
    if found[0] != want[0] or (want[1] and found[1] != want[1]):
      raise ValueError(f"the head needs {want} (image, text) taps, got {found}")
    image = [
      f(x, feats.temb) for f, x in zip(self.image_taps, feats.image, strict=True)
    ]
    image = self.image_merge(jnp.concatenate(image, axis=-1))
    if self.text_merge is None:
      return image, None
    text = [f(x, feats.temb) for f, x in zip(self.text_taps, feats.text, strict=True)]
    return image, self.text_merge(jnp.concatenate(text, axis=-1))

  def score(
    self, image: jax.Array, text: jax.Array | None, key: jax.Array | None = None
  ) -> jax.Array:
    """Tokens of one or several noise levels -> (b,) float32. `key` turns dropout on."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    q = self.queries[...].astype(self.dtype)
    q = jnp.broadcast_to(q, (image.shape[0], *q.shape))
    q = self.attn1(q, image, text, keys[0])
    q = self.attn2(q, image, None, keys[1])
    q = q + layers.dropout(self.mlp(self.mlp_norm(q)), self.config.dropout, keys[2])
    return jnp.mean(self.out(q)[..., 0], axis=1)

  def __call__(
    self,
    velocity: jax.Array | None,
    feats: features.Features,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """One noise level -> (b,). The velocity is not read."""
    del velocity
    return self.score(*self.tokens(feats), key)
