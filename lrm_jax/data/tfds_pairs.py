"""Preference pairs as a tensorflow-datasets dataset of ArrayRecord files.

For random access at pod scale: every pair is its own record, so that no order is
dearer than another. Made and read without TensorFlow; `tfds.builder_from_directory`,
and `tfds.data_source` where the folder is DATA_DIR/preference_pairs/1.0.0, read it too.

```
DIR/dataset_info.json, features.json        tensorflow-datasets' own description
DIR/preference_pairs-SPLIT.array_record-*   the pairs, in the order they were given
DIR/bucket_index-SPLIT.npz                  bucket and kind of each pair
```

Axes: n pairs, h w c latent, in files c h w.
"""

from collections.abc import Iterable, Iterator, Mapping
import itertools
import json
import os
import pathlib
from typing import Any, SupportsIndex
import zipfile
import zlib

from google.protobuf import json_format, message
from jaxtyping import Int32
import numpy as np
import tensorflow_datasets as tfds

from lrm_jax import folder as folder_lib
from lrm_jax.data import records as records_lib
from lrm_jax.data import source as source_lib
from lrm_jax.data.source import DataError

NAME = "preference_pairs"
VERSION = "1.0.0"
PAIRS_PER_SHARD = 4096  # 2 GiB of pairs of 512 x 512 pixels, 8 GiB of 1024 x 1024

_WRITTEN_AT_ONCE = 16  # pairs; tfds writes its description anew each time
_INDEX_ARRAYS = ("bucket", "kind", "latent_shapes", "kind_names")


def _features() -> tfds.features.FeaturesDict:
  text = tfds.features.Text
  # As bytes: a list of floats takes 50 times as long to read.
  latent = lambda: tfds.features.Tensor(  # noqa: E731
    shape=(None, None, None), dtype=np.float32, encoding="bytes"
  )
  return tfds.features.FeaturesDict(
    {
      "prompt": text(doc="what both images were asked for"),
      **{name: text() for name in records_lib.TEXTS},
      "latent1": latent(),
      "latent2": latent(),
      "preference": tfds.features.Scalar(np.float32),
      "kind": text(),
    }
  )


def _index_file(folder: pathlib.Path, split: str) -> pathlib.Path:
  return folder / f"bucket_index-{split}.npz"


def write(
  folder: str | os.PathLike,
  splits: Mapping[str, Iterable[Mapping[str, Any]] | source_lib.PairSource],
  *,
  pairs_per_shard: int = PAIRS_PER_SHARD,
  force: bool = False,
) -> dict[str, int]:
  """Writes a dataset; it appears whole, with all splits, or not at all.

  Args:
    splits: name -> records as in data/records.py, or a source.
    pairs_per_shard: of one file. Reading keeps every file open: with more than some
      hundred files, mind the system's limit.
    force: replace an existing folder.

  Returns:
    The number of pairs of each split.

  Raises:
    DataError: a record that does not fit, or a split without records.
    FileExistsError: the folder exists and `force` is not given.
    OSError: the files cannot be written, e.g. because the disk is full.
    ValueError: no splits, a split's name that is no word, pairs_per_shard below 1.
  """
  folder = pathlib.Path(folder)
  if pairs_per_shard < 1:
    raise ValueError(f"pairs_per_shard={pairs_per_shard} must be 1 or more")
  if not splits:
    raise ValueError(f"{folder}: no splits to write")
  for split in splits:
    if not (split.isidentifier() and split.islower() and split != "all"):
      raise ValueError(
        f"split {split!r} must be a word of lower-case letters, digits and _, "
        "and not 'all', which tensorflow-datasets keeps for itself"
      )
  with folder_lib.write_atomically(folder, force=force) as partial:
    identity = tfds.core.DatasetIdentity(
      name=NAME,
      version=tfds.core.Version(VERSION),
      data_dir=str(partial),
      module_name=__name__,
    )
    info = tfds.core.DatasetInfo(
      builder=identity,
      description="Preference pairs of latents; latent1 is the preferred one.",
      features=_features(),
      disable_shuffling=True,
    )
    try:
      writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=pairs_per_shard, file_format="array_record"
      )
      writer.initialize_splits(list(splits))
      counts = {
        split: _write_split(writer, partial, split, records, f"{folder}: {split}")
        for split, records in splits.items()
      }
      writer.close_all()
    except RuntimeError as e:  # how ArrayRecord reports a failed write
      raise OSError(f"{folder}: cannot be written: {_line(e)}") from e
  return counts


def _write_split(
  writer: tfds.core.SequentialWriter,
  folder: pathlib.Path,
  split: str,
  records: Iterable[Mapping[str, Any]] | source_lib.PairSource,
  name: str,
) -> int:
  shapes: list[tuple[int, ...]] = []
  kinds: list[str] = []

  def examples() -> Iterator[dict[str, Any]]:
    for record in records_lib.checked(records, name):
      shapes.append(record["chosen"].shape)
      kinds.append(record["kind"])
      yield {
        **{field: record[field] for field in ("prompt", "kind", *records_lib.TEXTS)},
        "latent1": records_lib.channels_first(record["chosen"]),
        "latent2": records_lib.channels_first(record["rejected"]),
        "preference": np.float32(record["preference"]),
      }

  stream = examples()
  while some := list(itertools.islice(stream, _WRITTEN_AT_ONCE)):
    writer.add_examples({split: some})
  if not shapes:
    raise DataError(f"{name}: there are no records")
  writer.close_splits([split])
  latent_shapes, bucket = np.unique(
    np.array(shapes, np.int32), axis=0, return_inverse=True
  )
  kind_names, kind = np.unique(kinds, return_inverse=True)
  np.savez(
    _index_file(folder, split),
    bucket=bucket.reshape(-1).astype(np.int32),
    kind=kind.astype(np.int32),
    latent_shapes=latent_shapes,
    kind_names=kind_names,
  )
  return len(shapes)


class TfdsPairs(source_lib.PairSource):
  """One split of a dataset that `write` made, as a random access source.

  Opening reads the description and the split's index, no pairs. Safe to use from
  threads; in another process the folder is opened again.

  Raises:
    DataError: on opening, for a folder that is no such dataset, a split it has not, a
      missing shard or index, and an index that does not fit; on reading, for a damaged
      record or shard, and for a pair that is not what the index says, is not finite,
      or whose preference is neither 1 nor 0.5.
  """

  def __init__(self, folder: str | os.PathLike, split: str):
    self.name = f"{folder}: {split}"
    self.split = split
    self._folder = pathlib.Path(folder)
    builder = _builder(self._folder)
    if split not in builder.info.splits:
      raise DataError(
        f"{folder}: has no split {split!r}; there are {sorted(builder.info.splits)}"
      )
    _check_features(self._folder, builder.info.features)
    info = builder.info.splits[split]
    self._shards = [pathlib.Path(path) for path in info.filepaths]
    self._ends = np.cumsum(info.shard_lengths)
    gone = [shard.name for shard in self._shards if not shard.is_file()]
    if gone:
      raise DataError(
        f"{folder}: {len(gone)} of {len(self._shards)} shards of {split} are missing: "
        f"{records_lib.some_of(gone)}; restore them or write the dataset again"
      )
    self.bucket, self._kind, self.latent_shapes, self.kind_names = _read_index(
      self._folder, split, int(self._ends[-1])
    )
    self.block = np.arange(len(self.bucket), dtype=np.int32)
    self._examples = builder.as_data_source(split)

  def __reduce__(self):
    return TfdsPairs, (self._folder, self.split)

  def __getitem__(self, index: SupportsIndex) -> source_lib.Pair:
    index = index.__index__()
    if not 0 <= index < len(self):
      raise IndexError(f"pair {index} of {len(self)} in {self.name}")
    return self._pair(index, self._example(index))

  def records(self) -> Iterator[dict[str, Any]]:
    for i in range(len(self)):
      example = self._example(i)
      pair = self._pair(i, example)
      yield {
        **{name: _text(example, name, self._where(i)) for name in records_lib.TEXTS},
        "prompt": pair["prompt"],
        "chosen": pair["chosen"],
        "rejected": pair["rejected"],
        "preference": float(pair["preference"]),
        "kind": self.kind_names[int(pair["kind"])],
      }

  def _where(self, index: int) -> str:
    shard = int(np.searchsorted(self._ends, index, side="right"))
    start = 0 if shard == 0 else int(self._ends[shard - 1])
    return f"{self._shards[shard]}: record {index - start}"

  def _example(self, index: int) -> dict[str, Any]:
    try:
      return self._examples[index]
    # ArrayRecord's errors, those of the parser, and of tfds on unfit values.
    except (RuntimeError, OSError, ValueError, KeyError, message.DecodeError) as e:
      raise DataError(
        f"{self._where(index)}: cannot be read ({_line(e)}); restore that shard or "
        "write the dataset again"
      ) from e

  def _pair(self, index: int, example: dict[str, Any]) -> source_lib.Pair:
    where = self._where(index)
    shape = self.latent_shapes[self.bucket[index]]
    chosen, rejected = (
      source_lib.check_latent(
        records_lib.channels_last(example[name]), shape, f"{where}, {name}"
      )
      for name in ("latent1", "latent2")
    )
    return source_lib.Pair(
      chosen=chosen,
      rejected=rejected,
      prompt=_text(example, "prompt", where),
      preference=np.float32(records_lib.check_preference(example["preference"], where)),
      kind=np.int32(self._kind[index]),
      index=np.int64(index),
    )


def _text(example: Mapping[str, Any], name: str, where: str) -> str:
  try:
    return example[name].decode()
  except UnicodeDecodeError as e:
    raise DataError(
      f"{where}: {name} is not UTF-8 ({example[name]!r}); write the dataset again"
    ) from e


def _builder(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
  """The dataset in a folder; nothing is registered with tensorflow-datasets."""
  for name in ("dataset_info.json", "features.json"):
    if not (folder / name).is_file():
      raise DataError(
        f"{folder}: not a dataset of tensorflow-datasets (no {name}); name the folder "
        f"that {__name__}.write was given"
      )
  try:
    builder = tfds.builder_from_directory(folder)
  except (
    json.JSONDecodeError,
    json_format.ParseError,
    KeyError,
    ValueError,
    OSError,
  ) as e:
    raise DataError(
      f"{folder}: its dataset_info.json or features.json cannot be read ({_line(e)}); "
      "restore them or write the dataset again"
    ) from e
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise DataError(
      f"{folder}: its files are of format {builder.info.file_format}, should be "
      "array_record: others have no random access without TensorFlow"
    )
  return builder


def _check_features(folder: pathlib.Path, features: tfds.features.FeaturesDict) -> None:
  for name, feature in _features().items():
    expected = feature.get_tensor_info()
    found = features[name].get_tensor_info() if name in features else None
    if found is None or found != expected:
      raise DataError(
        f"{folder}: feature {name} is {found}, should be {expected}; write the dataset "
        f"with {__name__}.write"
      )


def _read_index(
  folder: pathlib.Path, split: str, count: int
) -> tuple[
  Int32[np.ndarray, " n"],
  Int32[np.ndarray, " n"],
  tuple[tuple[int, int, int], ...],
  tuple[str, ...],
]:
  """bucket, kind, latent_shapes and kind_names of a split with `count` pairs."""
  path = _index_file(folder, split)
  rebuild = "restore it or write the dataset again"
  if not path.is_file():
    raise DataError(f"{path}: is missing; {rebuild}")
  try:
    with np.load(path, allow_pickle=False) as file:
      bucket, kind, shapes, names = (file[name] for name in _INDEX_ARRAYS)
  except (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
  ) as e:
    raise DataError(f"{path}: cannot be read ({_line(e)}); {rebuild}") from e
  for name, codes, size in (
    ("bucket", bucket, len(shapes)),
    ("kind", kind, len(names)),
  ):
    if codes.shape != (count,) or not ((codes >= 0) & (codes < size)).all():
      raise DataError(
        f"{path}: {name} of shape {codes.shape} does not fit {count} pairs and {size} "
        f"{name}s; {rebuild}"
      )
  return (
    bucket.astype(np.int32),
    kind.astype(np.int32),
    tuple((int(h), int(w), int(c)) for h, w, c in shapes),
    tuple(str(name) for name in names),
  )


def _line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]
