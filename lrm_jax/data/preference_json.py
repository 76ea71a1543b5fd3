"""Preferences between images as HPDv3 lists them: JSON, and folders of image files.

A file holds a list of objects, or one object per line (JSONL):

  prompt         text, not empty
  path1, path2   image files; the first is the preferred one
  confidence     optional: in [0, 1], how sure the annotation is
  choice_dist    optional: votes [for path1, for path2]
  model1, model2 optional: what made the images

An optional value that is null counts as left out; other keys are ignored.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any, TypedDict

import grain
import numpy as np

from lrm_jax.data import buckets
from lrm_jax.data import images as images_lib
from lrm_jax.data.source import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class ImagePair:
  """One row: which of two images was preferred for a prompt.

  Attributes:
    row: its number in the file, from 0 (in JSONL: of its line).
    path1, path2: as in the file; `path1` is preferred.
    model1, model2: "" where the file does not say.
    confidence, votes: None where the file does not say; votes for (path1, path2).
  """

  row: int
  prompt: str
  path1: str
  path2: str
  model1: str = ""
  model2: str = ""
  confidence: int | float | None = None
  votes: tuple[int | float, int | float] | None = None


# Kinds of problems.
BAD_ROW = "bad row"
BAD_IMAGE = "bad image"
NO_BUCKET = "no bucket"  # of an image's aspect ratio
ASPECT_RATIOS = "aspect ratios differ"  # too much for one bucket


@dataclasses.dataclass(frozen=True)
class Problem:
  """A row that cannot be used.

  Attributes:
    row: as in `ImagePair`.
    path: the image meant, or "".
    kind: BAD_ROW, BAD_IMAGE, NO_BUCKET or ASPECT_RATIOS.
    reason: what exactly.
  """

  row: int
  path: str
  kind: str
  reason: str


def read(
  path: str | os.PathLike, *, skip_bad: bool = False
) -> tuple[list[ImagePair], list[Problem]]:
  """All rows of a file, in order, and those that were left out.

  Args:
    skip_bad: leave rows out that cannot be used; otherwise the first is an error.

  Raises:
    DataError: no such file, not JSON, no rows, or a bad one: names file and row.
  """
  pairs, bad = [], []
  for row, value in _rows(pathlib.Path(path)):
    try:
      pairs.append(_pair(row, value))
    except DataError as e:
      if not skip_bad:
        raise DataError(
          f"{path}: row {row} (counted from 0): {e}. Correct it, or leave such rows "
          "out with skip_bad (--skip-bad)"
        ) from e
      bad.append(Problem(row, "", BAD_ROW, str(e)))
  if not pairs:
    raise DataError(f"{path} holds no usable rows ({len(bad)} bad ones)")
  return pairs, bad


def _rows(path: pathlib.Path) -> Iterable[tuple[int, Any]]:
  """(number, parsed JSON, or the exception of its parser) of each row."""
  try:
    text = path.read_text(encoding="utf-8-sig")
  except FileNotFoundError as e:
    raise DataError(f"{path} does not exist") from e
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"{path} cannot be read: {e}") from e
  if not text.lstrip().startswith("["):
    lines = enumerate(text.split("\n"))
    return ((i, _parsed(line)) for i, line in lines if line.strip())
  try:
    return enumerate(json.loads(text))
  except (json.JSONDecodeError, RecursionError) as e:
    raise DataError(f"{path} is not valid JSON: {e}") from e


def _parsed(line: str) -> Any:
  try:
    return json.loads(line)
  except (json.JSONDecodeError, RecursionError) as e:
    return e


def _pair(row: int, value: Any) -> ImagePair:
  if isinstance(value, Exception):
    raise DataError(f"not valid JSON: {value}")
  if not isinstance(value, dict):
    raise DataError(f"{_short(value)} is no object")
  given = {key: field for key, field in value.items() if field is not None}
  for key in ("prompt", "path1", "path2"):
    if key not in given:
      raise DataError(f"{key} is missing")
  texts = {
    key: _text(key, given[key])
    for key in ("prompt", "path1", "path2", "model1", "model2")
    if key in given
  }
  for key in ("prompt", "path1", "path2"):
    if not texts[key].strip():
      raise DataError(f"{key} is empty")
  if texts["path1"] == texts["path2"]:
    raise DataError(f"path1 and path2 are the same image, {texts['path1']!r}")
  confidence, votes = given.get("confidence"), given.get("choice_dist")
  if confidence is not None and not (_is_number(confidence) and 0 <= confidence <= 1):
    raise DataError(f"confidence is {_short(confidence)}, should lie in [0, 1]")
  if votes is not None:
    if not (
      isinstance(votes, list)
      and len(votes) == 2
      and all(_is_number(v) and v >= 0 for v in votes)
    ):
      raise DataError(
        f"choice_dist is {_short(votes)}, should be the two numbers of votes, "
        "for path1 and for path2"
      )
    votes = tuple(votes)
  return ImagePair(row, **texts, confidence=confidence, votes=votes)


def _text(key: str, value: Any) -> str:
  if not isinstance(value, str):
    raise DataError(f"{key} is {_short(value)}, should be text")
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise DataError(f"{key} is {_short(value)}, which UTF-8 cannot express") from e
  return value


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


# --- which rows are wanted ---------------------------------------------------------


def _vote_share(pair: ImagePair) -> int | float | None:
  if pair.votes is None or not sum(pair.votes):
    return None
  return pair.votes[0] / sum(pair.votes)


# What a filter can ask about; None where a row does not say.
FIELDS: dict[str, Callable[[ImagePair], int | float | None]] = {
  "confidence": lambda pair: pair.confidence,
  "votes": lambda pair: None if pair.votes is None else sum(pair.votes),
  "vote_share": _vote_share,
}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
  ">=": lambda a, b: a >= b,
  "<=": lambda a, b: a <= b,
  ">": lambda a, b: a > b,
  "<": lambda a, b: a < b,
}
_TERM = re.compile(r"\s*([a-z_]+)\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*")
GRAMMAR = (
  f"terms FIELD OPERATOR NUMBER joined by commas, with a field of {', '.join(FIELDS)} "
  f"and an operator of {' '.join(_COMPARISONS)}, e.g. confidence>=0.95,votes>=3"
)


@dataclasses.dataclass(frozen=True)
class Filter:
  """A condition that rows have to meet, e.g. `confidence>=0.95`."""

  field: str
  comparison: str
  value: float

  def __str__(self) -> str:
    return f"{self.field}{self.comparison}{self.value:g}"

  def accepts(self, pair: ImagePair) -> bool | None:
    """None where the row does not say."""
    value = FIELDS[self.field](pair)
    return None if value is None else _COMPARISONS[self.comparison](value, self.value)


def parse_filters(text: str) -> tuple[Filter, ...]:
  """`confidence>=0.95,votes>=3` as filters, all of which have to be met.

  Raises:
    ValueError: anything that is not in GRAMMAR.
  """
  filters = []
  for term in text.split(",") if text.strip() else ():
    match = _TERM.fullmatch(term)
    if match is None or match[1] not in FIELDS:
      raise ValueError(
        f"filter {text!r}: {term.strip()!r} is not understood; {GRAMMAR}"
      )
    try:
      value = float(match[3])
    except ValueError as e:
      raise ValueError(f"filter {text!r}: {match[3]!r} is no number") from e
    filters.append(Filter(match[1], match[2], value))
  return tuple(filters)


def select(
  pairs: Iterable[ImagePair],
  filters: Sequence[Filter] = (),
  *,
  keep_unknown: bool = False,
  drop_duplicates: bool = False,
  max_per_prompt: int | None = None,
) -> tuple[list[ImagePair], dict[str, int]]:
  """The rows that are wanted, in order, and how many were left out for which reason.

  A row is counted under the first reason in the order of the arguments; the cap is on
  what is left after all others.

  Args:
    keep_unknown: keep rows that do not say what a filter asks about.
    drop_duplicates: keep the first only of rows with one prompt and the same images
      in the same order.
    max_per_prompt: keep the first so many of each prompt.

  Raises:
    ValueError: max_per_prompt below 1.
  """
  if max_per_prompt is not None and max_per_prompt < 1:
    raise ValueError(f"max_per_prompt={max_per_prompt} must be 1 or more")
  removed: dict[str, int] = {}
  for rule in filters:
    removed[str(rule)] = 0
    if not keep_unknown:
      removed[f"no {rule.field}"] = 0
  if drop_duplicates:
    removed["duplicate"] = 0
  if max_per_prompt is not None:
    removed["max_per_prompt"] = 0
  seen: set[tuple[str, str, str]] = set()
  of_prompt: dict[str, int] = {}

  def reason(pair: ImagePair) -> str | None:
    for rule in filters:
      accepts = rule.accepts(pair)
      if accepts is None and not keep_unknown:
        return f"no {rule.field}"
      if accepts is False:
        return str(rule)
    key = (pair.prompt, pair.path1, pair.path2)
    if drop_duplicates and key in seen:
      return "duplicate"
    seen.add(key)
    if max_per_prompt is not None:
      if of_prompt.get(pair.prompt, 0) == max_per_prompt:
        return "max_per_prompt"
      of_prompt[pair.prompt] = of_prompt.get(pair.prompt, 0) + 1
    return None

  kept = []
  for pair in pairs:
    if (why := reason(pair)) is None:
      kept.append(pair)
    else:
      removed[why] += 1
  return kept, removed


# --- the images --------------------------------------------------------------------


class DecodedPair(TypedDict):
  """What `ImagePairs` gives.

  index: place of the pair among the given ones.
  size: (height, width) of both images; (0, 0) where there is a problem.
  chosen, rejected: (height width 3) uint8.
  problem: None, or why the pair cannot be used.
  """

  index: int
  size: tuple[int, int]
  chosen: np.ndarray
  rejected: np.ndarray
  problem: Problem | None


class ImagePairs(grain.sources.RandomAccessDataSource):
  """The images of pairs, decoded and brought to one size per pair.

  An image that is missing or cannot be read raises nothing: its pair has a `problem`.
  """

  def __init__(
    self,
    pairs: Sequence[ImagePair],
    root: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
  ):
    """
    Args:
      root: folder that relative paths start from.
      size: (height, width) for all pairs; None: the bucket of each pair
        (`buckets.pair_size`). Images are scaled to cover it and cropped equally on
        both sides.
    """
    self._pairs = tuple(pairs)
    self._root = str(root)
    self._size = size

  def __len__(self) -> int:
    return len(self._pairs)

  def __repr__(self) -> str:
    return f"ImagePairs({len(self)} pairs below {self._root!r})"

  def size(self, index: int) -> tuple[int, int] | Problem:
    """What `self[index]` has as its size, or problem, from the heads of the files.

    Damage behind a file's head is not found here.
    """
    return self._size_of(index, images_lib.image_size, lambda size: size)[0]

  def __getitem__(self, index: int) -> DecodedPair:
    size, images = self._size_of(
      index, images_lib.open_image, lambda image: (image.height, image.width)
    )
    if isinstance(size, Problem):
      none = np.zeros((0, 0, 3), np.uint8)
      return DecodedPair(
        index=int(index), size=(0, 0), chosen=none, rejected=none, problem=size
      )
    chosen, rejected = (
      np.asarray(buckets.resize_and_crop(image, size)) for image in images
    )
    return DecodedPair(
      index=int(index), size=size, chosen=chosen, rejected=rejected, problem=None
    )

  def _size_of(
    self, index: int, read: Callable[[pathlib.Path], Any], size_of: Callable
  ) -> tuple[tuple[int, int] | Problem, list[Any]]:
    """The pair's size, or problem, and what `read` made of both files."""
    pair = self._pairs[index]
    found = []
    for path in (pair.path1, pair.path2):
      full = pathlib.Path(self._root) / path
      try:
        found.append(read(full))
      except images_lib.ImageError as e:
        # As in the file: the same on every host, wherever the images are mounted.
        reason = str(e).replace(str(full), path)
        return Problem(pair.row, path, BAD_IMAGE, reason), []
    if self._size is not None:
      return self._size, found
    sizes = [size_of(item) for item in found]
    if (size := buckets.pair_size(*sizes)) is not None:
      return size, found
    lost = [buckets.nearest_bucket(*own) is None for own in sizes]
    path = pair.path2 if lost == [False, True] else pair.path1
    both = " and ".join(f"{h}x{w}" for h, w in sizes)
    kind = NO_BUCKET if any(lost) else ASPECT_RATIOS
    return Problem(pair.row, path, kind, f"images of {both} pixels"), found
