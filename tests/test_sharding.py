"""Meshes and placement rules on 8 fake devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lrm_jax import sharding

TREE = {
  "backbone": {
    "blocks": {"0": {"attn": {"qkv": {"kernel": (6, 16, 48), "bias": (6, 48)}}}},
    "out": {"kernel": (16, 64), "bias": (64,)},
  },
  "step": (),
}
SHAPES = jax.tree.map(
  lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
  TREE,
  is_leaf=lambda s: isinstance(s, tuple),
)


def specs(fsdp, tensor, rules):
  mesh = sharding.make_mesh(fsdp, tensor=tensor)
  placed = sharding.shardings(SHAPES, mesh, rules)
  flat = jax.tree_util.tree_leaves_with_path(placed)
  return {sharding.path_name(path): s.spec for path, s in flat}


def test_mesh_shapes():
  assert sharding.make_mesh(2, tensor=2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
  assert sharding.make_mesh(-1, tensor=2).shape == {"data": 1, "fsdp": 4, "tensor": 2}
  assert sharding.batch_size_divisor(sharding.make_mesh(2, tensor=2)) == 4
  for fsdp, tensor, name in (
    (3, 1, "mesh.fsdp=3"),
    (1, 3, "mesh.tensor=3"),
    (8, 2, ""),
  ):
    with pytest.raises(ValueError, match=name):
      sharding.make_mesh(fsdp, tensor=tensor)


def test_fsdp_splits_the_largest_axis_but_never_the_layers():
  got = specs(2, 1, ((".*", "fsdp"),))
  qkv = "backbone/blocks/0/attn/qkv"
  assert got[f"{qkv}/kernel"] == P(None, None, "fsdp")
  assert got[f"{qkv}/bias"] == P(None, "fsdp")
  assert got["backbone/out/kernel"] == P(None, "fsdp")
  assert got["step"] == P()


def test_tensor_rules_split_the_two_halves_of_a_product():
  rules = (("qkv/", "column"), ("/out/", "row"), (".*", "replicate"))
  got = specs(2, 4, rules)
  qkv = "backbone/blocks/0/attn/qkv"
  assert got[f"{qkv}/kernel"] == P(None, "fsdp", "tensor")
  assert got[f"{qkv}/bias"] == P(None, "tensor")
  assert got["backbone/out/kernel"] == P("tensor", "fsdp")
  assert got["backbone/out/bias"] == P("fsdp")  # added once, after the sum


def test_every_leaf_needs_a_rule_that_exists():
  with pytest.raises(ValueError, match="covers step"):
    specs(1, 1, (("backbone", "fsdp"),))
  with pytest.raises(ValueError, match="'split'"):
    specs(1, 1, ((".*", "split"),))


def test_put_places_host_arrays_and_bytes_fall_with_the_devices():
  value = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
  sizes = []
  for fsdp in (1, 2, 4, 8):
    mesh = sharding.make_mesh(fsdp)
    place = sharding.shardings({"w": value}, mesh, ((".*", "fsdp"),))["w"]
    array = sharding.put(value, place)
    np.testing.assert_array_equal(array, value)
    sizes.append(sharding.bytes_per_device({"w": array}))
  assert sizes == [value.nbytes // n for n in (1, 2, 4, 8)]


def test_tensor_rules_refuse_convolutions():
  mesh = sharding.make_mesh(2, tensor=2)
  conv = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32)}}
  for rule in ("column", "row"):
    with pytest.raises(ValueError, match="conv/kernel of shape .* no matrix"):
      sharding.shardings(conv, mesh, ((".*", rule),))
  placed = sharding.shardings(conv, mesh, ((".*", "fsdp"),))
  assert placed["conv"]["kernel"].spec == P(None, None, None, "fsdp")
