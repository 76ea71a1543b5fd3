"""Tiny alignment runs: the full-size recipes on the golden SD3.5."""

import pathlib

from ml_collections import ConfigDict
import numpy as np

from lrm_jax.data import parquet, prompt_cache
from tests import runs
from tests.generating import Folders

PROMPTS = tuple(f"{what} {where}" for what in ("cat", "dog") for where in "abcd")
LATENT = (4, 4, 16)  # of 8 x 8 pixels
T5_LENGTH, WIDTH = 8, 64
LENGTH = 6  # of cached embeddings: programs are as fast as their text is short


def write_cache(folder: pathlib.Path, prompts=("", *PROMPTS)) -> pathlib.Path:
  """Random embeddings of the golden transformer's widths."""
  rng = np.random.default_rng(3)
  with prompt_cache.PromptCacheWriter(
    folder, t5_length=T5_LENGTH, dtype="float32", encoder="random"
  ) as cache:
    cache.append(
      prompts,
      rng.standard_normal((len(prompts), LENGTH, WIDTH), np.float32),
      rng.standard_normal((len(prompts), WIDTH), np.float32),
    )
  return folder


def write_pairs(folder: pathlib.Path, size=LATENT[:2]) -> pathlib.Path:
  """Folders `pairs` and `prompts`: real data for ReFL."""
  (folder / "pairs").mkdir(parents=True)
  records = list(runs.records(16, sizes=(size,)))
  parquet.write_part(folder / "pairs" / "part.parquet", records, rows_per_group=8)
  parquet.write_index(folder / "pairs")
  write_cache(folder / "prompts", runs.PROMPTS)
  return folder


def tiny(
  recipe: str, folders: Folders, workdir: pathlib.Path, *args: str
) -> ConfigDict:
  """A full-size recipe, e.g. `flow_grpo`, with its sizes, and nothing else, small."""
  c = runs.config_of(f"sd35m_{recipe}", *args)
  c.workdir = str(workdir)
  file = folders.root / "prompts.txt"
  file.write_text("\n".join(PROMPTS) + "\n")
  c.prompts.update(train=str(file), eval=str(file), t5_length=T5_LENGTH)
  c.model.generator = str(folders.sd35)
  c.model.dtype = "float32"
  c.lora.update(rank=2, alpha=4)
  for name, term in c.rewards.items():
    # One with its own backbone is enough; a head on the generator's compiles faster.
    small = "head" if name == "drm" and recipe != "step_grpo" else name
    term.folder = str(getattr(folders, small))
  c.rollout.update(height=8, width=8, num_steps=3)
  if c.rollout.sde_window_size is not None:
    c.rollout.sde_window_range = (0, 3)
  c.train.update(num_iterations=2, prompts=8, checkpoint_every=1, learning_rate=1e-2)
  c.train.minibatches = min(2, c.train.minibatches)
  c.train.micro_batches = 1
  c.eval.update(every=1, prompts=4, num=2, num_steps=2, images=2)
  if recipe == "refl":
    c.loss.window = (1, 3)
    c.real.batch_size = 8
  else:
    c.group.group_size = min(2, c.group.group_size)
  return c
