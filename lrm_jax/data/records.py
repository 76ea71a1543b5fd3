"""A preference pair on its way into a file: its fields, their defaults and checks.

Both stored formats (data/parquet.py, data/tfds_pairs.py) hold the same fields, and
latents channels first. A record is a dict:

  prompt                      text; the only field besides the latents without default
  chosen, rejected            (h w c) float32, scaled as the model sees them
  model1, model2              text, what made the images; 1 is the chosen one
  detailed_results            text, e.g. the votes
  image1_path, image2_path    text
  preference                  1 or, for a tie, 0.5
  kind                        text, a label by which results are told apart
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import functools
import glob
import io
import math
import os
import pathlib
import threading
from typing import Any

from jaxtyping import Float32
import numpy as np

from lrm_jax.data import source as source_lib
from lrm_jax.data.source import DataError

# Optional text fields, and their names in files.
TEXTS = ("model1", "model2", "detailed_results", "image1_path", "image2_path")
ALL = "all"  # the kind where there is only one
PREFERENCES = (source_lib.PREFERRED, source_lib.TIE)

_DEFAULTS = dict.fromkeys(TEXTS, "") | {
  "preference": source_lib.PREFERRED,
  "kind": ALL,
}
_REQUIRED = ("prompt", "chosen", "rejected")
_FIELDS = {*_DEFAULTS, *_REQUIRED}
_MAX_NPY_HEADER = 1 << 14
_npy_lock = threading.Lock()


def checked(
  records: Iterable[Mapping[str, Any]] | source_lib.PairSource, name: str
) -> Iterator[dict[str, Any]]:
  """Records with all fields, one after another; a source gives its pairs in order.

  Raises:
    DataError: a record that does not fit, by its number, with `name` in front.
  """
  if isinstance(records, source_lib.PairSource):
    records = records.records()
  for i, record in enumerate(records):
    where = f"{name}: record {i}"
    if unknown := sorted(set(record) - _FIELDS):
      raise DataError(f"{where}: unknown fields {unknown}; there are {sorted(_FIELDS)}")
    if missing := [field for field in _REQUIRED if field not in record]:
      raise DataError(f"{where}: lacks {missing}")
    record = {**_DEFAULTS, **record}
    for field in ("prompt", "kind", *TEXTS):
      _check_text(record[field], f"{where}: {field}")
    if not record["kind"]:
      raise DataError(f"{where}: kind is empty; leave it out where there are none")
    check_preference(record["preference"], where)
    for field in ("chosen", "rejected"):
      record[field] = _check_latent(record[field], f"{where}: {field}")
    shapes = record["chosen"].shape, record["rejected"].shape
    if shapes[0] != shapes[1]:
      raise DataError(
        f"{where}: chosen has shape {shapes[0]} (h w c), rejected {shapes[1]}; "
        "the two images of a pair need one size"
      )
    yield record


def _check_text(value: Any, where: str) -> None:
  if not isinstance(value, str):
    raise DataError(f"{where} is {value!r}, should be text (str)")
  try:
    value.encode()
  except UnicodeEncodeError as e:  # e.g. from a file name that is not UTF-8
    raise DataError(f"{where} is {value!r}, which UTF-8 cannot express") from e


def check_preference(value: Any, where: str) -> float:
  """The preference as a float, or a DataError where it is none of PREFERENCES."""
  if not any(value == allowed for allowed in PREFERENCES):
    raise DataError(
      f"{where}: preference {value!r}, should be 1 (chosen is preferred) or 0.5 (a "
      "tie); where the other image is preferred, swap the two"
    )
  return float(value)


def _check_latent(value: Any, where: str) -> np.ndarray:
  latent = np.asarray(value)
  if latent.dtype != np.float32:  # any other would not come back bit for bit
    raise DataError(f"{where}: dtype {latent.dtype}, should be float32")
  if latent.ndim != 3 or 0 in latent.shape:
    raise DataError(f"{where}: shape {latent.shape}, should be (h w c)")
  return source_lib.check_latent(latent, latent.shape, where)


def channels_first(
  latent: Float32[np.ndarray, "h w c"],
) -> Float32[np.ndarray, "c h w"]:
  """(h w c) -> (c h w), contiguous: the order in files."""
  return np.ascontiguousarray(np.moveaxis(latent, -1, 0))


def channels_last(latent: np.ndarray) -> np.ndarray:
  """(c h w) -> (h w c), contiguous.

  Also a copy for its own sake: a view would keep all of the row group or record that
  it points into in memory for as long as the pair waits in a batch.
  """
  return np.ascontiguousarray(np.moveaxis(latent, 0, -1))


def encode_npy(array: np.ndarray) -> bytes:
  """The bytes of a .npy file."""
  stream = io.BytesIO()
  np.lib.format.write_array(stream, array, allow_pickle=False)
  return stream.getvalue()


def decode_npy(data: Any) -> np.ndarray:
  """The array in the bytes of a .npy file, as a read-only view of them.

  Args:
    data: anything with the buffer protocol.

  Raises:
    ValueError: no such bytes, cut short, too long, or an array of Python objects.
  """
  view = memoryview(data)
  shape, fortran_order, dtype, start = _npy_header(bytes(view[:_MAX_NPY_HEADER]))
  if dtype.hasobject:
    raise ValueError("an array of Python objects (they are never unpickled)")
  expected = math.prod(shape) * dtype.itemsize
  found = view.nbytes - start
  if min(shape, default=0) < 0 or found != expected:
    raise ValueError(f"{found} bytes of data, shape {shape} needs {expected}")
  array = np.frombuffer(view, dtype, math.prod(shape), start)
  return array.reshape(shape, order="F" if fortran_order else "C")


def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
  """(shape, fortran_order, dtype, where the values begin) of a .npy file's start."""
  # A header says its length after the magic string: 2 bytes, from version 2 on 4.
  end = 0
  if data[:6] == b"\x93NUMPY" and len(data) > 12:
    end = 10 + int.from_bytes(data[8:10], "little")
    if data[6] > 1:
      end = 12 + int.from_bytes(data[8:12], "little")
  # The few different headers of a data set are parsed once. And by one thread at a
  # time: NumPy evaluates them with `ast`, which is not safe to run in several threads
  # in CPython 3.11 ("AST constructor recursion depth mismatch").
  with _npy_lock:
    return _parse_npy_header(data[:end] or data[:16])


@functools.lru_cache(maxsize=256)
def _parse_npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
  stream = io.BytesIO(data)
  version = np.lib.format.read_magic(stream)
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    raise ValueError(f".npy format version {version}")
  try:
    return *readers[version](stream), stream.tell()
  except (SyntaxError, TypeError) as e:  # NumPy evaluates the header as Python
    raise ValueError(f"the .npy header is damaged: {e}") from e


def some_of(names: Iterable[Any], limit: int = 10) -> str:
  """The names, or the first `limit` and how many more there are."""
  names = [str(name) for name in names]
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary sibling that becomes `path` only if all goes well.

  There is always either the old file or the whole new one under that name.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  stale = glob.escape(f".{path.name}.partial-") + "*"  # left by runs that were killed
  for partial in path.parent.glob(stale):
    partial.unlink(missing_ok=True)
  partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
  try:
    yield partial
    with open(partial, "rb+") as file:
      os.fsync(file.fileno())  # before the rename: a machine may lose power
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
