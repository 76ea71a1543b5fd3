"""Benchmarks of human preference in their published layouts, as ranked lists of images.

A list is one prompt with two or more images and a rank for each, lower is better; a
pair is a list of two, and equal ranks are a tie. `read` opens any format:

  hpdv3        JSON list of `prompt`, `path1` (preferred), `path2`. HPSv3's evaluation
               notes say that path1 is the better one; rows seen in public code also
               hold `confidence`, `choice_dist` (votes), `model1`, `model2`, any of them
               null. The votes never overrule path1 here, as in the published protocol;
               rows where they disagree are counted in `notes`.
  hpdv2        `test.json`: list of `prompt`, `image_path` (list), `rank` (list,
               averaged over annotators), as the README of tgxs002/HPSv2 documents it;
               its code compares ranks with places by falling score: lower is better.
  imagereward  `data/test.json` of THUDM/ImageReward: list of `id`, `prompt`,
               `generations` (list of paths), `ranking` (list, ties allowed); its
               test.py counts a smaller rank as better.
  pickapic     Pick-a-Pic v1 and v2 parquet: `caption`, `jpg_0`, `jpg_1`, `label_0`,
               `label_1` (1 and 0, 0 and 1, or 0.5 twice for a tie), `has_label`,
               `ranking_id`, `image_0_uid`, `image_1_uid`: the features that the card of
               v1 lists. Assumed: v2 has the same, and rows whose `has_label` is false
               are to be left out.
  genaibench   GenAI-Bench's image generation task: `prompt`, `left_image`,
               `right_image`, `vote_type` (leftvote, rightvote, tievote, bothbad_vote),
               as inference.py of TIGER-AI-Lab/GenAI-Bench reads them; it takes "A=B" as
               right for both kinds of tie. Parquet; JSON with paths is an assumption.
  latents      a folder of our preprocessed pairs (data/parquet.py).
  tfds         FOLDER:SPLIT of the same as a tensorflow-datasets data set.

JSON formats may also be JSON lines (`.jsonl`), parquet formats one file or a folder of
them. An image in parquet is bytes, `{bytes, path}` (as the datasets library stores it)
or a path. Fields that are not needed may be missing or hold anything; every row is
checked when a benchmark is opened, images when they are loaded.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import io
import json
import math
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq

from lrm_jax.data import images as images_lib
from lrm_jax.data import lru
from lrm_jax.data import source as source_lib
from lrm_jax.data.source import DataError

VOTES = {
  "leftvote": (0.0, 1.0),
  "rightvote": (1.0, 0.0),
  "tievote": (0.0, 0.0),
  "bothbad_vote": (0.0, 0.0),
}
_ROW_GROUPS = 2  # kept in memory: reading moves from one to the next


@dataclasses.dataclass(frozen=True)
class RankedImages:
  """One list.

  Attributes:
    id: unique within its benchmark.
    images: names; within one prompt, equal names are the same image.
    ranks: of the images, lower is better.
  """

  id: str
  prompt: str
  images: tuple[str, ...]
  ranks: tuple[float, ...]


class Benchmark:
  """Ranked lists and their images; `read` makes one.

  Attributes:
    name: what error messages call it, usually a path.
    is_latent: `load` gives latents instead of images.
    tie_credit: how its protocol counts ties (`metrics.tie_accuracy`), or None.
    excluded: reason -> number of rows that make no list.
    notes: remarks on the data, for people.
  """

  name: str
  is_latent = False
  tie_credit: float | None = None

  def __init__(self, name: str, lists: Sequence[RankedImages]):
    self.name = name
    self._lists = lists
    self.excluded: dict[str, int] = {}
    self.notes: list[str] = []

  def __len__(self) -> int:
    return len(self._lists)

  def __getitem__(self, index: int) -> RankedImages:
    return self._lists[index]

  def order(self, limit: int | None = None) -> np.ndarray:
    """The first `limit` lists in the order in which reading them is cheapest."""
    raise NotImplementedError

  def load(
    self, index: int, which: Sequence[int]
  ) -> list[Image.Image | np.ndarray | images_lib.ImageError]:
    """Some images of a list, upright RGB, or (h w c) latents; may run in threads.

    An image that is missing or corrupt is its error, not raised.
    """
    raise NotImplementedError

  def noise_group(self, index: int) -> str:
    """Lists whose images are shown the same noise: those of one prompt."""
    return self[index].prompt


def read(
  format: str, path: str | os.PathLike, images: str | os.PathLike | None = None
) -> Benchmark:
  """Opens and checks a benchmark.

  Args:
    format: one of FORMATS.
    path: its file or folder.
    images: folder that paths of images start from; None: the file's own.

  Raises:
    DataError: nothing there, or a row that does not fit; it names file, row, field,
      value and remedy.
    ValueError: another format.
  """
  if format not in FORMATS:
    raise ValueError(f"format {format!r}: use one of {', '.join(FORMATS)}")
  if format in ("latents", "tfds"):
    if images is not None:
      raise ValueError(
        f"{path}: format {format!r} holds latents and has no image folder"
      )
    return _LatentPairs(_open_pairs(format, str(path)))
  path = pathlib.Path(path)
  if not path.exists():
    raise DataError(f"{path} does not exist: give the {format} file or folder")
  root = path if path.is_dir() else path.parent
  root = root if images is None else pathlib.Path(images)
  if not root.is_dir():
    raise DataError(f"image folder {root} of {path} does not exist")
  benchmark = FORMATS[format](path, root)
  if not len(benchmark):
    reasons = "".join(f"; {n} rows: {why}" for why, n in benchmark.excluded.items())
    raise DataError(f"{path} holds no {format} rows to evaluate{reasons}")
  return benchmark


# --- checks of single fields --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row of a file, whose fields are checked as they are taken."""

  values: Mapping[str, Any]
  where: str

  def bad(self, field: str, problem: str) -> DataError:
    return DataError(
      f"{self.where}: field {field!r} {problem}; correct the row or leave it out"
    )

  def take(self, field: str) -> Any:
    if field not in self.values:
      raise DataError(
        f"{self.where}: lacks the field {field!r}, it has {sorted(self.values)}; is "
        "this the right format?"
      )
    return self.values[field]

  def text(self, field: str, *, empty: bool = False) -> str:
    value = self.take(field)
    if not isinstance(value, str) or not (value or empty):
      raise self.bad(field, f"is {_short(value)}, should be text")
    return value

  def one_of(self, field: str, options: Sequence) -> Any:
    value = self.take(field)
    if isinstance(value, bool) or value not in options:
      raise self.bad(field, f"is {_short(value)}, should be one of {list(options)}")
    return value

  def texts(self, field: str) -> tuple[str, ...]:
    values = self._list(field)
    for i, value in enumerate(values):
      if not isinstance(value, str) or not value:
        raise self.bad(field, f"holds {_short(value)} at place {i}, should be text")
    if len(values) < 2:
      raise self.bad(field, f"holds {len(values)} image(s), a ranking needs two")
    return tuple(values)

  def numbers(self, field: str, count: int, of: str) -> tuple[float, ...]:
    values = self._list(field)
    for i, value in enumerate(values):
      if not _is_number(value):
        raise self.bad(field, f"holds {_short(value)} at place {i}, should be a number")
    if len(values) != count:
      raise self.bad(field, f"holds {len(values)} numbers for {count} of {of!r}")
    return tuple(map(float, values))

  def _list(self, field: str) -> list:
    values = self.take(field)
    if not isinstance(values, list):
      raise self.bad(field, f"is {_short(values)}, should be a list")
    return values


def _is_number(value: Any) -> bool:
  is_real = isinstance(value, int | float) and not isinstance(value, bool)
  return is_real and math.isfinite(value)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def _unique(ids: Sequence[str]) -> list[str]:
  """The ids, with the row's number where they are not all different."""
  if len(set(ids)) == len(ids):
    return list(ids)
  return [f"{name}#{i}" for i, name in enumerate(ids)]


# --- JSON with paths of images ------------------------------------------------------


class _ImageFiles(Benchmark):
  """Lists whose images are files below a folder."""

  def __init__(self, path: pathlib.Path, root: pathlib.Path, lists):
    super().__init__(str(path), lists)
    self._root = root

  def order(self, limit: int | None = None) -> np.ndarray:
    """Lists of one prompt together, so that it is encoded once."""
    first: dict[str, int] = {}
    keys = [first.setdefault(self[i].prompt, i) for i in range(len(self))[:limit]]
    return np.argsort(keys, kind="stable")

  def load(self, index, which):
    names = self[index].images
    return [_open(lambda name=names[i]: self._root / name) for i in which]


def _open(image: Callable[[], Any]) -> Image.Image | images_lib.ImageError:
  try:
    return images_lib.open_image(image())
  except images_lib.ImageError as e:
    return e


def _json_rows(path: pathlib.Path) -> list[_Row]:
  """Objects of a JSON list, or of the lines of a .jsonl file."""
  if path.is_dir():
    raise DataError(f"{path} is a folder: give the JSON file in it")
  try:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
      lines = enumerate(text.splitlines(), 1)
      rows = {f"line {n}": json.loads(line) for n, line in lines if line.strip()}
    else:
      rows = json.loads(text)
      if not isinstance(rows, list):
        raise DataError(
          f"{path} holds {_short(rows)}, should be a list of rows; is this the right "
          "file?"
        )
      rows = {f"row {n}": row for n, row in enumerate(rows)}
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise DataError(
      f"{path} is not valid JSON ({e}): download it again, or name it .jsonl if each "
      "line is an object"
    ) from e
  except OSError as e:
    raise DataError(f"{path} cannot be read: {e}") from e
  for n, row in rows.items():
    if not isinstance(row, dict):
      raise DataError(f"{path}, {n} is {_short(row)}, should be an object")
  return [_Row(row, f"{path}, {n}") for n, row in rows.items()]


def _hpdv3(path: pathlib.Path, root: pathlib.Path) -> Benchmark:
  lists, against = [], 0
  for i, row in enumerate(_json_rows(path)):
    images = row.text("path1"), row.text("path2")
    votes = row.values.get("choice_dist") or [0, 0]  # missing, null or empty
    if (
      not isinstance(votes, list) or len(votes) != 2 or not all(map(_is_number, votes))
    ):
      raise row.bad("choice_dist", f"is {_short(votes)}, should be null or two numbers")
    against += votes[1] > votes[0]
    prompt = row.text("prompt", empty=True)
    lists.append(RankedImages(f"{i:07d}", prompt, images, (0.0, 1.0)))
  benchmark = _ImageFiles(path, root, lists)
  if against:
    benchmark.notes.append(
      f"{against} rows have more votes for path2; path1 counts as preferred"
    )
  return benchmark


def _hpdv2(path: pathlib.Path, root: pathlib.Path) -> Benchmark:
  lists = []
  for i, row in enumerate(_json_rows(path)):
    images = row.texts("image_path")
    ranks = row.numbers("rank", len(images), "image_path")
    prompt = row.text("prompt", empty=True)
    lists.append(RankedImages(f"{i:06d}", prompt, images, ranks))
  return _ImageFiles(path, root, lists)


def _imagereward(path: pathlib.Path, root: pathlib.Path) -> Benchmark:
  rows = _json_rows(path)
  names = [
    row.text("id") if "id" in row.values else str(i) for i, row in enumerate(rows)
  ]
  lists = []
  for name, row in zip(_unique(names), rows, strict=True):
    images = row.texts("generations")
    ranks = row.numbers("ranking", len(images), "generations")
    lists.append(RankedImages(name, row.text("prompt", empty=True), images, ranks))
  return _ImageFiles(path, root, lists)


# --- parquet with images ------------------------------------------------------------


class _ImageTable:
  """Parquet files with columns of images, which are read row group by row group."""

  def __init__(self, path: pathlib.Path, columns: Sequence[str], images: Sequence[str]):
    """Reads the other columns.

    Args:
      columns: needed ones that hold no images.
      images: columns of images; no others of their size are ever read.
    """
    self._images = tuple(images)
    self._paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not self._paths:
      raise DataError(f"{path} holds no .parquet file")
    self._groups = lru.Cache(_ROW_GROUPS, self._read_group)
    self._places: list[tuple[int, int, int]] = []  # file, row group, row within
    self.rows: list[_Row] = []
    for number, part in enumerate(self._paths):
      with self._file(part) as file:
        held = file.schema_arrow.names
        if missing := [c for c in (*columns, *images) if c not in held]:
          raise DataError(
            f"{part}: lacks the columns {missing}, it has {held}; is this the right "
            "format?"
          )
        small = [
          field.name
          for field in file.schema_arrow
          if field.name not in images and not _holds_bytes(field.type)
        ]
        rows = self._guard(part, lambda: file.read(columns=small).to_pylist())  # noqa: B023
        for group in range(file.num_row_groups):
          count = file.metadata.row_group(group).num_rows
          self._places += [(number, group, row) for row in range(count)]
      self.rows += [_Row(row, f"{part}, row {i}") for i, row in enumerate(rows)]

  def _file(self, path: pathlib.Path) -> pq.ParquetFile:
    return self._guard(path, lambda: pq.ParquetFile(path))

  def _guard(self, path: pathlib.Path, call: Callable[[], Any]) -> Any:
    try:
      return call()
    except (pa.ArrowException, OSError) as e:
      raise DataError(
        f"{path} cannot be read as parquet ({e}): download it again"
      ) from e

  def images(self, row: int) -> dict[str, Any]:
    """Contents of a row's image columns; may run in threads."""
    *place, within = self._places[row]
    table = self._groups[tuple(place)]
    return {name: table[name][within].as_py() for name in self._images}

  def _read_group(self, place: tuple[int, int]) -> pa.Table:
    number, group = place
    path, columns = self._paths[number], list(self._images)
    with self._file(path) as file:
      return self._guard(path, lambda: file.read_row_group(group, columns=columns))


def _holds_bytes(dtype: pa.DataType) -> bool:
  """Whether a column may be as large as images are."""
  if pa.types.is_struct(dtype):
    return any(_holds_bytes(field.type) for field in dtype)
  return pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype)


class _ImagesInParquet(Benchmark):
  """Lists whose images are in the columns of a table."""

  def __init__(self, path, root, table: _ImageTable, lists, rows: Sequence[int]):
    """`rows[i]` is the row of list i, whose images are its columns in their order."""
    super().__init__(str(path), lists)
    self._root, self._table, self._rows = root, table, rows

  def order(self, limit: int | None = None) -> np.ndarray:
    return np.arange(len(self))[:limit]  # as they are stored

  def load(self, index, which):
    cells = self._table.images(self._rows[index])
    names, columns = self[index].images, list(cells)
    return [_open_cell(cells[columns[i]], names[i], self._root) for i in which]


def _open_cell(value: Any, name: str, root: pathlib.Path):
  """An image that is bytes, `{bytes, path}` or a path."""
  if isinstance(value, dict):
    value = value.get("path") if value.get("bytes") is None else value["bytes"]
  if isinstance(value, str) and value:
    return _open(lambda: root / value)
  if not isinstance(value, bytes):
    return images_lib.ImageError(
      f"image {name} is {_short(value)}, neither bytes nor path"
    )
  try:
    image = Image.open(io.BytesIO(value))
  except images_lib.DECODER_ERRORS:
    kind = (
      "is empty" if not value else f"is {len(value)} bytes of no known image format"
    )
    return images_lib.ImageError(f"image {name} {kind}")
  image.filename = name  # what an error calls it
  return _open(lambda: image)


def _pickapic(path: pathlib.Path, root: pathlib.Path) -> Benchmark:
  table = _ImageTable(path, ("caption", "label_0", "label_1"), ("jpg_0", "jpg_1"))
  ids, parts, rows = [], [], []
  excluded = 0
  for i, row in enumerate(table.rows):
    if row.values.get("has_label") is False:
      excluded += 1
      continue
    labels = tuple(row.one_of(f"label_{side}", (0, 0.5, 1)) for side in (0, 1))
    if sum(labels) != 1:
      raise row.bad(
        "label_1", f"is {labels[1]} beside a label_0 of {labels[0]}: not 1 in sum"
      )
    images = tuple(
      row.values.get(f"image_{side}_uid") or f"{i}/jpg_{side}" for side in (0, 1)
    )
    ids.append(str(row.values.get("ranking_id", i)))
    parts.append((row.text("caption", empty=True), images, (-labels[0], -labels[1])))
    rows.append(i)
  lists = [
    RankedImages(name, *part) for name, part in zip(_unique(ids), parts, strict=True)
  ]
  benchmark = _ImagesInParquet(path, root, table, lists, rows)
  benchmark.tie_credit = 0.5
  if excluded:
    benchmark.excluded["has_label is false"] = excluded
  return benchmark


def _genaibench(path: pathlib.Path, root: pathlib.Path) -> Benchmark:
  columns = "left_image", "right_image"
  lists, table = [], None
  if path.suffix in (".json", ".jsonl"):
    rows = _json_rows(path)
  else:
    table = _ImageTable(path, ("prompt", "vote_type"), columns)
    rows = table.rows
  for i, row in enumerate(rows):
    ranks = VOTES[row.one_of("vote_type", tuple(VOTES))]
    if table is None:
      images = tuple(row.text(column) for column in columns)
    else:
      images = tuple(f"{i}/{column}" for column in columns)
    prompt = row.text("prompt", empty=True)
    lists.append(RankedImages(f"{i:06d}", prompt, images, ranks))
  if table is None:
    benchmark = _ImageFiles(path, root, lists)
  else:
    benchmark = _ImagesInParquet(path, root, table, lists, range(len(lists)))
  benchmark.tie_credit = 0.0
  return benchmark


# --- preprocessed pairs -------------------------------------------------------------


def _open_pairs(format: str, path: str) -> source_lib.PairSource:
  if format == "latents":
    from lrm_jax.data import parquet

    return parquet.ParquetPairs(path)
  folder, separator, split = path.rpartition(":")
  if not separator:
    raise DataError(f"{path!r}: give a tfds data set as FOLDER:SPLIT")
  # It imports tensorflow-datasets, which takes seconds.
  from lrm_jax.data import tfds_pairs

  return tfds_pairs.TfdsPairs(folder, split)


class _LatentPairs(Benchmark):
  """A source of pairs; each is read once, for its prompt and its latents."""

  is_latent = True

  def __init__(self, source: source_lib.PairSource):
    super().__init__(source.name, ())
    self._source = source
    self._pending: dict[int, source_lib.Pair] = {}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> RankedImages:
    """Reads the pair and keeps it for `load`."""
    index = int(index)
    pair = self._pending[index] = self._source[index]
    ranks = (0.0, 1.0) if pair["preference"] != source_lib.TIE else (0.0, 0.0)
    images = (f"{index}/chosen", f"{index}/rejected")
    return RankedImages(f"{index:07d}", pair["prompt"], images, ranks)

  def order(self, limit: int | None = None) -> np.ndarray:
    return np.argsort(self._source.block[:limit], kind="stable")

  def load(self, index, which):
    pair = self._pending.pop(int(index), None) or self._source[int(index)]
    return [pair[("chosen", "rejected")[i]] for i in which]

  def noise_group(self, index: int) -> str:
    """Each pair has its own noise: a few prompts may be those of very many pairs."""
    return f"pair {int(index)}"


FORMATS: Mapping[str, Callable[[pathlib.Path, pathlib.Path], Benchmark] | None] = {
  "hpdv3": _hpdv3,
  "hpdv2": _hpdv2,
  "pickapic": _pickapic,
  "imagereward": _imagereward,
  "genaibench": _genaibench,
  "latents": None,  # opened by `read` itself: no images
  "tfds": None,
}
