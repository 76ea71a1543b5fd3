"""The encoder of T5 v1.1, as SD3.5 uses it: no mask over the padding.

Axes: b batch, n tokens (q queries, m keys), d width, h heads, k head width.

Compute in bfloat16 or float32: T5-XXL's residual stream leaves the range of float16,
for which the PyTorch code clamps activations; nothing of the kind is done here.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from lrm_jax.models import layers


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of a T5 v1.1 encoder (gated GELU)."""

  vocab_size: int
  dim: int
  head_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_buckets: int = 32
  max_distance: int = 128
  norm_eps: float = 1e-6

  @classmethod
  def xxl(cls) -> "T5Config":
    """SD3.5's `text_encoder_3`: the encoder of T5 v1.1 XXL."""
    return cls(
      vocab_size=32128,
      dim=4096,
      head_dim=64,
      mlp_dim=10240,
      num_layers=24,
      num_heads=64,
    )

  @classmethod
  def from_transformers(cls, config: Mapping[str, Any]) -> "T5Config":
    """From the config.json of a `T5EncoderModel`.

    Its other fields (dropout, initialisation, decoder) do not enter the computation.

    Raises:
      ValueError: a field that fixes the computation is missing or unsupported.
    """
    names = {
      "vocab_size": "vocab_size",
      "dim": "d_model",
      "head_dim": "d_kv",
      "mlp_dim": "d_ff",
      "num_layers": "num_layers",
      "num_heads": "num_heads",
      "num_buckets": "relative_attention_num_buckets",
      "max_distance": "relative_attention_max_distance",
      "norm_eps": "layer_norm_epsilon",
    }
    problems = [f"{n} is missing" for n in names.values() if config.get(n) is None]
    # transformers derives the activation from this field alone; the default is v1.0's.
    kind = config.get("feed_forward_proj", "relu")
    if kind != "gated-gelu":
      problems.append(
        f"feed_forward_proj={kind!r} is not supported, only 'gated-gelu' (T5 v1.1) is"
      )
    if config.get("is_decoder", False):
      problems.append("is_decoder=True: only the encoder is implemented")
    if problems:
      raise ValueError("T5 config: " + "; ".join(problems))
    return cls(**{field: config[name] for field, name in names.items()})


class Block(nnx.Module):
  """Pre-norm transformer block without biases; attention is not scaled."""

  def __init__(self, config: T5Config, **kw):
    dim, inner = config.dim, config.num_heads * config.head_dim
    norm = dict(eps=config.norm_eps, param_dtype=kw["param_dtype"])
    kw = dict(kw, use_bias=False)
    self.attn_norm = layers.RMSNorm(dim, **norm)
    self.qkv = layers.Dense(dim, 3 * inner, groups=3, **kw)
    self.out = layers.Dense(inner, dim, **kw)
    self.mlp_norm = layers.RMSNorm(dim, **norm)
    self.gate = layers.Dense(dim, config.mlp_dim, **kw)
    self.up = layers.Dense(dim, config.mlp_dim, **kw)
    self.down = layers.Dense(config.mlp_dim, dim, **kw)
    self.num_heads = config.num_heads

  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    b, n, _ = x.shape
    qkv = self.qkv(self.attn_norm(x)).reshape(b, n, 3, self.num_heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))  # (b n h k)
    logits = jnp.einsum("bqhk,bmhk->bhqm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias, axis=-1).astype(v.dtype)
    y = jnp.einsum("bhqm,bmhk->bqhk", weights, v)
    x = x + self.out(y.reshape(b, n, -1))
    y = self.mlp_norm(x)
    return x + self.down(layers.gelu_tanh(self.gate(y)) * self.up(y))


class T5Encoder(nnx.Module):
  """T5's encoder; blocks are stacked and scanned.

  All blocks share one relative position bias (torch keeps it in its first block).
  """

  def __init__(
    self,
    config: T5Config,
    *,
    dtype: layers.Dtype = jnp.float32,
    param_dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.normal(0.02)
    self.token_embedding = nnx.Param(
      init(rngs.params(), (config.vocab_size, config.dim), param_dtype)
    )
    self.position_bias = nnx.Param(
      init(rngs.params(), (config.num_buckets, config.num_heads), param_dtype)
    )
    self.blocks = nnx.List(
      [
        layers.stack_blocks(
          lambda rngs: Block(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype),
          config.num_layers,
          rngs,
        )
      ]
    )
    self.norm = layers.RMSNorm(config.dim, eps=config.norm_eps, param_dtype=param_dtype)
    self.config = config
    self.dtype = dtype

  def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    """Token ids -> normed output of the last block. Unknown ids give NaN."""
    x = jnp.take(self.token_embedding[...], ids, axis=0, mode="fill")
    buckets = relative_buckets(
      ids.shape[1], self.config.num_buckets, self.config.max_distance
    )
    bias = self.position_bias[...].astype(jnp.float32)[buckets]  # (q m h)
    bias = jnp.moveaxis(bias, -1, 0)
    x, _ = layers.scan_blocks(
      self.blocks[0], lambda block, x: (block(x, bias), None), x.astype(self.dtype)
    )
    return self.norm(x)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
  """(query, key) -> index into the position bias; both directions (n n) int32.

  Half of the buckets are for keys after the query. Of each half, the lower half has
  one bucket per distance, the upper half grows logarithmically up to `max_distance`,
  beyond which everything shares the last bucket (Raffel et al. 2020, section 2.1).
  """
  offset = np.arange(length)[None, :] - np.arange(length)[:, None]
  distance = np.abs(offset)
  half = num_buckets // 2
  exact = half // 2
  growth = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
  # Powers of two lie on bucket edges: the nudge keeps rounding from moving them.
  far = exact + np.floor(growth * (half - exact) + 1e-9).astype(np.int32)
  bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
  return (bucket + half * (offset > 0)).astype(np.int32)
