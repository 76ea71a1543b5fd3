"""The quickstart's data: preference pairs of real and generated digits, as parquet."""

from collections.abc import Iterator
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from lrm_jax.data import digits, parquet, prompt_cache, source

MARK = "made_from.json"
ROWS_PER_GROUP = 500

# Names in samples.npz: images by an early and by the final generator, once for the
# training pairs and once, drawn freshly, for the held-out pairs.
SAMPLE_SETS = ("early_train", "early_held_out", "final_train", "final_held_out")


def save_samples(path: str | os.PathLike, samples: dict[str, digits.Labelled]) -> None:
  """Writes the generator's samples, one `digits.Labelled` per name of SAMPLE_SETS."""
  arrays = {}
  for name in SAMPLE_SETS:
    arrays[f"{name}_images"] = samples[name].images
    arrays[f"{name}_labels"] = samples[name].labels
  np.savez(path, **arrays)


def load_samples(path: str | os.PathLike) -> dict[str, digits.Labelled]:
  """Reads what `save_samples` wrote.

  Raises:
    FileNotFoundError: no such file, with the command that makes it.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"{path} does not exist: pretrain the generator first with "
      "python train/generator.py --config configs/quickstart_generator.py"
    )
  with np.load(path, allow_pickle=False) as arrays:
    return {
      name: digits.Labelled(arrays[f"{name}_images"], arrays[f"{name}_labels"])
      for name in SAMPLE_SETS
    }


def write(
  train: str | os.PathLike,
  held_out: str | os.PathLike,
  prompts: str | os.PathLike,
  samples_path: str | os.PathLike,
  *,
  num_train: int,
  num_held_out: int,
  split_seed: int,
  channels: int,
  context_dim: int,
  pooled_dim: int,
) -> None:
  """Writes two parquet folders of pairs and the prompt cache, once.

  Training pairs use split A and the annotator fit on it; held-out pairs use split C,
  fresh samples and the same annotator. What an earlier call with the same arguments
  and samples has written stays.

  Raises:
    FileNotFoundError: no samples.
    DataError: a folder that an earlier call made from something else.
  """
  samples = load_samples(samples_path)
  made_from = dict(
    samples=hashlib.sha256(pathlib.Path(samples_path).read_bytes()).hexdigest(),
    num_train=num_train,
    num_held_out=num_held_out,
    split_seed=split_seed,
    channels=channels,
    context_dim=context_dim,
    pooled_dim=pooled_dim,
  )
  folders = [pathlib.Path(folder) for folder in (train, held_out, prompts)]
  if all([_is_made(folder, made_from) for folder in folders]):
    return
  splits = digits.load_splits(split_seed)
  annotator = digits.fit_annotator(splits.train)
  rng = np.random.default_rng(split_seed)
  made = {}
  for name, real, num in (
    ("train", splits.train, num_train),
    ("held_out", splits.held_out, num_held_out),
  ):
    made[name] = digits.make_pairs(
      real,
      samples[f"early_{name}"],
      samples[f"final_{name}"],
      annotator=annotator,
      num=num,
      rng=rng,
    )
  digits.check_no_leak(made["train"], made["held_out"])
  for folder, pairs in zip(folders[:2], made.values(), strict=True):
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_part(
      folder / "part-00000.parquet",
      _records(pairs, channels),
      rows_per_group=ROWS_PER_GROUP,
      force=True,
    )
    parquet.write_index(folder)
    _mark(folder, made_from)
  embedder = digits.WordEmbedder(context_dim, pooled_dim)
  with prompt_cache.PromptCacheWriter(
    folders[2], t5_length=0, dtype="float32", encoder="digit words"
  ) as cache:
    missing = cache.missing(digits.PROMPTS)
    if missing:
      cache.append(missing, embedder.context(missing), embedder.pooled(missing))
  _mark(folders[2], made_from)


def _records(pairs: digits.PairRecords, channels: int) -> Iterator[dict[str, Any]]:
  chosen = digits.to_latent(pairs.chosen, channels)
  rejected = digits.to_latent(pairs.rejected, channels)
  for i in range(len(pairs)):
    yield dict(
      prompt=digits.PROMPTS[pairs.prompt_id[i]],
      chosen=chosen[i],
      rejected=rejected[i],
      kind=digits.KIND_NAMES[pairs.kind[i]],
    )


def _is_made(folder: pathlib.Path, made_from: dict[str, Any]) -> bool:
  """Whether a folder is there and complete.

  Raises:
    DataError: it was made from something else.
  """
  mark = folder / MARK
  if not mark.is_file():
    return False
  found = json.loads(mark.read_text())
  if found != made_from:
    differing = sorted(k for k in made_from if found.get(k) != made_from[k])
    raise source.DataError(
      f"{folder} was made from other {', '.join(differing)}: delete it, or choose "
      "another folder"
    )
  return True


def _mark(folder: pathlib.Path, made_from: dict[str, Any]) -> None:
  """Written last: a folder without it is not complete."""
  draft = folder / f".{MARK}.draft-{os.getpid()}"
  draft.write_text(json.dumps(made_from, indent=2) + "\n")
  draft.replace(folder / MARK)
