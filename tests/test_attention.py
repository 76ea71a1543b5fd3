"""The choice of attention kernel, and the padding that cuDNN needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize(
  "platform, dtype, choice",
  [
    ("cpu", jnp.bfloat16, "xla"),
    ("tpu", jnp.bfloat16, "xla"),
    ("gpu", jnp.bfloat16, "cudnn"),
    ("gpu", jnp.float16, "cudnn"),
    ("gpu", jnp.float32, "xla"),
  ],
)
def test_automatic_choice(monkeypatch, platform, dtype, choice):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert attention.resolve("auto", dtype) == choice
  assert attention.resolve("auto", jnp.dtype(dtype)) == choice
  for explicit in ("xla", "cudnn"):
    assert attention.resolve(explicit, dtype) == explicit


def test_unknown_implementation():
  with pytest.raises(ValueError, match="'flash': use one of .*auto.*xla.*cudnn"):
    attention.attention(*inputs(4), "flash")
