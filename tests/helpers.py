"""Shared by the tests: errors, layouts, golden files, torch state dicts to models."""

from collections.abc import Callable, Mapping
import json
import pathlib

from flax import nnx
import numpy as np
from safetensors.numpy import load_file

from lrm_jax import weights
from lrm_jax.keymaps import engine

GOLDEN = pathlib.Path(__file__).resolve().parent / "data" / "golden"


def rel_err(got, want) -> float:
  """||got - want|| / ||want||; shapes must agree."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def nhwc(x) -> np.ndarray:
  """NCHW -> NHWC."""
  return np.asarray(x).transpose(0, 2, 3, 1)


def nchw(x) -> np.ndarray:
  """NHWC -> NCHW."""
  return np.asarray(x).transpose(0, 3, 1, 2)


def golden(path: str) -> dict[str, np.ndarray]:
  """A safetensors file below `tests/data/golden`, e.g. `dina/expected`."""
  return load_file(GOLDEN / f"{path}.safetensors")


def golden_config(path: str) -> dict:
  """A JSON file below `tests/data/golden`, e.g. `dina/sd35/vae/config`."""
  return json.loads((GOLDEN / f"{path}.json").read_text())


def load(
  make: Callable[[], nnx.Module],
  keymap: engine.Keymap,
  state: Mapping[str, np.ndarray],
) -> tuple[nnx.GraphDef, dict]:
  """(graphdef, params) of the model that `make` builds, filled from a state dict.

  The params are a nested dict of numpy arrays.
  """
  graphdef, abstract = weights.abstract(make)
  source = {key: (array.shape, array.dtype) for key, array in state.items()}
  leaves = engine.fill(keymap, source, weights.shapes(abstract), state.__getitem__)
  return graphdef, weights.unflatten(leaves)


def assert_round_trip(
  make: Callable[[], nnx.Module],
  keymap: engine.Keymap,
  state: Mapping[str, np.ndarray],
):
  """Importing and exporting gives back the same keys and the same bits."""
  _, params = load(make, keymap, state)
  back = dict(engine.export(keymap, weights.flatten(params)))
  assert back.keys() == state.keys()
  for key, array in state.items():
    assert back[key].dtype == array.dtype, key
    np.testing.assert_array_equal(back[key], array, err_msg=key)


def numpy_state(module) -> dict[str, np.ndarray]:
  """A torch module's state dict as numpy."""
  return {key: tensor.numpy().copy() for key, tensor in module.state_dict().items()}
