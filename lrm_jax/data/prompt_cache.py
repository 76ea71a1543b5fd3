"""Prompt embeddings on disk, found by the prompt's text.

```
DIR/cache.json                              what all shards have in common (`Settings`)
DIR/prompts-<host>-<number>.safetensors     context (p l d), pooled (p e); metadata:
                                            settings, prompts, checksum of each row
```

A shard is one file that appears by a rename: it is there completely or not at all.
Several writers fill one folder, each under a host number of its own; a prompt that two
of them wrote is read from the first.

Axes: p prompts of a shard, l text tokens, d context width,
e pooled width.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any
import zlib

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from lrm_jax.data.source import DataError

FORMAT = "lrm_jax.prompt_cache"
VERSION = 1
DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# At full size (205 tokens of 4096) 215 MB in bfloat16: what a killed writer loses.
SHARD_PROMPTS = 128
COMMAND = "python convert/precompute_prompts.py"
_REMEDY = "Delete this shard and the later ones of its host, and add the prompts again"
_CACHE = "cache.json"
_SHARD = re.compile(r"prompts-(\d{4})-(\d{6})\.safetensors")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all embeddings of a folder have in common.

  Attributes:
    t5_length: tokens of T5 that prompts were padded or cut to.
    dtype: `float32` or `bfloat16`, of what is stored.
    encoder: fingerprint of the text encoders: any text, another one for other values.
    context_shape: (l, d); with SD3.5's encoders l = 77 + t5_length.
    pooled_dim: e.
  """

  t5_length: int
  dtype: str
  encoder: str
  context_shape: tuple[int, int]
  pooled_dim: int

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise ValueError(f"dtype={self.dtype!r}: use one of {sorted(DTYPES)}")

  def to_json(self) -> str:
    values = dict(format=FORMAT, version=VERSION, **dataclasses.asdict(self))
    return json.dumps(values, indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str, where: pathlib.Path) -> "Settings":
    """Raises DataError on anything that `to_json` does not write."""
    try:
      values = json.loads(text)
      found = values.pop("format"), values.pop("version")
      if found != (FORMAT, VERSION):
        raise ValueError(f"it has (format, version) = {found}, not {FORMAT, VERSION}")
      shape = tuple(values.pop("context_shape"))
      return cls(context_shape=shape, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
      raise DataError(f"{where} does not describe a prompt cache: {e!r}") from e


class PromptCache:
  """The embeddings of a folder, read one by one.

  `cache[prompt]` is `(context (l d), pooled (e))`, in the dtype they are stored in.
  Nothing but the prompts is kept in memory and no file stays open, so it can be
  pickled and read by many threads.

  Attributes: those of `settings`, and
    name: the folder.
    prompts: all of them, in the order of the shards.
  """

  def __init__(self, folder: str | os.PathLike):
    """Reads the heads of all shards.

    Raises:
      DataError: no cache there, a shard that is missing, truncated, or of other
        settings.
    """
    self.name = str(folder)
    self.settings = _read_settings(pathlib.Path(folder))
    self._shards: list[str] = []
    self._places: dict[str, tuple[int, int]] = {}  # prompt -> shard, row
    self._checksums: list[list[int]] = []
    for path in _shard_paths(pathlib.Path(folder)):
      prompts, checksums = _read_head(path, self.settings)
      for row, prompt in enumerate(prompts):
        self._places.setdefault(prompt, (len(self._shards), row))
      self._shards.append(str(path))
      self._checksums.append(checksums)

  @property
  def prompts(self) -> tuple[str, ...]:
    return tuple(self._places)

  @property
  def t5_length(self) -> int:
    return self.settings.t5_length

  @property
  def dtype(self) -> np.dtype:
    return DTYPES[self.settings.dtype]

  @property
  def encoder(self) -> str:
    return self.settings.encoder

  @property
  def context_shape(self) -> tuple[int, int]:
    return self.settings.context_shape

  @property
  def pooled_dim(self) -> int:
    return self.settings.pooled_dim

  def __len__(self) -> int:
    return len(self._places)

  def __contains__(self, prompt: object) -> bool:
    return prompt in self._places

  def __getitem__(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Raises DataError: a prompt that is not there, or a damaged shard."""
    if prompt not in self._places:
      self.require([prompt])
    shard, row = self._places[prompt]
    path = self._shards[shard]
    try:
      with safetensors.safe_open(path, "np") as file:
        context = file.get_slice("context")[row]
        pooled = file.get_slice("pooled")[row]
    except (OSError, safetensors.SafetensorError) as e:
      raise DataError(f"{path} cannot be read: {e}. {_REMEDY}") from e
    if _checksum(context, pooled) != self._checksums[shard][row]:
      raise DataError(
        f"{path}: the embedding in row {row} (prompt {prompt!r}) is damaged. {_REMEDY}"
      )
    return context, pooled

  def require(self, prompts: Iterable[str]) -> None:
    """Checks that all of these prompts are there, before any is needed.

    Raises:
      DataError: names a missing one, how many there are, and what adds them.
    """
    missing = [p for p in dict.fromkeys(prompts) if p not in self._places]
    if missing:
      others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
      raise DataError(
        f"the prompt cache {self.name} has no embedding of {missing[0]!r}{others} "
        f"(it holds {len(self)} prompts at T5 length {self.t5_length}); add what is "
        f"missing with `{COMMAND} --model MODEL --out {self.name} --t5-length "
        f"{self.t5_length} --dtype {self.settings.dtype} ...` (see its --help)"
      )

  def __repr__(self) -> str:
    return f"PromptCache({self.name!r})"


class PromptCacheWriter:
  """Adds embeddings to a folder, shard by shard.

    with PromptCacheWriter(folder, t5_length=128, dtype="bfloat16", encoder=e) as out:
      for batch in batched(out.missing(prompts)):
        out.append(batch, *encode(batch))

  A folder that exists is continued: `missing` leaves out what is there. The rest of
  the prompts is written when the block ends without an exception.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    t5_length: int,
    dtype: str,
    encoder: str,
    host: int = 0,
    shard_prompts: int = SHARD_PROMPTS,
  ):
    """
    Args:
      t5_length, dtype, encoder: see `Settings`.
      host: number of this writer; two at the same time must have different ones.
      shard_prompts: prompts per shard; so many are held in memory.

    Raises:
      DataError: a folder with other settings, or a damaged one.
      ValueError: an argument that cannot be used.
    """
    if dtype not in DTYPES:
      raise ValueError(f"dtype={dtype!r}: use one of {sorted(DTYPES)}")
    if not 0 <= host <= 9999:
      raise ValueError(f"host={host} is not in 0..9999")
    if shard_prompts < 1:
      raise ValueError(f"shard_prompts={shard_prompts} must be 1 or more")
    self.folder = pathlib.Path(folder)
    # What the folder's settings have to be; the shapes follow with the embeddings.
    self._wanted: dict[str, Any] = dict(
      t5_length=t5_length, dtype=dtype, encoder=encoder
    )
    self._dtype = DTYPES[dtype]
    self._shard_prompts = shard_prompts
    self._prefix = f"prompts-{host:04d}-"
    self._present: set[str] = set()
    self._prompts: list[str] = []
    self._rows: list[tuple[np.ndarray, np.ndarray]] = []
    self.folder.mkdir(parents=True, exist_ok=True)
    if (self.folder / _CACHE).exists() or _shard_paths(self.folder):
      cache = PromptCache(self.folder)
      self._check(cache.settings)
      self._wanted = dataclasses.asdict(cache.settings)
      self._present.update(cache.prompts)
    # What a killed writer of this number left behind.
    for partial in self.folder.glob(f".{self._prefix}*.partial-*"):
      partial.unlink(missing_ok=True)

  def missing(self, prompts: Iterable[str]) -> list[str]:
    """Which of these are to be encoded, each once; in order."""
    return [p for p in dict.fromkeys(prompts) if p not in self._present]

  def append(self, prompts: Sequence[str], context: Any, pooled: Any) -> None:
    """Adds embeddings, and writes a shard whenever enough have come together.

    Prompts that are there already are left as they are.

    Args:
      context, pooled: (p l d) and (p e), any float arrays; cast to the folder's dtype.

    Raises:
      DataError: shapes that do not fit, or an embedding that is not finite.
    """
    context = np.asarray(context).astype(self._dtype, copy=False)
    pooled = np.asarray(pooled).astype(self._dtype, copy=False)
    if (context.ndim, pooled.ndim) != (3, 2) or not (
      len(context) == len(pooled) == len(prompts)
    ):
      raise DataError(
        f"{len(prompts)} prompts with context {context.shape} and pooled "
        f"{pooled.shape}: should be (p, l, d) and (p, e)"
      )
    shapes = dict(context_shape=context.shape[1:], pooled_dim=pooled.shape[1])
    given = Settings(**(self._wanted | shapes))
    self._check(given)
    self._wanted = dataclasses.asdict(given)
    for i, prompt in enumerate(prompts):
      if prompt in self._present:
        continue
      row = context[i].copy(), pooled[i].copy()  # views would hold the whole batch
      if not all(np.isfinite(array).all() for array in row):
        raise DataError(f"the embedding of {prompt!r} holds NaN or infinity")
      self._present.add(prompt)
      self._prompts.append(prompt)
      self._rows.append(row)
      if len(self._prompts) == self._shard_prompts:
        self.flush()

  def flush(self) -> None:
    """Writes what has been added as a shard, however small."""
    if not self._prompts:
      return
    settings = Settings(**self._wanted)
    if not (self.folder / _CACHE).exists():
      _write(self.folder / _CACHE, settings.to_json().encode(), self._prefix)
    self._check(_read_settings(self.folder))  # another host may have been faster
    contexts, pooled = zip(*self._rows, strict=True)
    shard = safetensors.numpy.save(
      dict(context=np.stack(contexts), pooled=np.stack(pooled)),
      metadata=dict(
        settings=settings.to_json(),
        prompts=json.dumps(self._prompts),
        checksums=json.dumps([_checksum(*row) for row in self._rows]),
      ),
    )
    ours = [p for p in _shard_paths(self.folder) if p.name.startswith(self._prefix)]
    name = f"{self._prefix}{len(ours):06d}.safetensors"
    _write(self.folder / name, shard, self._prefix)
    self._prompts, self._rows = [], []

  def __enter__(self) -> "PromptCacheWriter":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if kind is None:
      self.flush()

  def _check(self, found: Settings) -> None:
    differing = [
      f"{key} {getattr(found, key)!r}, not {value!r}"
      for key, value in self._wanted.items()
      if getattr(found, key) != value
    ]
    if differing:
      raise DataError(
        f"{self.folder} is a prompt cache with other settings: "
        f"{'; '.join(differing)}. Use the same ones, or another folder"
      )


def _read_settings(folder: pathlib.Path) -> Settings:
  path = folder / _CACHE
  try:
    text = path.read_text()
  except (FileNotFoundError, NotADirectoryError) as e:
    raise DataError(
      f"{folder} is not a prompt cache (no {_CACHE}): make one with `{COMMAND}`"
    ) from e
  except UnicodeDecodeError as e:
    raise DataError(f"{path} is damaged: {e}") from e
  return Settings.from_json(text, path)


def _shard_paths(folder: pathlib.Path) -> list[pathlib.Path]:
  """In the order of hosts and numbers; DataError where one is missing in between."""
  paths = sorted(p for p in folder.iterdir() if _SHARD.fullmatch(p.name))
  expected: dict[str, int] = {}
  for path in paths:
    host, number = _SHARD.fullmatch(path.name).groups()
    if int(number) != expected.setdefault(host, 0):
      raise DataError(
        f"{folder} lacks prompts-{host}-{expected[host]:06d}.safetensors, but has "
        f"{path.name}: copy the missing shard, or remove those of host {host} from "
        "there on and add their prompts again"
      )
    expected[host] += 1
  return paths


def _read_head(path: pathlib.Path, settings: Settings) -> tuple[list[str], list[int]]:
  """Prompts and checksums of a shard; DataError unless it fits the settings."""
  try:
    with safetensors.safe_open(path, "np") as file:
      metadata = file.metadata() or {}
      shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    prompts = json.loads(metadata["prompts"])
    checksums = json.loads(metadata["checksums"])
  except (OSError, safetensors.SafetensorError, KeyError, ValueError) as e:
    raise DataError(f"{path} cannot be read: {e!r}. {_REMEDY}") from e
  if (found := Settings.from_json(metadata.get("settings", ""), path)) != settings:
    raise DataError(f"{path} has settings {found}, the folder's are {settings}")
  p = len(prompts)
  expected = dict(context=(p, *settings.context_shape), pooled=(p, settings.pooled_dim))
  if shapes != expected or len(checksums) != p:
    raise DataError(
      f"{path} lists {p} prompts and {len(checksums)} checksums, but holds {shapes}, "
      f"not {expected}. {_REMEDY}"
    )
  return prompts, checksums


def _checksum(context: np.ndarray, pooled: np.ndarray) -> int:
  # As bytes where they lie: a copy would take longer than the sum.
  parts = (np.ascontiguousarray(a).view(np.uint8) for a in (context, pooled))
  return functools.reduce(lambda sum_, part: zlib.crc32(part, sum_), parts, 0)


def _write(path: pathlib.Path, data: bytes, owner: str) -> None:
  """All of it under this name, or nothing; what was there is replaced.

  Args:
    owner: the writer's prefix, by which it finds what a kill left behind.
  """
  partial = path.with_name(f".{owner}{path.name}.partial-{os.getpid()}")
  try:
    with open(partial, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())  # before the rename: a machine may lose power
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
