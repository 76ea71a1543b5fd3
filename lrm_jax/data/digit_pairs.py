"""The quickstart's pair folders: preference pairs of real and generated digits."""

import os
import pathlib

import numpy as np

from lrm_jax.data import digits, pairs

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
  folder: str | os.PathLike,
  samples_path: str | os.PathLike,
  *,
  num_train: int,
  num_held_out: int,
  split_seed: int,
  channels: int,
  context_dim: int,
  pooled_dim: int,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes `folder/train` and `folder/held_out`; returns both paths.

  Training pairs use split A and the annotator fit on it; held-out pairs use split C,
  fresh samples and the same annotator. Existing folders are replaced (same arguments,
  same bytes).
  """
  samples = load_samples(samples_path)
  splits = digits.load_splits(split_seed)
  annotator = digits.fit_annotator(splits.train)
  embedder = digits.WordEmbedder(context_dim, pooled_dim)
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
  paths = []
  for name, records in made.items():
    paths.append(pathlib.Path(folder) / name)
    pairs.write_pairs(
      paths[-1],
      chosen=digits.to_latent(records.chosen, channels),
      rejected=digits.to_latent(records.rejected, channels),
      prompt_id=records.prompt_id,
      prompts=digits.PROMPTS,
      context=embedder.context(digits.PROMPTS),
      pooled=embedder.pooled(digits.PROMPTS),
      kind=records.kind,
      kind_names=digits.KIND_NAMES,
      force=True,
    )
  return paths[0], paths[1]
