"""Scores of ranked images as CSV or parquet: one row per image and level.

Columns: `id` of the list, `prompt`, `image` (name), `rank` (lower is better), `level`
(`u=0.4`, `sigma=0.4`, or an ensemble), `u`, `sigma` (empty for an ensemble), `raw`,
`reported`. The rows of a level lie together, in the order of the lists.

Axes: n images, k levels.
"""

from collections.abc import Hashable, Iterable
import csv
import dataclasses
import math
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrm_jax.data.source import DataError

SUFFIXES = (".csv", ".parquet")
_SCHEMA = pa.schema(
  [
    *((name, pa.string()) for name in ("id", "prompt", "image")),
    ("rank", pa.float64()),
    ("level", pa.string()),
    *((name, pa.float64()) for name in ("u", "sigma")),
    *((name, pa.float32()) for name in ("raw", "reported")),
  ]
)
COLUMNS = tuple(_SCHEMA.names)
_TEXTS = ("id", "prompt", "image", "level")


@dataclasses.dataclass(frozen=True)
class Level:
  """What images were scored at: one noise level, or (u and sigma None) several."""

  label: str
  u: float | None
  sigma: float | None


@dataclasses.dataclass(frozen=True)
class ScoreTable:
  """The scores of a benchmark.

  Attributes:
    ids, prompts, images: (n) texts; images of one list have one id.
    ranks: (n) lower is better.
    raw, reported: (k n) float32.
  """

  ids: tuple[str, ...]
  prompts: tuple[str, ...]
  images: tuple[str, ...]
  ranks: np.ndarray
  levels: tuple[Level, ...]
  raw: np.ndarray
  reported: np.ndarray


def write(path: str | os.PathLike, table: ScoreTable) -> None:
  """Writes a file; by its suffix, .csv or .parquet. Both hold every bit."""
  path = pathlib.Path(path)
  columns: dict[str, list] = {name: [] for name in COLUMNS}
  for k, level in enumerate(table.levels):
    columns["id"] += table.ids
    columns["prompt"] += table.prompts
    columns["image"] += table.images
    columns["rank"] += table.ranks.tolist()
    columns["level"] += [level.label] * len(table.ids)
    columns["u"] += [level.u] * len(table.ids)
    columns["sigma"] += [level.sigma] * len(table.ids)
    columns["raw"] += table.raw[k].tolist()
    columns["reported"] += table.reported[k].tolist()
  if _is_parquet(path):
    pq.write_table(pa.table(columns, schema=_SCHEMA), path, compression="zstd")
    return
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    # Nine digits tell any two float32 apart.
    for name in ("raw", "reported"):
      columns[name] = [f"{value:.9g}" for value in columns[name]]
    # The csv module writes other floats exactly, and None as an empty cell.
    writer.writerows(zip(*columns.values(), strict=True))


def _is_parquet(path: pathlib.Path) -> bool:
  if path.suffix not in SUFFIXES:
    raise ValueError(
      f"{path}: the name of a score file ends in {' or '.join(SUFFIXES)}"
    )
  return path.suffix == ".parquet"


def read(path: str | os.PathLike) -> ScoreTable:
  """Reads what `write` wrote, or rows of another program in the same columns.

  Raises:
    DataError: missing, unreadable, lacking a column, a value that is not what its
      column needs, or levels that do not hold the same images.
  """
  path = pathlib.Path(path)
  try:
    if _is_parquet(path):
      rows: Iterable[dict] = pq.read_table(path).to_pylist()
    else:
      with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
  except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as e:
    raise DataError(f"{path} cannot be read: {e}") from e
  rows = [_checked(row, f"{path}, row {i}") for i, row in enumerate(rows)]
  if not rows:
    raise DataError(f"{path} holds no scores")
  by_level: dict[Level, list[dict]] = {}
  for row in rows:
    level = Level(row["level"], row["u"], row["sigma"])
    by_level.setdefault(level, []).append(row)
  (first, *_), levels = by_level.values(), tuple(by_level)
  named = [(row["id"], row["prompt"], row["image"], row["rank"]) for row in first]
  for level, mine in by_level.items():
    same = [(row["id"], row["prompt"], row["image"], row["rank"]) for row in mine]
    if same != named:
      raise DataError(
        f"{path}: level {level.label!r} holds {len(same)} images, level "
        f"{levels[0].label!r} {len(named)}, or in another order: evaluate again"
      )
  ids, prompts, images, ranks = zip(*named, strict=True)
  raw, reported = (
    np.array([[row[name] for row in mine] for mine in by_level.values()], np.float32)
    for name in ("raw", "reported")
  )
  return ScoreTable(ids, prompts, images, np.array(ranks), levels, raw, reported)


def _checked(row: dict, where: str) -> dict:
  if missing := [name for name in COLUMNS if name not in row]:
    raise DataError(f"{where}: lacks {missing}; score files have the columns {COLUMNS}")
  out = {}
  for name in COLUMNS:
    value = row[name]
    if name in _TEXTS:
      good = isinstance(value, str)
    elif value in (None, "") and name in ("u", "sigma"):
      value, good = None, True
    else:
      try:
        value = float(value)
        good = math.isfinite(value)
      except (TypeError, ValueError):
        good = False
    if not good:
      raise DataError(f"{where}: {name} is {value!r}; evaluate again")
    out[name] = value
  return out


def numbered(labels: Iterable[Hashable]) -> np.ndarray:
  """(n) a number for each label, equal ones for equal labels, as they appear."""
  numbers: dict[Hashable, int] = {}
  return np.array([numbers.setdefault(label, len(numbers)) for label in labels], int)
