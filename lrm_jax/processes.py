"""Several processes as one run: start, stop together, write once.

Multi-host JAX runs the same program on every host (https://docs.jax.dev, "Introduction
to multi-controller JAX"); this is the little that a trainer needs besides.
"""

from collections.abc import Callable
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


def initialize(coordinator: str | None, num_processes: int, process_id: int) -> None:
  """Joins the run's other processes; before anything touches a device.

  Args:
    coordinator: None for a single process; `auto` where the cluster says everything
      (TPU pods, Slurm, Open MPI); else `host:port` of process 0.

  Raises:
    ValueError: numbers that do not fit; a coordinator that cannot be reached.
  """
  if coordinator is None:
    if num_processes != 1:
      raise ValueError(f"--num_processes={num_processes} needs --coordinator=HOST:PORT")
    return
  # On CPUs collectives between processes need a library; other backends ignore this.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    if coordinator == "auto":
      jax.distributed.initialize()
      return
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f"--process_id={process_id} must lie in 0..{num_processes - 1} "
        f"(--num_processes={num_processes})"
      )
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except RuntimeError as e:
    raise ValueError(
      f"process {process_id} of {num_processes} cannot join the run at {coordinator}: "
      f"{str(e).splitlines()[0]}"
    ) from e


def is_main() -> bool:
  """Whether this process writes logs, reports and models."""
  return jax.process_index() == 0


def to_host(leaf: jax.Array) -> np.ndarray:
  """A whole array on every host, also where its parts live on several.

  All processes must call it.
  """
  if leaf.is_fully_addressable or leaf.is_fully_replicated:
    return np.asarray(leaf)
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


class StopSignal:
  """Notices SIGTERM (and the first Ctrl-C), so that a run can save and leave.

  A context manager; `requested(step)` is asked once per step. With several processes
  a signal to one of them stops all of them after the same step.
  """

  def __init__(self) -> None:
    self._signal: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopSignal":
    # With several processes jax's own handler notices a SIGTERM and must not be
    # replaced. Python allows handlers only in the main thread.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and in_main_thread:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._notice)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _notice(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._signal = number
    # A second one ends the process at once.
    handler: Callable | int | None = self._previous.get(number, signal.SIG_DFL)
    signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._signal is not None
