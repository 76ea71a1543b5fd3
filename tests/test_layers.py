"""What the shared layers promise about placement."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lrm_jax import hlo, sharding, weights
from lrm_jax.models import layers, mmdit

CONFIG = mmdit.MMDiTConfig(
  num_layers=1,
  num_heads=2,
  head_dim=16,
  dual_layers=(0,),
  last_context_pre_only=False,
  has_output=False,
  context_dim=32,
  pooled_dim=32,
  pos_embed_size=32,
)


def collectives_of_fsdp(pairs: int) -> tuple[dict[str, int], int]:
  """(collective bytes of a gradient over 8 devices, bytes of the parameters)."""
  mesh = sharding.make_mesh(8, jax.devices()[:8])
  graphdef, params = weights.abstract(lambda: mmdit.MMDiT(CONFIG, rngs=nnx.Rngs(0)))
  places = sharding.shardings(params, mesh, ((".*", "fsdp"),))
  params = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, places
  )
  whole = sharding.batch_sharding(mesh)
  inputs = [
    jax.ShapeDtypeStruct((pairs, *shape), jnp.float32, sharding=whole)
    for shape in ((64, 64), (6, 32), (32,))
  ]

  def loss(params, patches, context, pooled):
    model = nnx.merge(graphdef, params)
    x, c = model.patch_embed(patches), model.context_embed(context)
    x, c, _, _ = model._run_blocks(x, c, model.text_embed(pooled))
    return jnp.sum(x**2) + jnp.sum(c**2)

  with jax.set_mesh(mesh):
    grad = jax.jit(jax.grad(loss), out_shardings=places)
    compiled = grad.lower(params, *inputs).compile()
  size = sum(4 * a.size for a in jax.tree.leaves(params))
  return hlo.parse(compiled.as_text()).collective_bytes, size


def test_fsdp_sends_parameters_not_activations(monkeypatch):
  """However large the batch, the parameters are gathered twice and reduced once."""
  few, size = collectives_of_fsdp(8)
  many, _ = collectives_of_fsdp(64)
  assert few == many
  assert set(few) <= {"all-gather", "all-reduce", "reduce-scatter"}
  assert few["all-gather"] <= 2 * size
  # What the pin is for: without it activations travel.
  monkeypatch.setattr(layers, "pin_batch", lambda x: x)
  assert sum(collectives_of_fsdp(64)[0].values()) > 2 * sum(many.values())


@pytest.mark.parametrize("rows, spec", [(8, P(("data", "fsdp"))), (3, P())])
def test_pin_batch(rows, spec):
  x = np.ones((rows, 4), np.float32)
  mesh = sharding.make_mesh(4, jax.devices()[:8])
  with jax.set_mesh(mesh):
    y = jax.jit(layers.pin_batch)(x)
  np.testing.assert_array_equal(y, x)
  assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), 2)


def test_pin_batch_without_a_mesh_or_on_one_device():
  x = jnp.ones((4, 2))
  assert layers.pin_batch(x) is x
  with jax.set_mesh(sharding.make_mesh(1, jax.devices()[:1])):
    assert layers.pin_batch(x) is x


@pytest.mark.parametrize("act", [layers.gelu_tanh, layers.gelu_exact])
def test_backward_of_an_mlp_keeps_two_hidden_arrays(act):
  """The activation's input, and its output for `down`'s kernel: nothing between."""
  mlp = layers.Mlp(3, 7, 3, act=act, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(mlp)
  run = lambda params, x: nnx.merge(graphdef, params)(x)  # noqa: E731
  _, vjp = jax.vjp(run, params, jnp.ones((5, 3)))
  kept = [a for a in jax.tree.leaves(vjp) if getattr(a, "shape", None) == (5, 7)]
  assert len(kept) == 2
