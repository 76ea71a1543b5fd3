"""Parameter trees on disk and in memory.

In memory a model's parameters are a plain nested dict (`nnx.to_pure_dict`) whose
leaves are arrays; on disk they are one Orbax checkpoint per component. A leaf's path
is its keys joined by "/", e.g. `blocks/0/attn/qkv/kernel`.
"""

from collections.abc import Callable, Mapping
import hashlib
from typing import Any

from flax import nnx
import numpy as np


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
  """A model's static part and its parameters as a plain nested dict."""
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
  """`split` of a model that is never allocated (leaves: ShapeDtypeStruct)."""
  return split(nnx.eval_shape(make))


def flatten(params: Mapping) -> dict[str, Any]:
  """Nested dict -> path -> leaf, in the tree's order."""
  flat: dict[str, Any] = {}

  def walk(prefix, node):
    for key, value in node.items():
      if isinstance(value, Mapping):
        walk(f"{prefix}{key}/", value)
      else:
        flat[f"{prefix}{key}"] = value

  walk("", params)
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
  """The inverse of `flatten`; numeric keys become ints again (list positions)."""
  params: dict = {}
  for path, leaf in flat.items():
    *parents, last = (int(k) if k.isdecimal() else k for k in path.split("/"))
    node = params
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return params


def shapes(params: Mapping) -> dict[str, tuple[int, ...]]:
  """path -> shape."""
  return {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}


def digest(params: Mapping) -> str:
  """SHA-256 of all paths, dtypes, shapes and values, as hexadecimal digits."""
  hashed = hashlib.sha256()
  for path, leaf in sorted(flatten(params).items()):
    leaf = np.asarray(leaf)
    hashed.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
    hashed.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
  return hashed.hexdigest()


def count(params: Mapping) -> int:
  """Number of elements."""
  return sum(int(np.prod(shape)) for shape in shapes(params).values())
