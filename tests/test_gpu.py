"""What only a GPU can show: its own kernels, against plain arithmetic in float64.

Elsewhere all of this skips: JAX_PLATFORMS=cuda python -m pytest tests/test_gpu.py
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import build, weights
from lrm_jax.models import attention, conv_head, features, lora, mmdit, reward
from tests import helpers

pytestmark = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs a GPU (JAX_PLATFORMS=cuda)"
)

KERNELS = ["cudnn"]


def plain(q, k, v, g):
  """Output and gradients of q, k, v in numpy, float64."""
  q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
  scale = q.shape[-1] ** -0.5
  logits = np.einsum("bnhk,bmhk->bhnm", q, k) * scale
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = np.einsum("bhnm,bmhk->bnhk", p, v)
  dp = np.einsum("bnhk,bmhk->bhnm", g, v)
  dl = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
  return {
    "out": out,
    "q": np.einsum("bhnm,bmhk->bnhk", dl, k),
    "k": np.einsum("bhnm,bnhk->bmhk", dl, q),
    "v": np.einsum("bhnm,bnhk->bmhk", p, g),
  }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [16, 157, 333, 1357])
def test_kernels(kernel, n):
  """Odd lengths, as SD3.5's all are, and a multiple of 16; as exact as bfloat16 is."""
  shape = (2, n, 3, 64)
  q, k, v, g = (
    jax.random.normal(key, shape).astype(jnp.bfloat16)
    for key in jax.random.split(jax.random.key(n), 4)
  )

  @jax.jit
  def run(q, k, v, g):
    out, vjp = jax.vjp(lambda *a: attention.attention(*a, kernel), q, k, v)
    return {"out": out, **dict(zip("qkv", vjp(g), strict=True))}

  got, want = run(q, k, v, g), plain(q, k, v, g)
  for name, a in got.items():
    assert a.dtype == jnp.bfloat16
    assert helpers.rel_err(np.asarray(a, np.float64), want[name]) < 1e-2, name


@functools.cache
def config() -> reward.RewardConfig:
  backbone = mmdit.MMDiTConfig(
    num_layers=3,
    num_heads=2,
    head_dim=16,
    dual_layers=(0, 1),
    context_dim=24,
    pooled_dim=20,
    pos_embed_size=16,
    has_output=True,
    last_context_pre_only=False,
  )
  head = conv_head.ConvHeadConfig(base_channels=4, num_groups=2, dropout=0.0)
  return reward.RewardConfig(backbone, head, lora.LoRAConfig(rank=2, alpha=4))


def score_and_gradient(kernel, dtype, remat="none"):
  """Of a tiny reward with random weights: sum of scores; its gradient as one vector."""
  graphdef, like = weights.abstract(
    lambda: build.make_reward(
      config(),
      dtype=dtype,
      param_dtype=jnp.float32,
      attention_impl=kernel,
      remat=remat,
    )
  )
  rng = np.random.default_rng(0)
  flat = weights.flatten(like)

  def draw(path):
    shape = flat[path].shape
    noise = rng.standard_normal(shape)
    if path.endswith(("kernel", "lora_a", "lora_b")):
      return jnp.float32(noise / np.sqrt(np.prod(shape[-2:-1])))
    return jnp.float32(0.1 * noise + path.endswith("scale"))

  params = weights.unflatten({path: draw(path) for path in sorted(flat)})
  x = rng.standard_normal((4, 8, 8, 16)).astype(np.float32)
  cond = features.Cond(
    jnp.asarray(rng.standard_normal((4, 5, 24)), dtype),
    jnp.asarray(rng.standard_normal((4, 20)), dtype),
  )

  @jax.jit
  def run(params, x, cond):
    def loss(params):
      model = nnx.merge(graphdef, params)
      return model(x, jnp.linspace(0.1, 0.9, 4), cond).sum()

    return jax.value_and_grad(loss)(params)

  value, gradient = run(params, x, cond)
  leaves = [np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(gradient)]
  return float(value), np.concatenate(leaves)


@pytest.mark.parametrize("remat", sorted(mmdit.REMATS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_with_every_remat_policy(kernel, remat):
  """Gives the scores and the gradient of plain attention without rematerialisation."""
  with jax.default_matmul_precision("highest"):
    value, exact = score_and_gradient("xla", jnp.float32)
  rough_value, rough = score_and_gradient("xla", jnp.bfloat16)
  got_value, got = score_and_gradient(kernel, jnp.bfloat16, remat)
  unit = max(helpers.rel_err(rough, exact), 1e-3)
  assert abs(got_value - value) < 3 * max(abs(rough_value - value), 0.01 * abs(value))
  assert helpers.rel_err(got, exact) < 2 * unit
