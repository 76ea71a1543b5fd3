"""Where arrays live: one mesh, and ordered regex rules over a whole pytree.

Mesh axes: `data` (replicas) and `fsdp` (parameters and optimizer state are split over
it; batches are split over both). Axes are Auto: the compiler propagates, we constrain
the train state and the batch only.
"""

from collections.abc import Sequence
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RULES = ("fsdp", "replicate")
BATCH_AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp) mesh over all devices.

  Raises:
    ValueError: `fsdp` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if fsdp < 1 or len(devices) % fsdp:
    raise ValueError(f"mesh.fsdp={fsdp} must divide the {len(devices)} devices")
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    BATCH_AXES,
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over all devices."""
  return NamedSharding(mesh, P(BATCH_AXES))


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
  `replicate` copies.

  Args:
    tree: arrays or ShapeDtypeStructs, e.g. a whole abstract train state.

  Raises:
    ValueError: a leaf that no rule covers, or an unknown rule.
  """
  compiled = [(re.compile(pattern), rule) for pattern, rule in rules]
  for pattern, rule in rules:
    if rule not in RULES:
      raise ValueError(f"sharding rule {rule!r} for {pattern!r}: use one of {RULES}")
  size = mesh.shape["fsdp"]

  def place(path, leaf):
    name = path_name(path)
    rule = next((rule for regex, rule in compiled if regex.search(name)), None)
    if rule is None:
      raise ValueError(f"no sharding rule covers {name}")
    spec = P()
    if rule == "fsdp" and size > 1:
      first = 1 if re.search(r"(^|/)blocks/\d+/[a-z]", name) else 0
      axes = [i for i in range(first, len(leaf.shape)) if leaf.shape[i] % size == 0]
      if axes:
        axis = max(axes, key=lambda i: leaf.shape[i])
        spec = P(*([None] * axis), "fsdp")
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)
