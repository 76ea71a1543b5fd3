"""Prompt files, and which of their prompts an iteration asks for."""

import os
import pathlib

import numpy as np


def read(file: str | os.PathLike) -> list[str]:
  """The prompts of a UTF-8 text file, one a line; blank lines are skipped.

  Raises:
    ValueError: no prompt at all, or not UTF-8.
    OSError: the file cannot be read.
  """
  try:
    content = pathlib.Path(file).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(
      f"{file} is not valid UTF-8 (byte {e.start}): save it with that encoding"
    ) from e
  except OSError as e:
    raise OSError(f"the prompts file {file} cannot be read: {e.strerror}") from e
  # Not splitlines, which also splits at rare separators within a prompt.
  found = [line.strip() for line in content.split("\n")]
  found = [line for line in found if line]
  if not found:
    raise ValueError(f"{file} holds no prompts: every line is blank")
  return found


def draw(total: int, count: int, iteration: int, *, seed: int) -> np.ndarray:
  """Indices (count,) of the prompts of an iteration, of `total`.

  Every epoch is another permutation of all of them; iterations take from it in turn.
  A pure function, so that a run continues anywhere.
  """
  places = np.arange(iteration * count, (iteration + 1) * count)
  epochs, at = np.divmod(places, total)
  orders = {
    epoch: np.random.default_rng([seed, int(epoch)]).permutation(total)
    for epoch in np.unique(epochs)
  }
  return np.array([orders[epoch][i] for epoch, i in zip(epochs, at, strict=True)])
