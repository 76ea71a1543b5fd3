"""CLIP's text encoder with its projection: CLIP-L and OpenCLIP bigG as in SD3.5.

Axes: b batch, n tokens (77), d width, h heads, p projection.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lrm_jax.models import layers

ACTIVATIONS = {"quick_gelu": layers.quick_gelu, "gelu": layers.gelu_exact}
# The end-of-text id in configs saved before transformers knew the real one. The
# end-of-text token is the last entry of CLIP's vocabulary, so for such a config the
# pooled position is that of the largest id.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Sizes of a CLIP text encoder.

  `projection_dim=None` stands for an encoder saved without its projection, which
  then is the identity (CLIP-L in some single-file checkpoints of SD3.5).
  """

  vocab_size: int
  dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  projection_dim: int | None
  max_length: int = 77
  act: str = "quick_gelu"
  norm_eps: float = 1e-5
  eos_token_id: int = LEGACY_EOS

  def __post_init__(self):
    if self.act not in ACTIVATIONS:
      raise ValueError(f"act={self.act!r} is none of {sorted(ACTIVATIONS)}")
    if self.dim % self.num_heads:
      raise ValueError(
        f"dim={self.dim} is not a multiple of num_heads={self.num_heads}"
      )

  @classmethod
  def clip_l(cls) -> "CLIPTextConfig":
    """SD3.5's `text_encoder`: CLIP ViT-L/14."""
    return cls(
      vocab_size=49408,
      dim=768,
      mlp_dim=3072,
      num_layers=12,
      num_heads=12,
      projection_dim=768,
    )

  @classmethod
  def clip_g(cls) -> "CLIPTextConfig":
    """SD3.5's `text_encoder_2`: OpenCLIP ViT-bigG/14."""
    return cls(
      vocab_size=49408,
      dim=1280,
      mlp_dim=5120,
      num_layers=32,
      num_heads=20,
      projection_dim=1280,
      act="gelu",
    )

  @classmethod
  def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
    """From the config.json of a `CLIPTextModelWithProjection`.

    Its other fields (dropout, initialisation, padding) do not enter the computation.

    Raises:
      ValueError: a field that fixes the computation is missing or unsupported.
    """
    names = {
      "vocab_size": "vocab_size",
      "dim": "hidden_size",
      "mlp_dim": "intermediate_size",
      "num_layers": "num_hidden_layers",
      "num_heads": "num_attention_heads",
      "projection_dim": "projection_dim",
      "max_length": "max_position_embeddings",
      "act": "hidden_act",
      "norm_eps": "layer_norm_eps",
      "eos_token_id": "eos_token_id",
    }
    if missing := [name for name in names.values() if config.get(name) is None]:
      raise ValueError(f"CLIP text config lacks {', '.join(missing)}")
    if not isinstance(config["eos_token_id"], int):
      raise ValueError(
        f"CLIP text config: eos_token_id={config['eos_token_id']!r} is not one token id"
      )
    return cls(**{field: config[name] for field, name in names.items()})


class Block(nnx.Module):
  """Pre-norm transformer block with causal attention."""

  def __init__(self, config: CLIPTextConfig, **kw):
    dim, param_dtype = config.dim, kw["param_dtype"]
    self.attn_norm = layers.LayerNorm(dim, eps=config.norm_eps, param_dtype=param_dtype)
    self.qkv = layers.Dense(dim, 3 * dim, groups=3, **kw)
    self.out = layers.Dense(dim, dim, **kw)
    self.mlp_norm = layers.LayerNorm(dim, eps=config.norm_eps, param_dtype=param_dtype)
    self.mlp = layers.Mlp(dim, config.mlp_dim, dim, act=ACTIVATIONS[config.act], **kw)
    self.num_heads = config.num_heads

  def __call__(self, x: jax.Array) -> jax.Array:
    b, n, d = x.shape
    qkv = self.qkv(self.attn_norm(x)).reshape(b, n, 3, self.num_heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))  # (b n h d/h)
    # Logits and softmax are float32 whatever the inputs. Padding is not masked: the
    # causal mask hides it from the tokens before it, as in the PyTorch pipeline.
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.reshape(b, n, d))
    return x + self.mlp(self.mlp_norm(x))


class CLIPText(nnx.Module):
  """CLIP's text encoder; blocks are stacked and scanned."""

  def __init__(
    self,
    config: CLIPTextConfig,
    *,
    dtype: layers.Dtype = jnp.float32,
    param_dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    init = nnx.initializers.normal(0.02)
    self.token_embedding = nnx.Param(
      init(rngs.params(), (config.vocab_size, config.dim), param_dtype)
    )
    self.position_embedding = nnx.Param(
      init(rngs.params(), (config.max_length, config.dim), param_dtype)
    )
    self.blocks = nnx.List(
      [
        layers.stack_blocks(
          lambda rngs: Block(config, rngs=rngs, **kw), config.num_layers, rngs
        )
      ]
    )
    self.norm = layers.LayerNorm(
      config.dim, eps=config.norm_eps, param_dtype=param_dtype
    )
    self.projection = (
      None
      if config.projection_dim is None
      else layers.Dense(
        config.dim, config.projection_dim, use_bias=False, rngs=rngs, **kw
      )
    )
    self.config = config
    self.dtype = dtype

  def __call__(
    self, ids: Int[Array, "b n"]
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b p"]]:
    """Token ids -> (output of all blocks but the last, projected pooled vector).

    The tokens are not normed (torch's `hidden_states[-2]`), the pooled vector is.
    An id outside the vocabulary gives NaN.

    Raises:
      ValueError: more tokens than the encoder has positions.
    """
    length = ids.shape[1]
    if length > self.config.max_length:
      raise ValueError(
        f"ids of shape {ids.shape}: the encoder has {self.config.max_length} positions;"
        " truncate when tokenizing"
      )
    x = jnp.take(self.token_embedding[...], ids, axis=0, mode="fill")
    x = x.astype(self.dtype) + self.position_embedding[:length].astype(self.dtype)
    (x, penultimate), _ = layers.scan_blocks(
      self.blocks[0], lambda block, xs: ((block(xs[0]), xs[0]), None), (x, x)
    )
    end = pooled_position(ids, self.config.eos_token_id)
    pooled = self.norm(x[jnp.arange(x.shape[0]), end])
    if self.projection is not None:
      pooled = self.projection(pooled)
    return penultimate, pooled


def pooled_position(ids: Int[Array, "b n"], eos_token_id: int) -> Int[Array, " b"]:
  """Where each prompt ends: its first end-of-text token (see LEGACY_EOS)."""
  if eos_token_id == LEGACY_EOS:
    return jnp.argmax(ids, axis=-1)
  return jnp.argmax(ids == eos_token_id, axis=-1)
