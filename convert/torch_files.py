"""Reading PyTorch checkpoints tensor by tensor, as numpy arrays.

safetensors files are memory-mapped; pickled files are read by torch's weights-only
unpickler, which builds tensors and plain containers and runs no code.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
import re
import zipfile

import ml_dtypes
import numpy as np
import safetensors

from lrm_jax.keymaps.engine import ConversionError

_SAFETENSORS_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Named tensors of one checkpoint.

  Attributes:
    name: what to call it in messages.
    tensors: key -> (shape, numpy dtype), known without reading data.
    read_raw: key -> array.
    metadata: the safetensors header's string metadata, {} otherwise.
  """

  name: str
  tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]
  read_raw: Callable[[str], np.ndarray]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def read(self, key: str) -> np.ndarray:
    """One tensor.

    Raises:
      ConversionError: it holds NaN or infinity, or cannot be read.
    """
    try:
      array = self.read_raw(key)
    except (safetensors.SafetensorError, OSError) as e:
      raise ConversionError(f"{self.name}: {key} cannot be read: {e}") from e
    if not _is_finite(array):
      raise ConversionError(f"{self.name}: {key} holds NaN or infinite values")
    return array

  def under(self, prefix: str) -> "Source":
    """The tensors whose key starts with `prefix` (keys keep it)."""
    kept = {k: v for k, v in self.tensors.items() if k.startswith(prefix)}
    return dataclasses.replace(self, tensors=kept)

  @property
  def nbytes(self) -> int:
    return sum(int(np.prod(s)) * d.itemsize for s, d in self.tensors.values())


def _is_finite(array: np.ndarray) -> bool:
  if array.dtype == ml_dtypes.bfloat16:  # ml_dtypes' own isfinite is much slower
    exponent = array.view(np.uint16) & 0x7F80
    return not np.any(exponent == 0x7F80)
  return bool(np.all(np.isfinite(array)))


def open_file(path: pathlib.Path) -> Source:
  """A `.safetensors` file, or a pickled `.pt`, `.pth`, `.bin`, `.ckpt`.

  Raises:
    ConversionError: missing, truncated, unknown ending or dtype.
  """
  if not path.is_file():
    raise ConversionError(f"{path} does not exist")
  if path.suffix == ".safetensors":
    return _open_safetensors([path], str(path))
  if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
    return _open_pickle(path)
  raise ConversionError(f"{path}: expected .safetensors, .pt, .pth, .bin or .ckpt")


def open_component(folder: pathlib.Path, stem: str) -> Source:
  """A component's weights in a diffusers folder: `stem.safetensors`, or shards.

  Falls back to a precision variant (`stem.fp16.safetensors`) where only that exists.

  Raises:
    ConversionError: no weights, or a shard that the index names is missing.
  """
  path, _ = find_component(folder, stem)
  if path.suffix == ".json":
    return _open_index(folder, path)
  return _open_safetensors([path], str(path))


def find_component(folder: pathlib.Path, stem: str) -> tuple[pathlib.Path, str | None]:
  """(weights file or index of shards, its precision variant such as "fp16" or None).

  Raises:
    ConversionError: there is neither.
  """
  if not folder.is_dir():
    raise ConversionError(f"{folder} does not exist")
  names = sorted(p.name for p in folder.glob(f"{stem}*"))
  variants = {
    m[1]
    for name in names
    if (m := re.match(rf"{re.escape(stem)}\.([^.-]+)[^.]*\.safetensors$", name))
    or (m := re.match(rf"{re.escape(stem)}\.safetensors\.index\.(\w+)\.json$", name))
  }
  for variant in (None, *sorted(variants)):
    dot = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{dot}.json"
    single = folder / f"{stem}{dot}.safetensors"
    for path in (index, single):
      if path.is_file():
        return path, variant
  raise ConversionError(
    f"{folder} holds no {stem}.safetensors and no {stem}.safetensors.index.json "
    f"(found: {', '.join(names) or 'no such file'})"
  )


def _open_index(folder: pathlib.Path, index: pathlib.Path) -> Source:
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, Mapping):
    raise ConversionError(f"{index} has no weight_map")
  if wrong := [v for v in weight_map.values() if not isinstance(v, str)]:
    raise ConversionError(f"{index}: {wrong[0]!r} is not a file name")
  files = [folder / name for name in sorted(set(weight_map.values()))]
  if missing := [str(f) for f in files if not f.is_file()]:
    raise ConversionError(f"{index} names files that do not exist: {missing}")
  source = _open_safetensors(files, str(index))
  problems = [
    f"{key} is in the index (file {weight_map[key]}) but in no shard"
    for key in weight_map
    if key not in source.tensors
  ]
  problems += [
    f"{key} is in a shard but not in the index"
    for key in source.tensors
    if key not in weight_map
  ]
  if problems:
    raise ConversionError(f"{index}:\n  " + "\n  ".join(problems[:20]))
  return source


def _open_safetensors(files: list[pathlib.Path], name: str) -> Source:
  where, tensors, metadata = {}, {}, {}
  for path in files:
    try:
      handle = safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as e:
      raise ConversionError(f"{path} is not a whole safetensors file: {e}") from e
    metadata.update(handle.metadata() or {})
    for key in handle.keys():
      entry = handle.get_slice(key)
      dtype = entry.get_dtype()
      if dtype not in _SAFETENSORS_DTYPES:
        raise ConversionError(
          f"{path}: {key} has dtype {dtype}; supported are "
          f"{', '.join(_SAFETENSORS_DTYPES)}"
        )
      if key in tensors:
        raise ConversionError(f"{name}: {key} is in two files")
      where[key] = path
      tensors[key] = (tuple(entry.get_shape()), _SAFETENSORS_DTYPES[dtype])

  def read(key):
    # Mapped anew for each tensor: pages of a file that stays mapped would add up to
    # the whole checkpoint in this process's memory.
    with safetensors.safe_open(where[key], framework="numpy") as handle:
      return handle.get_tensor(key)

  return Source(name, tensors, read, metadata)


def _open_pickle(path: pathlib.Path) -> Source:
  import pickle

  import torch  # the convert extra

  try:
    # Files of torch < 1.6 are no zip archives and cannot be mapped.
    mmap = zipfile.is_zipfile(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
  except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as e:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise ConversionError(
      f"{path} cannot be read as a file of tensors only: {reason}"
    ) from e
  while isinstance(state, Mapping):
    inner = [k for k in ("state_dict", "model", "module") if k in state]
    if len(inner) == 1 and isinstance(state[inner[0]], Mapping):
      state = state[inner[0]]
    else:
      break
  if not isinstance(state, Mapping) or not all(
    isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
  ):
    raise ConversionError(f"{path} does not hold a state dict (name -> tensor)")
  if all(key.startswith("module.") for key in state):
    state = {key.removeprefix("module."): value for key, value in state.items()}
  numpy_dtypes = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
  }
  if bad := [k for k, v in state.items() if v.dtype not in numpy_dtypes]:
    raise ConversionError(f"{path}: {bad[0]} has dtype {state[bad[0]].dtype}")
  tensors = {k: (tuple(v.shape), numpy_dtypes[v.dtype]) for k, v in state.items()}

  def read(key):
    tensor = state[key].detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16: same bits, other name
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return Source(str(path), tensors, read)


def read_json(path: pathlib.Path) -> dict:
  """A JSON file.

  Raises:
    ConversionError: missing or not JSON.
  """
  if not path.is_file():
    raise ConversionError(f"{path} does not exist")
  try:
    values = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ConversionError(f"{path} is not valid JSON: {e}") from e
  if not isinstance(values, dict):
    raise ConversionError(f"{path} holds a {type(values).__name__}, not an object")
  return values
