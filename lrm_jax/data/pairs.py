"""Preference pairs on disk, and the loader that feeds them to training.

A pair folder holds latents and prompt embeddings that were computed beforehand:

  chosen.npy     (n h w c)  float32 or float16, latents as the model sees them
  rejected.npy   (n h w c)  the same dtype
  prompt_id.npy  (n)        integers, row of context.npy and pooled.npy
  context.npy    (p l d)    float32 or float16, one row per prompt
  pooled.npy     (p e)      the same
  kind.npy       (n)        optional small integers, index of `kinds`
  pairs.json                format, version, count, latent_shape, kinds, prompts

Prompt 0 is the empty prompt: the one that prompt dropout puts in place of others.

Axes: n pairs, p prompts, b batch, h w c latent, l text tokens, d context width,
e pooled width.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import shutil

import grain
import numpy as np

FORMAT = "lrm_jax.pairs"
VERSION = 1
_META_KEYS = {"format", "version", "count", "latent_shape", "kinds", "prompts"}
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))
# Batches wait in memory: Grain's default of 500 would be hundreds of GB of latents.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class PairFolderError(ValueError):
  """A pair folder that cannot be used; the message names the file and the problem."""


def write_pairs(
  folder: str | os.PathLike,
  *,
  chosen: np.ndarray,
  rejected: np.ndarray,
  prompt_id: np.ndarray,
  prompts: Sequence[str],
  context: np.ndarray,
  pooled: np.ndarray,
  kind: np.ndarray | None = None,
  kind_names: Sequence[str] = (),
  force: bool = False,
) -> None:
  """Writes a pair folder; it appears complete and checked, or not at all.

  The arrays are those of the module's docstring (memory-mapped ones are fine), with
  `prompts[0] == ""`. An existing folder is an error unless `force`.
  Raises PairFolderError on arrays that do not fit together or are not finite.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and not force:
    raise FileExistsError(f"{folder} exists; pass force=True to replace it")
  arrays = dict(
    chosen=chosen,
    rejected=rejected,
    prompt_id=prompt_id,
    context=context,
    pooled=pooled,
  )
  if kind is not None:
    arrays["kind"] = kind
  meta = dict(
    format=FORMAT,
    version=VERSION,
    count=len(chosen),
    latent_shape=list(chosen.shape[1:]),
    kinds=list(kind_names),
    prompts=list(prompts),
  )
  folder.parent.mkdir(parents=True, exist_ok=True)
  # Beside the target, so that the final rename stays within one file system.
  draft = folder.parent / f".{folder.name}.draft-{os.getpid()}"
  draft.mkdir()
  try:
    for name, array in arrays.items():
      np.save(draft / f"{name}.npy", array, allow_pickle=False)
    (draft / "pairs.json").write_text(json.dumps(meta, indent=2) + "\n")
    PairSource(draft).check_values()  # the reader's own checks, before anyone reads
    if folder.exists():
      old = folder.parent / f".{folder.name}.old-{os.getpid()}"
      folder.rename(old)
      draft.rename(folder)
      shutil.rmtree(old)
    else:
      draft.rename(folder)
  finally:
    if draft.exists():
      shutil.rmtree(draft)


class PairSource(grain.sources.RandomAccessDataSource):
  """A pair folder as a random access source of single pairs.

  `source[i]` is `dict(chosen (h w c), rejected (h w c), context (l d), pooled (e),
  kind ())`, floats in the dtype they are stored in, kind int32 (0 in a folder
  without kinds). Arrays are memory-mapped; everything but the floats' values is
  checked on opening, and those are checked finite as they are read.
  Raises PairFolderError.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    meta = self._read_meta()
    self.prompts: tuple[str, ...] = tuple(meta["prompts"])
    self.latent_shape: tuple[int, ...] = tuple(meta["latent_shape"])
    has_kind = (self.folder / "kind.npy").exists()
    if has_kind != bool(meta["kinds"]):
      found = "is present" if has_kind else "is missing"
      self._fail("kind.npy", f"{found}, but pairs.json names kinds {meta['kinds']}")
    self.kind_names: tuple[str, ...] = tuple(meta["kinds"]) or ("all",)

    n, p = meta["count"], len(self.prompts)
    self._chosen = self._open("chosen", (n, *self.latent_shape), _FLOATS)
    self._rejected = self._open(
      "rejected", (n, *self.latent_shape), (self._chosen.dtype,)
    )
    self._context = self._open("context", (p, None, None), _FLOATS)
    self._pooled = self._open("pooled", (p, None), (self._context.dtype,))
    self._prompt_id = self._open_ids("prompt_id", n, p, "prompts")
    self._kind = None
    if has_kind:
      self._kind = self._open_ids("kind", n, len(self.kind_names), "kinds")

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(f"pair {index} of {len(self)} in {self.folder}")
    context, pooled = self.embedding(int(self._prompt_id[index]))
    return dict(
      chosen=self._row("chosen", self._chosen, index),
      rejected=self._row("rejected", self._rejected, index),
      context=context,
      pooled=pooled,
      kind=np.int32(0 if self._kind is None else self._kind[index]),
    )

  def __reduce__(self):
    # Reopen in a worker process: pickling a memory map would copy the whole array.
    return PairSource, (self.folder,)

  def __repr__(self) -> str:
    return f"PairSource({str(self.folder)!r})"

  def prompt_of(self, index: int) -> str:
    """The text of a pair's prompt."""
    return self.prompts[self._prompt_id[index]]

  def embedding(self, prompt_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The context (l d) and pooled (e) embeddings of one prompt."""
    return (
      self._row("context", self._context, prompt_id),
      self._row("pooled", self._pooled, prompt_id),
    )

  def check_values(self) -> None:
    """Reads every array once and raises PairFolderError on the first NaN or infinity.

    Reading a pair checks that pair only; this is for whoever wrote the folder.
    """
    for name in ("chosen", "rejected", "context", "pooled"):
      array = getattr(self, f"_{name}")
      for i in range(len(array)):
        self._row(name, array, i)

  def _fail(self, file: str, problem: str):
    raise PairFolderError(f"{self.folder / file}: {problem}")

  def _read_meta(self) -> dict:
    file = self.folder / "pairs.json"
    if not file.is_file():
      self._fail("pairs.json", "not found; a pair folder is made by write_pairs")
    try:
      meta = json.loads(file.read_text())
    except json.JSONDecodeError as e:
      raise PairFolderError(f"{file}: not valid JSON ({e})") from e
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
      self._fail("pairs.json", f"its format is not {FORMAT!r}")
    if meta.get("version") != VERSION:
      self._fail(
        "pairs.json", f"version {meta.get('version')!r}, this code reads {VERSION}"
      )
    if set(meta) != _META_KEYS:
      self._fail(
        "pairs.json", f"has keys {sorted(meta)}, should have {sorted(_META_KEYS)}"
      )
    shape = meta["latent_shape"]
    if not (_all_of(int, shape) and len(shape) == 3 and min(shape) > 0):
      self._fail("pairs.json", f"latent_shape is {shape}, should be [h, w, c]")
    if type(meta["count"]) is not int or meta["count"] <= 0:
      self._fail("pairs.json", f"count is {meta['count']!r}, should be 1 or more")
    for key in ("prompts", "kinds"):
      if not _all_of(str, meta[key]):
        self._fail("pairs.json", f"{key} is not a list of strings")
      if len(set(meta[key])) != len(meta[key]):
        self._fail("pairs.json", f"{key} holds the same string twice")
    if meta["prompts"][:1] != [""]:
      self._fail("pairs.json", 'prompts[0] must be the empty prompt ""')
    return meta

  def _open(
    self, name: str, shape: tuple[int | None, ...], dtypes: tuple[np.dtype, ...]
  ) -> np.ndarray:
    """Maps an array; None in `shape` stands for any length but zero."""
    file = f"{name}.npy"
    if not (self.folder / file).is_file():
      self._fail(file, "not found")
    try:
      array = np.load(self.folder / file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
      raise PairFolderError(f"{self.folder / file}: not a readable array ({e})") from e
    fits = array.ndim == len(shape) and all(
      have == want if want is not None else have > 0
      for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
      want = ", ".join("any" if size is None else str(size) for size in shape)
      self._fail(file, f"shape {array.shape}, should be ({want})")
    if array.dtype not in dtypes:
      want = " or ".join(str(dtype) for dtype in dtypes)
      self._fail(file, f"dtype {array.dtype}, should be {want}")
    return array

  def _open_ids(self, name: str, n: int, limit: int, of_what: str) -> np.ndarray:
    dtypes = tuple(np.dtype(code) for code in np.typecodes["AllInteger"])
    ids = np.array(self._open(name, (n,), dtypes))
    bad = np.flatnonzero((ids < 0) | (ids >= limit))
    if len(bad):
      self._fail(
        f"{name}.npy",
        f"pair {bad[0]} has {ids[bad[0]]}, but there are {limit} {of_what}",
      )
    return ids

  def _row(self, name: str, array: np.ndarray, index: int) -> np.ndarray:
    row = np.array(array[index])  # a copy in memory: the map is read only once
    if not np.isfinite(row).all():
      self._fail(f"{name}.npy", f"row {index} holds NaN or infinity")
    return row


def make_loader(
  source: PairSource,
  *,
  batch_size: int,
  seed: int,
  shuffle: bool,
  num_epochs: int | None,
  prompt_dropout: float,
  drop_remainder: bool,
) -> grain.IterDataset:
  """Batches of pairs as an iterable; the same arguments give the same batches.

  A batch is a dict of `chosen (b h w c)`, `rejected (b h w c)`, `context (b l d)`,
  `pooled (b e)` and `kind (b)`. Every pair comes once per epoch, in a new order each
  epoch if `shuffle`; `num_epochs=None` never ends. A batch may span the end of an
  epoch, so only the very last one can be short, and `drop_remainder` leaves it out.
  With probability `prompt_dropout` a pair's prompt becomes the empty one (drawn anew
  each epoch). `iter(loader)` has `get_state` and `set_state`: a small dict from which
  the batches continue exactly.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
  if not 0 <= prompt_dropout <= 1:
    raise ValueError(f"prompt_dropout must be in [0, 1], got {prompt_dropout}")
  if num_epochs is not None and num_epochs < 1:
    raise ValueError(f"num_epochs must be None or 1 or more, got {num_epochs}")
  if (
    num_epochs is not None and drop_remainder and len(source) * num_epochs < batch_size
  ):
    raise ValueError(
      f"{num_epochs} epochs of {len(source)} pairs in {source.folder} do not fill one "
      f"batch of {batch_size}"
    )
  # Grain shuffles epoch e with seed + e: spread the seeds, or run 1 would see in its
  # first epoch the order of run 0's second.
  shuffle_seed, dropout_seed = np.random.SeedSequence(seed).generate_state(2)
  dataset = grain.MapDataset.source(source)
  if shuffle:
    dataset = dataset.shuffle(int(shuffle_seed))
  dataset = dataset.repeat(num_epochs)
  if prompt_dropout > 0:
    context, pooled = source.embedding(0)

    def drop_prompt(pair: dict, rng: np.random.Generator) -> dict:
      if rng.random() >= prompt_dropout:
        return pair
      return pair | dict(context=context, pooled=pooled)

    dataset = dataset.random_map(drop_prompt, seed=int(dropout_seed))
  dataset = dataset.batch(batch_size, drop_remainder=drop_remainder)
  return dataset.to_iter_dataset(_READ_OPTIONS)


def _all_of(kind: type, values: object) -> bool:
  return isinstance(values, list) and all(type(value) is kind for value in values)
