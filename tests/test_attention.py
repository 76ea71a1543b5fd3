"""The choice of attention kernel, and the padding that cuDNN needs."""

import functools
import re

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lrm_jax import sharding
from lrm_jax.models import attention

KERNEL = jax.nn.dot_product_attention


def inputs(n, dtype=jnp.float32):
  shape = (2, n, 3, 8)
  return tuple(
    jax.random.normal(k, shape).astype(dtype)
    for k in jax.random.split(jax.random.key(n), 3)
  )


def plain(q, k, v):
  """softmax(q k^T / sqrt(d)) v in numpy."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  logits = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(q.shape[-1])
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return np.einsum("bhnm,bmhk->bnhk", p, v)


@pytest.fixture
def cudnn(monkeypatch):
  """Stands in for cuDNN: records the call, and masks as cuDNN's lengths do."""
  calls = []

  def kernel(
    q, k, v, *, query_seq_lengths=None, key_value_seq_lengths=None, implementation
  ):
    assert implementation == "cudnn"
    assert q.shape == k.shape == v.shape
    calls.append((q.shape, query_seq_lengths, key_value_seq_lengths))
    if query_seq_lengths is None:
      return KERNEL(q, k, v, implementation="xla")
    assert query_seq_lengths.dtype == key_value_seq_lengths.dtype == jnp.int32
    visible = jnp.arange(k.shape[1]) < key_value_seq_lengths[:, None]
    # Rows past the query length are undefined in cuDNN: poison them.
    past = jnp.arange(q.shape[1]) >= query_seq_lengths[:, None]
    out = KERNEL(q, k, v, mask=visible[:, None, None], implementation="xla")
    return jnp.where(past[..., None, None], jnp.nan, out)

  monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
  return calls


@pytest.mark.parametrize("n", [1, 15, 17, 23])
def test_lengths_off_the_multiple_are_padded(cudnn, n):
  q, k, v = inputs(n)
  out = attention.attention(q, k, v, "cudnn")
  ((shape, q_lengths, kv_lengths),) = cudnn
  assert shape[1] % attention.CUDNN_MULTIPLE == 0
  assert n < shape[1] < n + attention.CUDNN_MULTIPLE
  np.testing.assert_array_equal(q_lengths, [n, n])
  np.testing.assert_array_equal(kv_lengths, [n, n])
  assert out.shape == q.shape
  np.testing.assert_allclose(out, plain(q, k, v), atol=1e-5)


@pytest.mark.parametrize("n", [16, 48])
def test_multiples_are_not_padded(cudnn, n):
  q, k, v = inputs(n)
  out = attention.attention(q, k, v, "cudnn")
  assert cudnn == [((2, n, 3, 8), None, None)]
  np.testing.assert_allclose(out, plain(q, k, v), atol=1e-5)


def test_gradient_ignores_the_padding(cudnn):
  def gradient(implementation):
    def loss(q, k, v):
      return jnp.sum(jnp.sin(attention.attention(q, k, v, implementation)))

    return jax.grad(loss, (0, 1, 2))(*inputs(19))

  got = gradient("cudnn")
  assert len(cudnn) == 1
  q, k, v = inputs(19)
  want = jax.grad(lambda *a: jnp.sum(jnp.sin(KERNEL(*a))), (0, 1, 2))(q, k, v)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_default_on_a_cpu(dtype):
  q, k, v = inputs(21, dtype)
  out = attention.attention(q, k, v)
  assert out.dtype == dtype
  tol = 1e-5 if dtype == jnp.float32 else 0.03
  np.testing.assert_allclose(out.astype(jnp.float32), plain(q, k, v), atol=tol)


def test_the_choice_is_logged_once(caplog):
  attention._log.cache_clear()
  with caplog.at_level("INFO", logger="absl"):
    for _ in range(3):
      attention.resolve("auto", jnp.bfloat16, "tpu")
  assert [r.message for r in caplog.records] == [
    "attention: splash for bfloat16 on tpu"
  ]


@pytest.mark.parametrize(
  "platform, dtype, choice",
  [
    ("cpu", jnp.bfloat16, "xla"),
    ("tpu", jnp.bfloat16, "splash"),
    ("tpu", jnp.float32, "xla"),
    ("gpu", jnp.bfloat16, "cudnn"),
    ("gpu", jnp.float16, "cudnn"),
    ("gpu", jnp.float32, "xla"),
  ],
)
def test_automatic_choice(monkeypatch, platform, dtype, choice):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert attention.resolve("auto", dtype) == choice
  assert attention.resolve("auto", jnp.dtype(dtype)) == choice
  for explicit in ("xla", "cudnn", "splash"):
    assert attention.resolve(explicit, dtype) == explicit
  # Compiling for another platform than jax runs on.
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert attention.resolve("auto", dtype, platform) == choice


# --- splash, interpreted -----------------------------------------------------------


@pytest.fixture
def splash(monkeypatch):
  """Pallas' interpreter in place of a TPU, and small tiles so that there are several.

  Returns the tile sizes and whether there was padding, per call.
  """
  make = splash_attention_kernel.make_splash_mha
  calls = []

  def interpreted(mask, *, block_sizes, **kwargs):
    calls.append(block_sizes)
    return make(mask, block_sizes=block_sizes, interpret=True, **kwargs)

  monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", interpreted)
  monkeypatch.setattr(attention, "SPLASH_TILE", 256)
  return calls


def value_and_grads(implementation, q, k, v):
  def loss(q, k, v):
    return jnp.sum(jnp.sin(attention.attention(q, k, v, implementation)))

  return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("n", [128, 300])
def test_splash(splash, n):
  """Values and gradients, with and without padding, in one tile and in several."""
  shape = (2, n, 2, 64)
  q, k, v = (
    jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(n), 3)
  )
  out = attention.attention(q, k, v, "splash")
  np.testing.assert_allclose(out, plain(q, k, v), atol=1e-5)
  value, grads = value_and_grads("splash", q, k, v)
  value2, grads2 = value_and_grads("xla", q, k, v)
  np.testing.assert_allclose(value, value2, rtol=1e-5)
  for a, b in zip(grads, grads2, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert {c.block_q for c in splash} == {128 if n == 128 else 256}
  # Tokens along the lanes.
  layouts = {(c.q_layout, c.k_layout, c.v_layout) for c in splash}
  assert layouts == {(splash_attention_kernel.QKVLayout.SEQ_MINOR,) * 3}


def test_splash_on_a_mesh(splash):
  """Each device takes its own samples, and its heads where there is a tensor axis."""
  shape = (4, 40, 2, 64)
  q, k, v = (
    jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(1), 3)
  )
  mesh = sharding.make_mesh(2, jax.devices()[:8], tensor=2)
  place = jax.sharding.NamedSharding(mesh, P(sharding.BATCH_AXES, None, "tensor"))
  with jax.set_mesh(mesh):
    args = [jax.device_put(a, place) for a in (q, k, v)]
    value, grads = jax.jit(functools.partial(value_and_grads, "splash"))(*args)
  value2, grads2 = value_and_grads("xla", q, k, v)
  np.testing.assert_allclose(value, value2, rtol=1e-5)
  for a, b in zip(grads, grads2, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
    assert a.sharding.is_equivalent_to(place, 4)


@pytest.mark.parametrize(
  "length, tile",
  [(1024, 1024), (1229, 1280), (1357, 768), (1613, 896), (4429, 1152), (77, 128)],
)
def test_splash_tiles(length, tile):
  assert attention.splash_tile(length) == tile
  assert tile % attention.LANES == 0
  assert tile <= attention.SPLASH_TILE
  assert -(-length // tile) == -(-length // attention.SPLASH_TILE)


# --- what rematerialisation keeps --------------------------------------------------


def kernel_calls(text: str, function: str = "main") -> int:
  """Pallas kernels that a function of lowered text runs, through its own calls too."""
  bodies = dict(re.findall(r"func\.func \w+ @(\w+)\((.*?)\n  }", text, re.S))
  body = bodies[function]
  called = re.findall(r"call @(\w+)\(", body)
  own = sum(name == "tpu_custom_call" for name in re.findall(r"@(\w+)\(", body))
  return own + sum(kernel_calls(text, name) for name in called if name in bodies)


@pytest.mark.parametrize("policy, calls", [(None, 4), (attention.save_attention, 3)])
def test_saved_attention_is_not_run_again(policy, calls):
  """A forward and two backward kernels; full rematerialisation adds a forward."""
  args = [jax.ShapeDtypeStruct((1, 300, 1, 64), jnp.bfloat16)] * 3

  def layer(q, k, v):
    return jnp.sin(attention.attention(jnp.sin(q), k, v, "splash"))

  f = jax.checkpoint(layer, policy=policy)
  grad = jax.value_and_grad(lambda *a: jnp.sum(f(*a)).astype(jnp.float32))
  lowered = jax.jit(grad).trace(*args).lower(lowering_platforms=("tpu",))
  assert kernel_calls(lowered.as_text()) == calls


def test_unknown_implementation():
  with pytest.raises(ValueError, match="'flash': use one of .*auto.*xla.*cudnn"):
    attention.attention(*inputs(4), "flash")
