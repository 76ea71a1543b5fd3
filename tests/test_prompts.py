"""Prompt files, and which prompts an iteration asks for."""

import numpy as np
import pytest

from lrm_jax.data import prompts


def test_read(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_bytes("\ufeffa cat\r\n\n  a dog \n \t\nein Fluß\u2028am Abend".encode())
  assert prompts.read(file) == ["a cat", "a dog", "ein Fluß\u2028am Abend"]


@pytest.mark.parametrize(
  "content, message",
  [
    (b"\n  \n", "prompts.txt holds no prompts: every line is blank"),
    (b"a cat\xff", r"prompts.txt is not valid UTF-8 \(byte 5\)"),
    (None, "the prompts file .*prompts.txt cannot be read: No such file"),
  ],
)
def test_files_that_cannot_be_used(content, message, tmp_path):
  file = tmp_path / "prompts.txt"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises((ValueError, OSError), match=message):
    prompts.read(file)


@pytest.mark.parametrize("total, count", [(7, 3), (3, 7), (5, 5), (1, 2)])
def test_each_prompt_once_per_epoch(total, count):
  """Also where epochs end within an iteration, or an iteration holds several."""
  drawn = [prompts.draw(total, count, i, seed=4) for i in range(3 * total)]
  assert all(indices.shape == (count,) for indices in drawn)
  epochs = np.concatenate(drawn).reshape(3 * count, total)
  np.testing.assert_array_equal(
    np.sort(epochs, axis=1), np.tile(np.arange(total), (3 * count, 1))
  )
  # A function of the iteration's number: any of them, in any order.
  for i in reversed(range(3 * total)):
    np.testing.assert_array_equal(prompts.draw(total, count, i, seed=4), drawn[i])


def test_orders_differ():
  first, second, other = (
    prompts.draw(50, 50, i, seed=seed).tolist() for i, seed in ((0, 1), (1, 1), (0, 2))
  )
  assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4
