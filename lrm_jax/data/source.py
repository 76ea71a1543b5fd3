"""What every source of preference pairs looks like to the loader.

A source gives single pairs by index, and knows of each, without reading it, the bucket
(latent shape) it belongs to and the storage block it lies in. Batches are planned from
these two arrays (data/plan.py).

Axes: h w c latent (channels last), n pairs.
"""

from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np

PREFERRED, TIE = 1.0, 0.5


class DataError(ValueError):
  """Data that cannot be used; the message names file, row, problem and remedy."""


class Pair(TypedDict):
  """One preference pair, as `PairSource.__getitem__` returns it.

  chosen, rejected: (h w c) float32, scaled as the model sees them.
  prompt: the text.
  preference: () float32, probability that `chosen` is preferred: 1, or 0.5 for a tie.
  kind: () int32, index of the source's `kind_names`.
  index: () int64, the pair's place in the source.
  """

  chosen: np.ndarray
  rejected: np.ndarray
  prompt: str
  preference: Any
  kind: Any
  index: Any


class PairSource(grain.sources.RandomAccessDataSource):
  """Base class of the sources; a subclass sets the attributes and reads pairs.

  Attributes:
    name: what error messages call it, usually a path.
    latent_shapes: (h, w, c) of each bucket.
    bucket: (n,) int32, index of `latent_shapes`.
    block: (n,) int32, the unit in which storage is read (a row group); pairs of one
      block are cheap to read together. Each pair its own where access is random.
    kind_names: names of the kinds of pairs, ("all",) where there is only one.
  """

  name: str
  latent_shapes: tuple[tuple[int, int, int], ...]
  bucket: np.ndarray
  block: np.ndarray
  kind_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.bucket)

  def __getitem__(self, index: int) -> Pair:
    raise NotImplementedError

  def records(self) -> Iterator[dict[str, Any]]:
    """All pairs in order, as the writers take them (data/records.py)."""
    for i in range(len(self)):
      pair = self[i]
      yield dict(
        prompt=pair["prompt"],
        chosen=pair["chosen"],
        rejected=pair["rejected"],
        preference=float(pair["preference"]),
        kind=self.kind_names[int(pair["kind"])],
      )

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name!r})"


def check_latent(latent: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
  """The latent, or an error that says what is wrong with it.

  Args:
    latent: (h w c).
    shape: what the index announces.
    where: file, row and column for the message.

  Raises:
    DataError: another shape, a dtype that is no float, NaN or infinity.
  """
  if latent.shape != tuple(shape):
    raise DataError(
      f"{where}: a latent of shape {latent.shape} (h w c), the index says "
      f"{tuple(shape)}; rebuild the index or the part"
    )
  if latent.dtype.kind != "f":
    raise DataError(f"{where}: dtype {latent.dtype}, should be float32")
  if not np.isfinite(latent).all():
    raise DataError(f"{where}: holds NaN or infinity; drop the pair or encode it again")
  return latent.astype(np.float32, copy=False)
