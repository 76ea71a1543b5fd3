"""Where arrays live: one mesh, and ordered regex rules over a whole pytree.

Mesh axes: `data` (replicas), `fsdp` (parameters and optimizer state are split over it;
batches are split over both), `tensor` (single matrix products are split over it). Axes
are Auto: the compiler propagates, we constrain the train state and the batch only.
"""

from collections.abc import Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RULES = ("fsdp", "replicate", "column", "row")
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
  fsdp: int = 1, devices: Sequence[jax.Device] | None = None, *, tensor: int = 1
) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices; `data` takes what the others leave.

  Args:
    fsdp: devices that share one copy of the parameters; -1 for all of them.
    tensor: devices that share one matrix product.

  Raises:
    ValueError: `fsdp * tensor` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if tensor < 1 or len(devices) % tensor:
    raise ValueError(f"mesh.tensor={tensor} must divide the {len(devices)} devices")
  if fsdp == -1:
    fsdp = len(devices) // tensor
  if fsdp < 1 or len(devices) % (fsdp * tensor):
    raise ValueError(
      f"mesh.fsdp={fsdp} times mesh.tensor={tensor} must divide the {len(devices)} "
      "devices"
    )
  return jax.make_mesh(
    (len(devices) // (fsdp * tensor), fsdp, tensor),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def batch_size_divisor(mesh: Mesh) -> int:
  """Batches split into this many parts: the devices that do not share a product."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """The batch axis over `data` and `fsdp`; `leading` axes before it are not split."""
  return NamedSharding(mesh, P(*([None] * leading), BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def path_name(path: tuple) -> str:
  """A jax key path as `params/blocks/0/attn/qkv/kernel`."""
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
  )


def shardings(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, str]]) -> Any:
  """A NamedSharding for every leaf: the first rule whose regex is found in its path.

  `fsdp` splits the largest axis that the mesh's fsdp size divides (never the leading
  layer axis of stacked blocks, which a scan slices) and replicates what has none;
  `replicate` copies. `column` and `row` are Megatron's two halves of a pair of matrix
  products (Shoeybi et al. 2019): the last, or the last but one, axis of a matrix over
  `tensor`, and the largest other axis as `fsdp` does. A vector under `row` belongs to
  the sum of the parts and is not split over `tensor`. Convolutions are refused: with
  input channels split over `tensor` and the batch over two other axes, jax 0.10.2's
  partitioner computed wrong sums.

  Args:
    tree: arrays or ShapeDtypeStructs, e.g. a whole abstract train state.

  Raises:
    ValueError: a leaf that no rule covers, an unknown rule, or a convolution under
      `column` or `row`.
  """
  compiled = [(re.compile(pattern), rule) for pattern, rule in rules]
  for pattern, rule in rules:
    if rule not in RULES:
      raise ValueError(f"sharding rule {rule!r} for {pattern!r}: use one of {RULES}")

  def place(path, leaf):
    name = path_name(path)
    rule = next((rule for regex, rule in compiled if regex.search(name)), None)
    if rule is None:
      raise ValueError(f"no sharding rule covers {name}")
    stacked = re.search(r"(^|/)blocks/\d+/[a-z]", name) is not None
    first = 1 if stacked else 0
    spec: list[str | None] = [None] * len(leaf.shape)

    def split(axis_name: str, axes: Sequence[int]):
      size = mesh.shape[axis_name]
      fitting = [i for i in axes if leaf.shape[i] % size == 0 and spec[i] is None]
      if size > 1 and fitting:
        spec[max(fitting, key=lambda i: leaf.shape[i])] = axis_name

    rank = len(leaf.shape) - first
    if rule in ("column", "row") and rank > 2:
      raise ValueError(
        f"sharding rule {rule!r} covers {name} of shape {leaf.shape}, which is no "
        "matrix: put a row such as ('^params/head/', 'fsdp') before it"
      )
    if rule == "column" and rank > 0:
      split("tensor", [len(leaf.shape) - 1])
    if rule == "row" and rank == 2:
      split("tensor", [len(leaf.shape) - 2])
    if rule != "replicate":
      split("fsdp", range(first, len(leaf.shape)))
    while spec and spec[-1] is None:  # P("fsdp") rather than P("fsdp", None)
      spec.pop()
    return NamedSharding(mesh, P(*spec))

  return jax.tree_util.tree_map_with_path(place, tree)


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
  """A host array, the same on every process, as a global array.

  Unlike `jax.device_put` it does not ask all processes to compare their copies.
  """
  return jax.make_array_from_callback(leaf.shape, sharding, lambda i: leaf[i])


def bytes_per_device(tree: Any) -> int:
  """Bytes that one device holds of a tree of placed arrays or ShapeDtypeStructs."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shape) * leaf.dtype.itemsize
  return total
