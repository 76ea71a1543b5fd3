"""Multi-head attention without a mask, on the best kernel of each platform.

Axes: b batch, n tokens, h heads, k head width.
"""

import functools

from absl import logging
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lrm_jax import sharding

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

# cuDNN's backward pass refuses odd sequence lengths (and SD3's 77 + T5 + image is
# always odd); 16 is also what its tiles like.
CUDNN_MULTIPLE = 16

# Splash attention works in square tiles: rows are a multiple of the vector lanes. The
# larger the fewer cycles (benchmarks/splash_tiles.py); those of 1408 rows do not fit
# the fast memory of v5e and v5p.
LANES = 128
SPLASH_TILE = 1280
# Tokens along the lanes: heads of 64 channels would leave half of them empty, in every
# array between the products before and this kernel.
SPLASH_LAYOUT = splash_attention_kernel.QKVLayout.SEQ_MINOR

NAME = "attention"  # of its output, for rematerialisation


def save_attention(primitive, *args, **params) -> bool:
  """A jax.checkpoint policy: attention's outputs are kept, all else is recomputed.

  cuDNN's are found by their primitive, because a name given outside of its custom
  derivative does not reach what its backward pass needs; splash gives NAME inside.
  """
  if primitive.name == "dot_product_attention_fwd_wrapper":
    return True
  by_name = jax.checkpoint_policies.save_only_these_names(NAME)
  return by_name(primitive, *args, **params)


KERNELS = {"gpu": "cudnn", "tpu": "splash"}  # platform -> implementation


def resolve(implementation: str, dtype, platform: str | None = None) -> str:
  """`auto` -> for 16-bit inputs cudnn on a GPU, splash on a TPU; xla elsewhere.

  Args:
    platform: `gpu`, `tpu` or `cpu` to compile for; None: where jax runs.

  `jax.nn.dot_product_attention(implementation=None)` would silently materialise the
  (n, n) logits on a GPU, so the choice is made here.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention implementation {implementation!r}: use one of {IMPLEMENTATIONS}"
    )
  if implementation != "auto":
    return implementation
  platform = jax.default_backend() if platform is None else platform
  half = dtype in (jnp.bfloat16, jnp.float16)
  chosen = KERNELS.get(platform, "xla") if half else "xla"
  _log(chosen, jnp.dtype(dtype).name, platform)
  return chosen


@functools.cache
def _log(chosen: str, dtype: str, platform: str) -> None:
  """Once per choice, not once per layer."""
  logging.info("attention: %s for %s on %s", chosen, dtype, platform)


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto"
) -> jax.Array:
  """softmax(q k^T / sqrt(k)) v for `(b n h k)` inputs; softmax in float32."""
  implementation = resolve(implementation, q.dtype)
  if implementation == "xla":
    out = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return checkpoint_name(out, NAME)
  if implementation == "splash":
    return _splash(q, k, v)

  length = q.shape[1]
  pad = -length % CUDNN_MULTIPLE
  if pad == 0:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  # A suffix of padding with explicit lengths keeps the fused kernel; a boolean mask
  # would become an (n, n) bias in memory.
  q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q, k, v))
  lengths = jnp.full((q.shape[0],), length, jnp.int32)
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )
  return out[:, :length]


def splash_tile(length: int) -> int:
  """Rows of a tile: the fewest equal tiles of at most SPLASH_TILE cover `length`."""
  tiles = -(-length // SPLASH_TILE)
  return -(-length // (tiles * LANES)) * LANES


def _splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Splash attention, each device on its own samples (and heads).

  A Pallas kernel is opaque to the partitioner: without the shard_map every device
  would gather the whole batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  batch = tuple(name for name in sharding.BATCH_AXES if name in mesh.auto_axes)
  heads = tuple(set(mesh.auto_axes) - set(batch))
  if mesh.size == 1 or not batch:
    return local_splash(q, k, v)
  spec = P(batch, None, heads or None)
  # check_vma: the kernel does not say over which axes its outputs vary.
  return jax.shard_map(
    local_splash, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
  )(q, k, v)


def local_splash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  tile: int | None = None,
  layout: splash_attention_kernel.QKVLayout = SPLASH_LAYOUT,
) -> jax.Array:
  """Splash attention of `(b n h k)` inputs on one device.

  Args:
    tile: rows of a tile, a multiple of LANES; `splash_tile(n)` unless given.
    layout: of q, k and v as the kernel reads them.
  """
  _, n, heads, width = q.shape
  tile = tile or splash_tile(n)
  padded = -(-n // tile) * tile
  # Within a tile, keys are taken in two halves: the logits of one fit beside the rest.
  half = tile // 2 if tile % (2 * LANES) == 0 else tile
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask(
      [splash_attention_mask.FullMask((padded, padded))] * heads
    ),
    block_sizes=splash_attention_kernel.BlockSizes(
      block_q=tile,
      block_kv=tile,
      block_kv_compute=half,
      block_q_dkv=tile,
      block_kv_dkv=tile,
      block_kv_dkv_compute=half,
      block_q_dq=tile,
      block_kv_dq=tile,
      q_layout=layout,
      k_layout=layout,
      v_layout=layout,
    ),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=NAME,
  )
  q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)  # it does not scale
  q, k, v = (
    jnp.pad(a, ((0, 0), (0, padded - n), (0, 0), (0, 0))).swapaxes(1, 2)
    for a in (q, k, v)
  )
  segments = None
  if padded > n:  # the padding is a segment of its own, attended by nobody else
    ids = (jnp.arange(padded) >= n).astype(jnp.int32)
    segments = splash_attention_kernel.SegmentIds(ids, ids)
  out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
  return out.swapaxes(1, 2)[:, :n]
