"""Multi-head attention without a mask, on the best kernel of each platform.

Axes: b batch, n tokens, h heads, k head width.
"""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "cudnn")

# cuDNN's backward pass refuses odd sequence lengths (and SD3's 77 + T5 + image is
# always odd); 16 is also what its tiles like.
CUDNN_MULTIPLE = 16


def resolve(implementation: str, dtype) -> str:
  """`auto` -> cudnn for 16-bit inputs on a GPU, xla elsewhere.

  `jax.nn.dot_product_attention(implementation=None)` would silently materialise the
  (n, n) logits on a GPU, so the choice is made here.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention implementation {implementation!r}: use one of {IMPLEMENTATIONS}"
    )
  if implementation != "auto":
    return implementation
  sixteen_bit = dtype in (jnp.bfloat16, jnp.float16)
  return "cudnn" if jax.default_backend() == "gpu" and sixteen_bit else "xla"


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto"
) -> jax.Array:
  """softmax(q k^T / sqrt(k)) v for `(b n h k)` inputs; softmax in float32."""
  implementation = resolve(implementation, q.dtype)
  if implementation == "xla":
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")

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
