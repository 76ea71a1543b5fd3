"""Checkpoints of a run: the train state and the data iterator, by Orbax."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """A run's `checkpoints/` folder: asynchronous saves, atomic, the newest kept."""

  def __init__(self, folder: str | os.PathLike, *, keep: int):
    self._manager = ocp.CheckpointManager(
      pathlib.Path(folder).absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: dict) -> None:
    """Starts a save; `data` is the loader's `get_state()`. Nothing if it exists."""
    if step == self.latest:
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
      ),
    )

  def restore(self, step: int, state: Any, shardings: Any) -> tuple[Any, dict]:
    """(state, data) of a step, each array placed by `shardings`.

    Args:
      state: the abstract train state.
    """
    target = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
      ),
    )
    return restored.state, restored.data

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Waits for pending saves: also where the run has failed, what it had saved is."""
    self._manager.wait_until_finished()
    self._manager.close()
