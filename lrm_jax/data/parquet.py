"""Preference pairs in the released layout: parquet parts and an index of their rows.

```
DIR/bucket_index.csv   one line per pair: where it lies, its size and bucket
DIR/*.parquet          the pairs, in row groups; docs/data.md lists the columns
```

A row group is the smallest thing that can be read, so pairs of one row group should
be asked for at about the same time: `block` tells which they are.

Axes: n pairs, h w c latent, in files c h w.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import csv
import dataclasses
import functools
import os
import pathlib
from typing import Any, SupportsIndex

from jaxtyping import Int
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from lrm_jax.data import lru
from lrm_jax.data import records as records_lib
from lrm_jax.data import source as source_lib
from lrm_jax.data.source import DataError

INDEX = "bucket_index.csv"
INDEX_COLUMNS = (
  "global_id",
  "parquet_path",
  "row_group",
  "row_index",
  "width",
  "height",
  "bucket_id",
)
KIND = "kind"  # optional, in the index as in the parts
# Left by convert/precompute_latents.py from its start on; the index comes at its end.
PRECOMPUTE = "precompute.json"
PIXELS_PER_CELL = 8  # of SD3.5's autoencoder, along a side
SUFFIX = ".parquet"

_SHAPES = ("latent1_shape", "latent2_shape")
_NEEDED = ("prompt", "latent1", "latent2", *_SHAPES)
_SCHEMA = pa.schema(
  [
    *((name, pa.string()) for name in ("prompt", *records_lib.TEXTS)),
    *((name, pa.binary()) for name in ("latent1", "latent2")),
    *((name, pa.list_(pa.int64())) for name in _SHAPES),
    ("preference", pa.float32()),
    (KIND, pa.string()),
  ]
)
# The names once more in each part: nothing else guards the footer, and a flipped bit in
# the name of an optional column would pass for a part without that column.
_COLUMNS_KEY = b"lrm_jax.columns"
_SCHEMA = _SCHEMA.with_metadata({_COLUMNS_KEY: ",".join(_SCHEMA.names)})
_REPEATED = ["prompt", "model1", "model2", KIND]  # worth a dictionary
_REPAIR = f"restore or rebuild that part, or remove its rows from {INDEX}"
_SCAN_THREADS = 8  # footers and small columns: waiting for storage, mostly
_MAX_FOOTERS = 32  # a footer lists every column of every row group: megabytes in memory


# Writing.


def write_part(
  path: str | os.PathLike,
  records: Iterable[Mapping[str, Any]] | source_lib.PairSource,
  *,
  rows_per_group: int,
  force: bool = False,
) -> int:
  """Writes one part; it appears complete or not at all. Returns its number of pairs.

  Holds one row group of pairs in memory. The rows keep their order, and the pairs of a
  row group have latents of one shape (see `block`): give records ordered by size, for
  those that change it all the time end up one per row group.

  Args:
    records: dicts as in data/records.py, or a source.
    rows_per_group: the most pairs that are read together; one of 1024 x 1024 pixels is
      2 MiB.
    force: replace an existing part.

  Raises:
    DataError: a record that does not fit.
    FileExistsError: the part exists and `force` is not given.
  """
  path = pathlib.Path(path)
  if path.suffix != SUFFIX:
    raise ValueError(f"{path}: the name of a part must end in {SUFFIX}")
  if rows_per_group < 1:
    raise ValueError(f"rows_per_group={rows_per_group} must be 1 or more")
  if path.exists() and not force:
    raise FileExistsError(f"{path} exists; pass force=True to replace it")
  try:
    with records_lib.replace_file(path) as partial:
      return _write(partial, records_lib.checked(records, str(path)), rows_per_group)
  except OSError as e:
    if e.filename is None:  # Arrow does not say which file it could not write
      e.filename = str(path)
    raise


def _write(
  file: pathlib.Path, records: Iterable[dict[str, Any]], rows_per_group: int
) -> int:
  count, group, shape = 0, [], None
  with pq.ParquetWriter(
    file,
    _SCHEMA,
    compression="zstd",
    use_dictionary=_REPEATED,
    write_statistics=False,
    # Neither zstd nor parquet would notice a flipped bit otherwise.
    write_page_checksum=True,
  ) as writer:
    for record in records:
      if record["chosen"].shape != shape:
        count += _write_group(writer, group)
        shape = record["chosen"].shape
      group.append(_row(record))
      if len(group) == rows_per_group:
        count += _write_group(writer, group)
    count += _write_group(writer, group)
  return count


def _row(record: dict[str, Any]) -> dict[str, Any]:
  chosen, rejected = (
    records_lib.channels_first(record[name]) for name in ("chosen", "rejected")
  )
  return {
    **{name: record[name] for name in ("prompt", *records_lib.TEXTS, "preference")},
    KIND: record["kind"],
    "latent1": records_lib.encode_npy(chosen),
    "latent2": records_lib.encode_npy(rejected),
    "latent1_shape": chosen.shape,
    "latent2_shape": rejected.shape,
  }


def _write_group(writer: pq.ParquetWriter, group: list[dict[str, Any]]) -> int:
  """Writes and empties a row group; returns how many rows it had."""
  count = len(group)
  if count:
    columns = {name: [row[name] for row in group] for name in _SCHEMA.names}
    group.clear()
    writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=count)
  return count


def write_index(
  folder: str | os.PathLike, *, pixels_per_cell: int = PIXELS_PER_CELL
) -> pathlib.Path:
  """Writes `bucket_index.csv` over all parts in a folder, in the order of their names.

  Bucket ids are image sizes, "HEIGHTxWIDTH" in pixels. An existing index is replaced.

  Args:
    pixels_per_cell: of the image along a side of a latent's cell.

  Raises:
    DataError: no parts, an unreadable one, or pairs that do not fit together.
  """
  folder = pathlib.Path(folder)
  index = _scan(folder, pixels_per_cell)
  names = [os.path.relpath(file, folder) for file in index.files]
  with records_lib.replace_file(folder / INDEX) as partial:
    with open(partial, "w", newline="", encoding="utf-8") as file:
      writer = csv.writer(file, lineterminator="\n")
      writer.writerow([*INDEX_COLUMNS, KIND])
      columns = (index.file, index.row_group, index.row, index.bucket, index.kind)
      rows = zip(*(column.tolist() for column in columns), strict=True)
      for i, (part, row_group, row, bucket, kind) in enumerate(rows):
        bucket_id, height, width = index.buckets[bucket]
        writer.writerow(
          (
            i,
            names[part],
            row_group,
            row,
            width,
            height,
            bucket_id,
            index.kind_names[kind],
          )
        )
  return folder / INDEX


# Reading.


@dataclasses.dataclass(frozen=True)
class Index:
  """Where each pair lies, and what is known of it without reading it.

  Attributes:
    name: what it was made from, for error messages.
    files: paths of the parts.
    file, row_group, row: place of each pair; `row` counts within the row group.
    bucket: of each pair, index of `buckets`.
    buckets: (bucket_id, height, width), pixels.
    kind: of each pair, index of `kind_names`.
  """

  name: str
  files: tuple[str, ...]
  file: Int[np.ndarray, " n"]
  row_group: Int[np.ndarray, " n"]
  row: Int[np.ndarray, " n"]
  bucket: Int[np.ndarray, " n"]
  buckets: tuple[tuple[str, int, int], ...]
  kind: Int[np.ndarray, " n"]
  kind_names: tuple[str, ...]


def read_index(folder: str | os.PathLike) -> Index:
  """The folder's `bucket_index.csv`, or the same made by looking into every part.

  Parts are looked for where the index says, if that is an absolute path, then at this
  path below the folder, then at its last component in the folder.

  Raises:
    DataError: no such folder, one that is still being precomputed, an index that is
      damaged, incomplete or contradicts itself, missing parts.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise DataError(f"{folder}: no such folder")
  path = folder / INDEX
  if not path.exists() and (folder / PRECOMPUTE).exists():
    raise DataError(
      f"{folder}: holds {PRECOMPUTE} but no {INDEX}: its pairs are not all there yet; "
      "run convert/precompute_latents.py again, with the same arguments and on every "
      "host that shares the work, until it is finished"
    )
  return _read_csv(path) if path.exists() else _scan(folder, PIXELS_PER_CELL)


def _read_csv(path: pathlib.Path) -> Index:
  numbers = ("row_group", "row_index", "width", "height")
  texts = ("global_id", "parquet_path", "bucket_id", KIND)
  options = pa_csv.ConvertOptions(
    # Tools that had missing values in between write 64 as 64.0.
    column_types=dict.fromkeys(numbers, pa.float64())
    | dict.fromkeys(texts, pa.string()),
  )
  try:
    table = pa_csv.read_csv(path, convert_options=options)
  except (pa.ArrowException, OSError) as e:
    raise DataError(f"{path}: not a readable index ({_line(e)}); rebuild it") from e
  if missing := [name for name in INDEX_COLUMNS if name not in table.column_names]:
    raise DataError(f"{path}: lacks the columns {missing}; has {table.column_names}")
  if not len(table):
    raise DataError(f"{path}: names no pairs")
  column = {name: _whole_numbers(path, table, name) for name in numbers}
  for name in ("width", "height"):
    _refuse(path, column[name] < 1, lambda i, n=name: f"{n} is {column[n][i]}")
  ids = table["global_id"]
  if pc.count_distinct(ids).as_py() != len(ids):
    _refuse(path, _repeated(_codes(ids)[0]), lambda i: f"global_id {ids[i]} again")

  file, given = _codes(table["parquet_path"])
  bucket_id, bucket_ids = _codes(table["bucket_id"])
  # The size belongs to the key: old indices may number buckets of another table.
  first, bucket = _distinct(bucket_id, column["height"], column["width"])
  kind, kind_names = np.zeros(len(table), np.int32), (records_lib.ALL,)
  # Kinds are what the index says. To learn them from the parts, every one of them would
  # have to be opened, which takes minutes where there are thousands.
  if KIND in table.column_names:
    kind, kind_names = _sorted_codes(*_codes(table[KIND]))
    if "" in kind_names:
      raise DataError(
        f"{path}: kind is empty in some lines; name it or drop the column"
      )
  index = Index(
    name=str(path),
    files=_find_parts(path, given),
    file=file,
    row_group=column["row_group"],
    row=column["row_index"],
    bucket=bucket,
    buckets=tuple(
      (bucket_ids[bucket_id[i]], int(column["height"][i]), int(column["width"][i]))
      for i in first
    ),
    kind=kind,
    kind_names=kind_names,
  )
  _refuse(
    path,
    _repeated(index.file, index.row_group, index.row),
    lambda i: (
      f"{given[file[i]]}, row group {index.row_group[i]}, row {index.row[i]} again"
    ),
  )
  return index


def _refuse(path: pathlib.Path, bad: np.ndarray, problem: Callable[[int], str]) -> None:
  """Raises for the first line that is bad."""
  if bad.any():
    i = int(np.argmax(bad))
    raise DataError(f"{path}: line {i + 2}: {problem(i)}; correct or rebuild the index")


def _whole_numbers(path: pathlib.Path, table: pa.Table, name: str) -> np.ndarray:
  numbers = table[name].to_numpy()  # NaN where empty
  good = (numbers >= 0) & (numbers < 2**31) & (numbers == np.floor(numbers))
  _refuse(path, ~good, lambda i: f"{name} is {numbers[i]}, should be a whole number")
  return numbers.astype(np.int32)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
  """Each text as the index of the distinct ones, in order of appearance."""
  encoded = column.combine_chunks().dictionary_encode()
  return encoded.indices.to_numpy().astype(np.int32), encoded.dictionary.to_pylist()


def _sorted_codes(
  codes: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
  order = sorted(range(len(names)), key=lambda i: names[i])
  return np.argsort(order).astype(np.int32)[codes], tuple(names[i] for i in order)


def _distinct(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Distinct rows of columns of whole numbers, in ascending order.

  Returns the first place of each, and for each row which of them it is.
  (np.unique(axis=0) does the same, ten times slower on a million rows.)
  """
  codes = np.zeros(len(columns[0]), np.int64)
  for column in columns:
    key = codes * (int(column.max()) + 1) + column
    _, first, codes = np.unique(key, return_index=True, return_inverse=True)
  return first, codes.astype(np.int32)


def _repeated(*columns: np.ndarray) -> np.ndarray:
  """Which rows are repetitions of an earlier one."""
  bad = np.ones(len(columns[0]), bool)
  bad[_distinct(*columns)[0]] = False
  return bad


def _find_parts(path: pathlib.Path, given: Sequence[str]) -> tuple[str, ...]:
  found, missing = {}, []
  for name in given:
    # Joining drops the folder where the path is absolute.
    places = (path.parent / name, path.parent / pathlib.PurePath(name).name)
    file = next((str(place) for place in places if place.is_file()), None)
    if file is None:
      missing.append(name)
    elif file in found:
      raise DataError(
        f"{path}: {found[file]} and {name} would both be read from {file}; correct the "
        "paths in the index"
      )
    else:
      found[file] = name
  if missing:
    raise DataError(
      f"{path}: {len(missing)} of {len(given)} parts are missing: "
      f"{records_lib.some_of(missing)}; restore them into {path.parent}, or remove "
      "their rows from the index"
    )
  return tuple(found)


def _scan(folder: pathlib.Path, pixels_per_cell: int) -> Index:
  """The index of all parts in a folder, from their small columns."""
  files = [str(f) for f in sorted(folder.glob(f"*{SUFFIX}")) if f.is_file()]
  if not files:
    raise DataError(f"{folder}: holds neither {INDEX} nor parts (*{SUFFIX})")
  with futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
    scans = list(pool.map(_scan_part, files))
  file = np.repeat(np.arange(len(files)), [len(scan.row) for scan in scans])
  if not len(file):
    raise DataError(f"{folder}: its {len(files)} parts hold no pairs")
  row_group, row, kind, shape = (
    np.concatenate([getattr(scan, name) for scan in scans])
    for name in ("row_group", "row", "kind", "shape")
  )
  first, bucket = _distinct(*shape.T)
  shapes = shape[first]  # c h w
  if len(channels := np.unique(shapes[:, 0])) > 1:
    raise DataError(
      f"{folder}: latents of {records_lib.some_of(channels)} channels; put those of "
      "different autoencoders into different folders"
    )
  pixels = [(int(h) * pixels_per_cell, int(w) * pixels_per_cell) for _, h, w in shapes]
  kinds, kind = np.unique(kind, return_inverse=True)
  return Index(
    name=str(folder),
    files=tuple(files),
    file=file.astype(np.int32),
    row_group=row_group,
    row=row,
    bucket=bucket,
    buckets=tuple((f"{h}x{w}", h, w) for h, w in pixels),
    kind=kind.astype(np.int32),
    kind_names=tuple(str(name) for name in kinds),
  )


@dataclasses.dataclass(frozen=True)
class _Scan:
  row_group: Int[np.ndarray, " n"]
  row: Int[np.ndarray, " n"]
  shape: Int[np.ndarray, "n 3"]  # c h w
  kind: np.ndarray  # (n,) texts


def _scan_part(file: str) -> _Scan:
  with _reading(file), _open(file) as part:
    columns = [*_SHAPES, *([KIND] if KIND in part.schema_arrow.names else [])]
    sizes = [part.metadata.row_group(i).num_rows for i in range(part.num_row_groups)]
    table = part.read(columns)
    if len(table) != sum(sizes):
      raise DataError(f"{file}: {len(table)} rows, {sum(sizes)} announced; {_REPAIR}")
    first, second = (_shapes(table[name], f"{file}: {name}") for name in _SHAPES)
    kind = np.full(len(table), records_lib.ALL)
    if KIND in columns:
      if table[KIND].null_count or pc.any(pc.equal(table[KIND], "")).as_py():
        raise DataError(f"{file}: kind is empty in some rows")
      kind = np.array(table[KIND].to_pylist(), dtype=str)
  differ = (first != second).any(axis=1)
  starts = np.cumsum([0, *sizes])
  row_group = np.repeat(np.arange(len(sizes)), sizes)
  row = np.arange(len(table)) - starts[row_group]
  if differ.any():
    i = int(np.argmax(differ))
    raise DataError(
      f"{file}: row group {row_group[i]}, row {row[i]}: latents of shapes "
      f"{tuple(first[i].tolist())} and {tuple(second[i].tolist())} (c h w); the two "
      "images of a pair need one size"
    )
  return _Scan(row_group.astype(np.int32), row.astype(np.int32), first, kind)


def _shapes(column: pa.ChunkedArray, where: str) -> np.ndarray:
  """(n, 3) of a column of lists."""
  lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
  if (lengths != 3).any():
    i = int(np.argmax(lengths != 3))
    raise DataError(f"{where}: row {i} is {column[i].as_py()}, should be [c, h, w]")
  shapes = pc.list_flatten(column).to_numpy().reshape(-1, 3)
  if not (np.issubdtype(shapes.dtype, np.integer) and (shapes > 0).all()):
    raise DataError(f"{where}: has rows that are not three positive whole numbers")
  return shapes.astype(np.int64)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
  """Turns what Arrow raises on files it cannot read into one kind of error."""
  try:
    yield
  except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
    raise DataError(f"{where}: cannot be read ({_line(e)}); {_REPAIR}") from e


def _line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open(file: str, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
  """A part, with the columns it should have.

  Opened anew for each row group: handles are not safe to share between threads, and
  with thousands of parts too many to keep.

  Raises:
    DataError: other columns.
  """
  part = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True)
  try:
    if footer is None:
      _check_columns(file, part.schema_arrow)
  except DataError:
    part.close()
    raise
  return part


def _check_columns(file: str, schema: pa.Schema) -> None:
  if missing := [name for name in _NEEDED if name not in schema.names]:
    raise DataError(f"{file}: lacks the columns {missing}; has {schema.names}")
  told = (schema.metadata or {}).get(_COLUMNS_KEY)
  if told is not None and told != ",".join(schema.names).encode():
    raise DataError(
      f"{file}: its footer is damaged: columns {schema.names}, written were {told}; "
      f"{_REPAIR}"
    )
  types = pa.types
  text = (types.is_string, types.is_large_string)
  allowed = {
    **dict.fromkeys(("prompt", KIND, *records_lib.TEXTS), text),
    **dict.fromkeys(("latent1", "latent2"), (types.is_binary, types.is_large_binary)),
    **dict.fromkeys(_SHAPES, (types.is_list, types.is_large_list)),
    "preference": (types.is_floating, types.is_integer),
  }
  for field in schema:
    kind = field.type
    if types.is_dictionary(kind):
      kind = kind.value_type
    if field.name in allowed and not any(is_(kind) for is_ in allowed[field.name]):
      raise DataError(f"{file}: column {field.name} is of type {field.type}")


class ParquetPairs(source_lib.PairSource):
  """The pairs of a folder in the released layout, as a random access source.

  Opening reads the index and a few small cells; everything else is checked as it is
  read. Safe to use from threads, and to send to other processes.

  Args:
    folder: holds the parts and, usually, `bucket_index.csv` (see `read_index`).
    cache_blocks: row groups kept decoded in memory. Fewer than the reading threads
      work on at once, and row groups are read again and again.

  Raises:
    DataError: on opening as `read_index`, and where the sizes in the index are not
      those of the latents; on reading, for a part or row group that is damaged, whose
      columns are not as they should be or that lacks a row, and for a row that is not
      what the index says, is not finite, or whose preference is neither 1 nor 0.5.
    ValueError: cache_blocks below 1.
  """

  def __init__(self, folder: str | os.PathLike, *, cache_blocks: int = 8):
    if cache_blocks < 1:
      raise ValueError(f"cache_blocks={cache_blocks} must be 1 or more")
    self.name = str(folder)
    self._cache_blocks = cache_blocks
    index = read_index(folder)
    self._files = index.files
    self._row = index.row
    self._kind = index.kind
    self.kind_names = index.kind_names
    # Blocks are numbered by file and row group; `_blocks_of` relies on that.
    first, self.block = _distinct(index.file, index.row_group)
    self._place = np.stack([index.file, index.row_group], axis=1)[first]
    self._rows_named = np.zeros(len(self._place), np.int64)  # by the index, per block
    np.maximum.at(self._rows_named, self.block, self._row + 1)
    self._make_caches()
    self.latent_shapes, self.bucket = self._buckets(index)

  def _make_caches(self) -> None:
    self._footers = lru.Cache(_MAX_FOOTERS, self._read_footer)
    self._blocks = lru.Cache(
      self._cache_blocks, functools.partial(self._read_block, columns=_NEEDED)
    )

  def __getstate__(self) -> dict[str, Any]:
    # The index travels along: read again elsewhere, it might not be the same any more.
    state = dict(self.__dict__)
    del state["_footers"], state["_blocks"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._make_caches()

  def __getitem__(self, index: SupportsIndex) -> source_lib.Pair:
    index = self._check(index)
    return self._pair(index, self._blocks[int(self.block[index])])

  def records(self) -> Iterator[dict[str, Any]]:
    columns = (*_NEEDED, *records_lib.TEXTS)
    blocks = lru.Cache(
      self._cache_blocks, functools.partial(self._read_block, columns=columns)
    )
    for i in range(len(self)):
      table = blocks[int(self.block[i])]
      pair = self._pair(i, table)
      texts = {
        name: table[name][int(self._row[i])].as_py() or ""
        for name in records_lib.TEXTS
        if name in table.column_names
      }
      yield {
        "prompt": pair["prompt"],
        "chosen": pair["chosen"],
        "rejected": pair["rejected"],
        "preference": float(pair["preference"]),
        "kind": self.kind_names[int(pair["kind"])],
        **texts,
      }

  def _check(self, index: SupportsIndex) -> int:
    index = index.__index__()
    if not 0 <= index < len(self):
      raise IndexError(f"pair {index} of {len(self)} in {self.name}")
    return index

  def _where(self, index: int) -> str:
    file, row_group = self._place[self.block[index]]
    return f"{self._files[file]}: row group {row_group}, row {self._row[index]}"

  def _pair(self, index: int, table: pa.Table) -> source_lib.Pair:
    where, row = self._where(index), int(self._row[index])
    shape = self.latent_shapes[self.bucket[index]]
    prompt = table["prompt"][row].as_py()
    if prompt is None:
      raise DataError(f"{where}: has no prompt; {_REPAIR}")
    preference = source_lib.PREFERRED
    if "preference" in table.column_names:
      value = table["preference"][row].as_py()
      preference = records_lib.check_preference(value, where)
    chosen, rejected = (
      _latent(table[name][row], table[f"{name}_shape"][row], shape, f"{where}, {name}")
      for name in ("latent1", "latent2")
    )
    return source_lib.Pair(
      chosen=chosen,
      rejected=rejected,
      prompt=prompt,
      preference=np.float32(preference),
      kind=np.int32(self._kind[index]),
      index=np.int64(index),
    )

  def _read_footer(self, file: int) -> tuple[pq.FileMetaData, frozenset[str]]:
    """The footer of a part and its columns, once it agrees with the index."""
    path = self._files[file]
    with _reading(path), _open(path) as part:
      footer, columns = part.metadata, frozenset(part.schema_arrow.names)
      first, end = np.searchsorted(self._place[:, 0], (file, file + 1))
      for block in range(first, end):
        row_group, rows = int(self._place[block, 1]), int(self._rows_named[block])
        if row_group >= footer.num_row_groups:
          raise DataError(
            f"{path}: has {footer.num_row_groups} row groups, the index names row "
            f"group {row_group}; rebuild the index or restore the part"
          )
        found = footer.row_group(row_group).num_rows
        if rows > found:
          raise DataError(
            f"{path}: row group {row_group} has {found} rows, the index names row "
            f"{rows - 1} of it (rows count from 0 in each row group); rebuild the "
            "index or restore the part"
          )
    return footer, columns

  def _read_block(self, block: int, columns: Sequence[str]) -> pa.Table:
    file, row_group = (int(number) for number in self._place[block])
    path = self._files[file]
    footer, there = self._footers[file]
    columns = [name for name in (*columns, "preference") if name in there]
    with _reading(f"{path}: row group {row_group}"), _open(path, footer) as part:
      table = part.read_row_group(row_group, columns)
      table.validate(full=True)
    expected = footer.row_group(row_group).num_rows
    if len(table) != expected:
      raise DataError(
        f"{path}: row group {row_group}: {len(table)} of {expected} rows; {_REPAIR}"
      )
    return table

  def _buckets(
    self, index: Index
  ) -> tuple[tuple[tuple[int, int, int], ...], np.ndarray]:
    """(h, w, c) of each bucket, and the bucket of each pair.

    From the first pair of each of the index's buckets; that the others are alike is
    checked when they are read. Buckets of equal latents become one.
    """
    _, firsts = np.unique(index.bucket, return_index=True)
    shapes = []
    for (bucket_id, height, width), i in zip(
      index.buckets, firsts.tolist(), strict=True
    ):
      table = self._read_block(int(self.block[i]), _SHAPES)
      where, row = self._where(i), slice(int(self._row[i]), int(self._row[i]) + 1)
      first, second = (
        tuple(_shapes(table[name][row], f"{where}: {name}")[0].tolist())
        for name in _SHAPES
      )
      if first != second:
        raise DataError(
          f"{where}: latents of shapes {first} and {second} (c h w); the two images of "
          "a pair need one size"
        )
      c, h, w = first
      if height % h or width % w or height // h != width // w:
        raise DataError(
          f"{index.name}: bucket {bucket_id} is of {height}x{width} pixels (height x "
          f"width), but its first pair has a latent of {h}x{w} cells ({where}): that "
          "is no whole number of pixels per cell; rebuild the index"
        )
      shapes.append((h, w, c))
    unique = sorted(set(shapes))
    renumber = np.array([unique.index(shape) for shape in shapes], np.int32)
    return tuple(unique), renumber[index.bucket]


def _latent(
  data: pa.Scalar, stored_shape: pa.Scalar, shape: tuple[int, int, int], where: str
) -> np.ndarray:
  """A latent (h w c), contiguous."""
  if not data.is_valid:
    raise DataError(f"{where}: is missing; {_REPAIR}")
  try:
    latent = records_lib.decode_npy(data.as_buffer())
  except ValueError as e:
    raise DataError(f"{where}: not the bytes of a .npy file ({e}); {_REPAIR}") from e
  if list(latent.shape) != stored_shape.as_py():
    raise DataError(
      f"{where}: an array of shape {latent.shape} (c h w), its shape column says "
      f"{stored_shape.as_py()}; {_REPAIR}"
    )
  if latent.ndim != 3:
    raise DataError(f"{where}: an array of shape {latent.shape}, should be (c h w)")
  return source_lib.check_latent(records_lib.channels_last(latent), shape, where)
