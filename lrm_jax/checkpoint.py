"""Checkpoints of a run: the train state and all that a continuation needs, by Orbax."""

from collections.abc import Mapping
import os
import pathlib
import shutil
import sys
import threading
import traceback
import types
from typing import Any

from absl import logging
import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

GIB = 2**30


class CheckpointError(OSError):
  """A checkpoint that cannot be written or read; the message names it and the cause."""


def report_failures_once() -> None:
  """Leaves only the exception that the caller gets of a failed write.

  Orbax and TensorStore report one from every thread that took part: in the log, as
  the thread's traceback, and as callbacks into an event loop that is closed by then;
  hundreds of lines around the one that says what to do. For programs, not libraries:
  the hooks are the process's.
  """

  def of_orbax(trace: types.TracebackType | None) -> bool:
    frames = traceback.extract_tb(trace)
    return any("orbax" in frame.filename for frame in frames)

  # Also asyncio's, on Orbax's abandoned tasks.
  logging.get_absl_handler().addFilter(
    lambda record: "orbax" not in record.pathname + record.getMessage()
  )
  thread_hook, hook = threading.excepthook, sys.excepthook

  def in_thread(args: Any) -> None:
    if not of_orbax(args.exc_traceback):
      thread_hook(args)

  def anywhere(kind: type, error: BaseException, trace: Any) -> None:
    in_main = threading.current_thread() is threading.main_thread()
    if in_main or "Event loop is closed" not in str(error):
      hook(kind, error, trace)

  unraisable_hook = sys.unraisablehook

  def unraisable(args: Any) -> None:
    if "Event loop is closed" not in str(args.exc_value):
      unraisable_hook(args)

  threading.excepthook, sys.excepthook = in_thread, anywhere
  sys.unraisablehook = unraisable


class Checkpoints:
  """A run's `checkpoints/` folder.

  Saves are asynchronous and atomic: a checkpoint appears under its step's number when
  it is complete, and is renamed before it is deleted, so a kill at any moment leaves
  only whole ones. Kept are the newest `keep` and the `keep_best` with the highest
  value of `best_metric` among those saved with metrics.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int,
    keep_best: int = 0,
    best_metric: str = "",
  ):
    if keep < 1 or keep_best < 0:
      raise ValueError(
        f"keep={keep} must be 1 or more, keep_best={keep_best} 0 or more"
      )
    self.folder = pathlib.Path(folder).absolute()
    self._best_metric = best_metric
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_best:
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=self._metric,
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    try:
      self._manager = ocp.CheckpointManager(
        self.folder,
        options=ocp.CheckpointManagerOptions(
          create=True,
          preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
          # Without it the metrics would not be written, and forgotten by a restart.
          best_fn=self._metric if keep_best else None,
          cleanup_tmp_directories=True,
          todelete_subdir=".deleting",
        ),
      )
    except OSError as e:
      raise CheckpointError(f"cannot use {self.folder} for checkpoints: {e}") from e

  def _metric(self, metrics: Mapping[str, float]) -> float:
    return metrics[self._best_metric]

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint; None if there is none."""
    return self._manager.latest_step()

  @property
  def best(self) -> int | None:
    """Step of the checkpoint with the highest `best_metric`; None if none has one."""
    scored = []
    for step in self._manager.all_steps():
      metrics = self._manager.metrics(step)
      if metrics and self._best_metric in metrics:
        scored.append((self._metric(metrics), step))
    return max(scored)[1] if scored else None

  def save(
    self,
    step: int,
    state: PyTree,
    extra: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts a save. Nothing if there is one of this step.

    Args:
      extra: JSON-ready: the state of the data iterator, the random key.
      metrics: what `keep_best` looks at.

    Raises:
      CheckpointError: this save, or the one before it, failed.
    """
    if step == self.latest:
      return
    try:
      self._manager.save(
        step,
        metrics=None if metrics is None else dict(metrics),
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(dict(extra))
        ),
      )
    except Exception as e:  # Orbax and TensorStore raise many kinds
      raise self._write_error(step, e) from e

  def restore(self, step: int, state: PyTree, shardings: PyTree) -> tuple[Any, dict]:
    """(state, extra) of a step, each array placed by `shardings`.

    The mesh need not be the one that the checkpoint was written on.

    Args:
      state: the abstract train state.

    Raises:
      CheckpointError: unreadable, or of another train state.
    """
    target = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore()
        ),
      )
    except Exception as e:
      others = [s for s in self._manager.all_steps() if s != step]
      remedy = (
        f"delete {self.folder / str(step)} to continue from step {max(others)}"
        if others
        else "there is no other; start again in an empty workdir"
      )
      raise CheckpointError(
        f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(e)}; "
        + remedy
      ) from e
    return restored.state, restored.extra

  def wait(self) -> None:
    """Returns when what was saved is on disk.

    Raises:
      CheckpointError: a save failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      raise self._write_error(None, e) from e

  def check_space(self, state: PyTree) -> None:
    """Refuses to start a run whose checkpoints cannot fit on the disk.

    At least two are there at a time: the newest, and the one being written.

    Raises:
      CheckpointError: too little free space; says how much is missing.
    """
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    needed = size * (1 if self.latest is not None else 2)
    free = shutil.disk_usage(self.folder).free
    if free < needed:
      raise CheckpointError(
        f"{self.folder} has {free / GIB:.2f} GiB free, but checkpoints of "
        f"{size / GIB:.2f} GiB each need {needed / GIB:.2f} GiB (the newest, and one "
        "being written): free space, or choose another workdir"
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    """Waits for pending saves: also where the run has failed, what it had saved is."""
    try:
      self.wait()
    except CheckpointError:
      if kind is None:  # else the error under way is the one to report
        raise
    finally:
      self._manager.close()

  def _write_error(self, step: int | None, cause: Exception) -> CheckpointError:
    what = "a checkpoint" if step is None else f"checkpoint {step}"
    newest = self._complete()
    kept = (
      "none is complete yet"
      if newest is None
      else f"the newest complete one is step {newest}, from which the run continues"
    )
    free = shutil.disk_usage(self.folder).free / GIB
    return CheckpointError(
      f"writing {what} to {self.folder} failed: {_first_line(cause)}. Is the disk full "
      f"({free:.2f} GiB free) or read-only? {kept}"
    )

  def _complete(self) -> int | None:
    """The newest step on disk; the manager counts also one that is being written."""
    steps = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]
    return max(steps, default=None)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
