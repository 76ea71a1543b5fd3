"""Building blocks shared by the models.

Axes: b batch, n tokens, d width, r LoRA rank, g fused projections (3 for q, k, v).
A leading layer axis l may stand before every parameter axis of a stacked block.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lrm_jax import sharding

Dtype = Any

# The initialiser of torch.nn.Linear in its usual transformer setting: we only
# initialise what is trained from scratch (heads, the quickstart's small models).
kernel_init = nnx.initializers.xavier_uniform()
zeros_init = nnx.initializers.zeros_init()


class LoRAParam(nnx.Param):
  """A low-rank adapter matrix; its own type, so that nnx.split can separate it."""


def pin_batch(x: jax.Array) -> jax.Array:
  """Keeps the leading axis over the batch axes of the ambient mesh (jax.set_mesh).

  Other axes stay free, e.g. for a `tensor` rule. Without a mesh, or with a batch that
  does not divide over it, the identity.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in sharding.BATCH_AXES if name in mesh.auto_axes)
  parts = math.prod(mesh.shape[name] for name in axes)
  if parts == 1 or x.shape[0] % parts:
    return x
  free = [P.UNCONSTRAINED] * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, P(axes, *free))


class Dense(nnx.Module):
  """`y = x @ kernel + bias`, plus a low-rank adapter where one is attached.

  `kernel (d_in, d_out)`; the inputs and the kernel are cast to `dtype`. `groups` is
  the number of projections of equal width fused along d_out (3 for a fused qkv): an
  adapter keeps one independent (A, B) pair per group, as PEFT does for the separate
  torch modules. `lora_a (d_in, groups * r)`, `lora_b (r, d_out)`: the g-th slice of
  columns of each belongs to group g, and `y_g += (alpha / r) * (x @ A_g) @ B_g`
  (Hu et al. 2021, eq. 3).
  """

  def __init__(
    self,
    d_in: int,
    d_out: int,
    *,
    use_bias: bool = True,
    groups: int = 1,
    kernel_init: Callable = kernel_init,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if d_out % groups:
      raise ValueError(f"d_out={d_out} is not a multiple of groups={groups}")
    self.kernel = nnx.Param(kernel_init(rngs.params(), (d_in, d_out), param_dtype))
    self.bias = nnx.Param(jnp.zeros((d_out,), param_dtype)) if use_bias else None
    self.lora_a = nnx.data(None)
    self.lora_b = nnx.data(None)
    self.lora_scale = 0.0
    self.groups = groups
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.concatenate(self.projections(x), axis=-1)

  def projections(self, x: jax.Array) -> list[jax.Array]:
    """The output of each group, (..., d_out / groups).

    For those who want them apart: an adapter's groups are computed apart, and putting
    them side by side only to take them apart again costs two passes over them.
    """
    x = x.astype(self.dtype)
    y = x @ self.kernel[...].astype(self.dtype)
    if self.bias is not None:
      y = y + self.bias[...].astype(self.dtype)
    # Of a kernel split over devices the compiler may otherwise keep the parts where
    # they are and send the activations round (docs/aot.md).
    parts = jnp.split(pin_batch(y), self.groups, axis=-1)
    if self.lora_a is None:
      return parts
    if self.groups == 1:
      return [pin_batch(y + self._adapter(x)[0])]
    # In float32, as norms that follow compute anyway: then a GPU adds inside of them.
    # In bfloat16 the sum would become part of the adapter's product, for which the
    # groups of y are copied apart.
    wide = lambda a: a.astype(jnp.float32)  # noqa: E731
    return [
      pin_batch((wide(y) + wide(z)).astype(self.dtype))
      for y, z in zip(parts, self._adapter(x), strict=True)
    ]

  def _adapter(self, x: jax.Array) -> list[jax.Array]:
    """The adapter's part of each group."""
    a = self.lora_a[...].astype(self.dtype)
    b = self.lora_b[...].astype(self.dtype)
    # Scaled where there are r numbers per token, not d_out.
    z = (self.lora_scale * (x @ a)).reshape(*x.shape[:-1], self.groups, -1)
    return _grouped_products(z, b.reshape(b.shape[0], self.groups, -1))


@jax.custom_vjp
def _grouped_products(z: ArrayLike, b: ArrayLike) -> list[jax.Array]:
  """`z[..., g, :] @ b[:, g]` for each g; z (..., g, r), b (r, g, d).

  A batched product leaves its groups one behind the other, which is how they are
  read. Their gradients arrive apart: side by side, as here, they are the same array
  that the fused kernel's backward pass needs; one behind the other, as jax would have
  them, they are two copies more.
  """
  r = z.ndim - 1
  return list(jax.lax.dot_general(z, b, (((r,), (0,)), ((r - 1,), (1,)))))


def _grouped_products_fwd(z, b):
  return _grouped_products(z, b), (z, b)


def _grouped_products_bwd(residuals, gradients):
  z, b = residuals
  g = jnp.concatenate(gradients, axis=-1).reshape(*z.shape[:-1], -1)
  return (
    jnp.einsum("...gd,rgd->...gr", g, b),
    jnp.einsum("...gr,...gd->rgd", z, g),
  )


_grouped_products.defvjp(_grouped_products_fwd, _grouped_products_bwd)


class Mlp(nnx.Module):
  """`down(act(up(x)))`, widths `d_in -> d_hidden -> d_out`."""

  def __init__(
    self,
    d_in: int,
    d_hidden: int,
    d_out: int,
    *,
    act: Callable[[jax.Array], jax.Array],
    down_init: Callable = kernel_init,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.up = Dense(d_in, d_hidden, **kw)
    self.down = Dense(d_hidden, d_out, kernel_init=down_init, **kw)
    self.act = act

  def __call__(self, x: jax.Array) -> jax.Array:
    # The backward pass keeps `up`'s output alone, and not what jax's rule for the
    # activation makes of it: of 12 unrolled blocks that is a sixth of all it keeps.
    return self.down(jax.checkpoint(self.act)(self.up(x)))


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis; statistics in float32, output as x.

  `eps` has no default: SD3.5's query/key norms use 1e-6, the DiNa-LRM head uses
  torch's own default (see qformer_head), T5 reads its config.
  """

  def __init__(self, dim: int, *, eps: float, param_dtype: Dtype = jnp.float32):
    self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    inv = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (x32 * inv * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Inverted dropout; the identity without a key (evaluation) or at rate 0."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def layer_norm(x: jax.Array, *, eps: float) -> jax.Array:
  """Layer norm without scale or bias; float32 in and out of the statistics.

  Returns float32, because what follows (adaLN modulation) belongs to the same
  float32 expression; the caller casts once.
  """
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
  """Layer norm with scale and bias; statistics in float32, output as x."""

  def __init__(self, dim: int, *, eps: float, param_dtype: Dtype = jnp.float32):
    self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
    self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = layer_norm(x, eps=self.eps)
    y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


def timestep_embedding(t: jax.Array, dim: int, max_period: float = 1e4) -> jax.Array:
  """Sinusoidal embedding `(b,) -> (b, dim)`, cosines first, always in float32.

  bfloat16 would quantise t to steps of 4 above 512. diffusers' get_timestep_embedding
  with flip_sin_to_cos=True, downscale_freq_shift=0.
  """
  half = dim // 2
  freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = t.astype(jnp.float32)[:, None] * freqs
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def quick_gelu(x: jax.Array) -> jax.Array:
  """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


def gelu_exact(x: jax.Array) -> jax.Array:
  """GELU through erf, torch's default (jax.nn.gelu defaults to the tanh form)."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by its tanh approximation (transformers' `gelu_new`, SD3.5's FFN)."""
  return jax.nn.gelu(x, approximate=True)


def stack_blocks(
  make_block: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs
) -> nnx.Module:
  """One module whose parameters carry a leading axis of `num` layers."""

  @nnx.split_rngs(splits=num)
  @nnx.vmap(in_axes=0, out_axes=0)
  def make(rngs):
    return make_block(rngs)

  return make(rngs)


def scan_blocks(
  block: nnx.Module,
  step: Callable[[nnx.Module, Any], tuple[Any, Any]],
  carry: Any,
) -> tuple[Any, Any]:
  """`lax.scan` of `step(layer, carry) -> (carry, y)` over a stacked block's layers.

  The block is split once and merged inside the body: cheaper in host time than
  nnx.scan, and nothing is mutated. Returns (carry, ys stacked over layers).
  """
  graphdef, params = nnx.split(block)

  def body(carry, layer_params):
    return step(nnx.merge(graphdef, layer_params), carry)

  return jax.lax.scan(body, carry, params)


def run_lengths(kinds: Sequence[Any]) -> list[tuple[Any, int]]:
  """Runs of equal neighbours: `[a, a, b] -> [(a, 2), (b, 1)]`."""
  runs: list[tuple[Any, int]] = []
  for kind in kinds:
    if runs and runs[-1][0] == kind:
      runs[-1] = (kind, runs[-1][1] + 1)
    else:
      runs.append((kind, 1))
  return runs
