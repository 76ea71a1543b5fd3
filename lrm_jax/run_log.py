"""What a run leaves behind besides its weights: metrics, and how it was started.

A run folder gets `metrics.jsonl` (one flat object per step), TensorBoard events and
`run.json`. One process writes: with several hosts, make a RunLog on process 0 only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import tensorboardX

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunLog:
  """Writes a run's metrics, one line per step, to a folder.

  An existing folder is continued. `resume_step` is the last step of the checkpoint
  the run restarts from: later lines, which the run is about to write again, are
  dropped. Without it new steps must come after those already there.
  `total_steps` and `console` control the progress line: it appears once a run has
  taken `quiet_seconds`, in place on a terminal and every 30 s elsewhere, and shows
  the metrics named in `console_metrics` under their last part.
  `wandb_project` also sends every line to Weights & Biases, if that is installed; a
  resumed run continues its own.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    resume_step: int | None = None,
    total_steps: int | None = None,
    console: bool = True,
    console_metrics: Sequence[str] = ("train/loss",),
    quiet_seconds: float | int = 5,
    wandb_project: str | None = None,
  ):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    self._path = self.folder / "metrics.jsonl"
    lines = read_metrics(self.folder) if self._path.exists() else []
    if resume_step is not None:
      lines = [line for line in lines if line["step"] <= resume_step]
    if self._path.exists():
      # Also without anything to drop: a killed run may have left half a line.
      _write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
    self.last_step: int | None = lines[-1]["step"] if lines else None
    self._file = self._path.open("a")
    # TensorBoard then hides what an earlier run wrote from this step on.
    purge_step = None if resume_step is None else resume_step + 1
    self._board = tensorboardX.SummaryWriter(str(self.folder), purge_step=purge_step)
    self._wandb = None
    if wandb_project is not None:
      self._wandb = _start_wandb(wandb_project, self.folder)
    self._progress = None
    if console:
      self._progress = _Progress(total_steps, console_metrics, quiet_seconds)

  def log(self, step: int | np.integer, metrics: Mapping[str, Any]) -> None:
    """Writes one step's scalars; the file holds at most one line per step.

    Raises FloatingPointError naming metric and step on NaN or infinity (nothing is
    written then), ValueError on a value that is no scalar or a step not after the
    last one.
    """
    step = int(step)
    if self.last_step is not None and step <= self.last_step:
      raise ValueError(
        f"step {step} comes after step {self.last_step} in {self._path}; log all "
        "metrics of a step at once, and give resume_step when restarting"
      )
    values = {name: _scalar(name, value) for name, value in metrics.items()}
    if "step" in values:
      raise ValueError("'step' is not a metric's name: it is the line's own key")
    bad = [f"{name} = {v}" for name, v in values.items() if not math.isfinite(v)]
    if bad:
      raise FloatingPointError(f"at step {step}: {', '.join(bad)}")
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)
    self.last_step = step
    if self._progress is not None:
      self._progress.show(step, values)

  def close(self) -> None:
    if self._progress is not None:
      self._progress.close()
    self._file.close()
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, *_) -> None:
    self.close()


class LateLog:
  """Metrics fetched one step late, so that the devices never wait for the host.

  Every step's loss and gradient norm are checked when they are fetched, also where
  nothing is written, so that a NaN is reported with the step it came from. Closes the
  log that it was given.
  """

  def __init__(
    self,
    log: RunLog | None,
    more: Callable[[], Mapping[str, float]],
    *,
    remedy: str,
  ):
    """
    Args:
      log: None on processes that write nothing.
      more: metrics of the host, asked for when a line is written.
      remedy: what to do about a NaN.
    """
    self._log, self._more, self._remedy = log, more, remedy
    self._unchecked: list[tuple[int, Any, Any]] = []
    self._pending: tuple[int, dict[str, Any]] | None = None

  def step(self, step: int, metrics: Mapping[str, Any], *, now: bool) -> None:
    """Notes a step's metrics; `now`: they are to be written (at the next flush)."""
    if self._pending is not None:
      self.flush()
    if "train/loss" in metrics:
      self._unchecked.append((step, metrics["train/loss"], metrics["train/grad_norm"]))
    if now:
      self._pending = step, dict(metrics)

  def add(self, metrics: Mapping[str, float]) -> None:
    """More metrics of the step that is to be written."""
    self._pending[1].update(metrics)

  def flush(self, *, write: bool = True) -> None:
    """Fetches, checks and writes what is there.

    Raises:
      FloatingPointError: NaN or infinity, with the step.
    """
    unchecked, self._unchecked = self._unchecked, []
    for step, loss, norm in jax.device_get(unchecked):
      if not (np.isfinite(loss) and np.isfinite(norm)):
        raise FloatingPointError(
          f"at step {step}: train/loss = {loss}, train/grad_norm = {norm}; checkpoints "
          f"are from before. {self._remedy}"
        )
    if self._pending is not None and write:
      (step, metrics), self._pending = self._pending, None
      metrics = {**jax.device_get(metrics), **self._more()}
      if self._log is not None:
        self._log.log(step, metrics)

  def __enter__(self) -> "LateLog":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    try:
      if kind is None:
        self.flush()
    finally:
      if self._log is not None:
        self._log.close()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float | int]]:
  """The lines of a run's metrics.jsonl, in order.

  A last line without its newline is the mark of a run killed while writing, and is
  left out. Raises ValueError on any other line that is no metrics line.
  """
  path = pathlib.Path(folder) / "metrics.jsonl"
  lines = []
  for number, text in enumerate(path.read_text().splitlines(keepends=True), 1):
    if not text.endswith("\n"):
      break
    try:
      line = json.loads(text)
    except json.JSONDecodeError as e:
      raise ValueError(f"{path}, line {number}: not valid JSON ({e})") from e
    if not isinstance(line, dict) or type(line.get("step")) is not int:
      raise ValueError(f"{path}, line {number}: not an object with an integer step")
    if lines and line["step"] <= lines[-1]["step"]:
      raise ValueError(
        f"{path}, line {number}: step {line['step']} after {lines[-1]['step']}"
      )
    lines.append(line)
  return lines


def write_run_info(
  folder: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  seed: int,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes `run.json`: versions, git commit, seed, the whole config and `extra`.

  `config` is a plain nested dict; a value that JSON cannot hold is a TypeError.
  `git` is null where the package does not run from a git checkout.
  """
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  info = dict(
    versions={"python": platform.python_version(), **versions},
    git=_git_state(),
    seed=seed,
    config=config,
    extra=extra or {},
  )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  _write_text(folder / "run.json", json.dumps(info, indent=2) + "\n")


def check_same_run(
  folder: str | os.PathLike,
  config: Mapping[str, Any],
  may_change: str,
  *,
  hint: str = "choose another workdir or delete it",
) -> None:
  """Compares the config of the run that left its traces in a folder with this one.

  Args:
    config: a plain nested dict, as for `write_run_info`.
    may_change: regex of the dotted names of settings in which a run and its
      continuation may differ; any other would make the result neither run's.
    hint: what the error says one can do.

  Raises:
    ValueError: no run.json, or they differ in more; every difference is listed.
  """
  file = pathlib.Path(folder) / "run.json"
  if not file.is_file():
    raise ValueError(f"{folder} holds checkpoints but no run.json: whose are they?")
  try:
    old = _dotted(json.loads(file.read_text())["config"])
  except (json.JSONDecodeError, KeyError, TypeError) as e:
    raise ValueError(f"{file} cannot be read: {e!r}") from e
  new = _dotted(json.loads(json.dumps(config)))
  differences = [
    f"{key}: {old.get(key)} then, {new.get(key)} now"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not re.fullmatch(may_change, key)
  ]
  if differences:
    raise ValueError(
      f"{folder} holds a run with other settings; {hint}\n  " + "\n  ".join(differences)
    )


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= _dotted(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


class Throughput:
  """How fast a run is, between one line of its log and the next.

  What happens inside `untimed()` (compiling, evaluating) does not count.
  """

  def __init__(self, peak_flops: float | int | None):
    self._peak = peak_flops  # of all chips together, per second; None: no MFU
    self._start = time.monotonic()
    self._images = 0
    self._flops = 0

  def add(self, images: int, flops: int) -> None:
    """One step's images and model FLOPs."""
    self._images += images
    self._flops += flops

  @contextlib.contextmanager
  def untimed(self) -> Iterator[None]:
    begin = time.monotonic()
    try:
      yield
    finally:
      self._start += time.monotonic() - begin

  def rates(self) -> dict[str, float]:
    """`perf/images_per_s` and `perf/mfu` (in [0, 1]) since the last call.

    Empty where nothing was added since then.
    """
    if not self._images:
      return {}
    now = time.monotonic()
    seconds = max(now - self._start, 1e-9)
    rates = {"perf/images_per_s": self._images / seconds}
    if self._peak is not None:
      rates["perf/mfu"] = self._flops / seconds / self._peak
    self._start, self._images, self._flops = now, 0, 0
    return rates


def _start_wandb(project: str, folder: pathlib.Path) -> Any:
  """A Weights & Biases run whose id is kept in the folder, for the continuation."""
  if importlib.util.find_spec("wandb") is None:
    raise ValueError(
      f"wandb_project={project!r} needs Weights & Biases: pip install wandb, or set it "
      "to None"
    )
  wandb = importlib.import_module("wandb")
  file = folder / "wandb_id"
  if not file.is_file():
    _write_text(file, wandb.util.generate_id())
  return wandb.init(
    project=project,
    name=folder.name,
    dir=str(folder),
    id=file.read_text(),
    resume="allow",
  )


class _Progress:
  """`step 120/300  loss 0.412  acc 0.71  images_per_s 570  20 s left`, on stderr."""

  def __init__(
    self,
    total_steps: int | None,
    metrics: Sequence[str],
    quiet_seconds: float | int,
  ):
    self._total = total_steps
    self._metrics = tuple(metrics)
    self._quiet = quiet_seconds
    self._in_place = sys.stderr.isatty()
    self._interval = 0.5 if self._in_place else 30.0
    self._start = None  # (time, step) of the first line: compilation is not speed
    self._opened = time.monotonic()
    self._shown_at = -math.inf
    self._width = 0

  def show(self, step: int, values: Mapping[str, float]) -> None:
    now = time.monotonic()
    if self._start is None:
      self._start = (now, step)
    last = step == self._total
    due = now - self._shown_at >= self._interval or (last and self._shown_at > 0)
    if now - self._opened < self._quiet or not due:
      return
    self._shown_at = now
    parts = [f"step {step}" if self._total is None else f"step {step}/{self._total}"]
    parts += [
      f"{name.rsplit('/', 1)[-1]} {values[name]:.4g}"
      for name in self._metrics
      if name in values
    ]
    seconds, steps = now - self._start[0], step - self._start[1]
    if steps > 0 and seconds > 0:
      parts.append(f"{steps / seconds:.3g} steps/s")
      if self._total is not None:
        parts.append(f"{_duration((self._total - step) * seconds / steps)} left")
    text = "  ".join(parts)
    if self._in_place:
      # Blanks cover what a longer line left behind.
      print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
      self._width = len(text)
    else:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._width:
      print(file=sys.stderr)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _scalar(name: str, value: Any) -> float:
  array = np.asarray(value)
  # bool, integers, floats; bfloat16 calls itself a void type.
  if array.shape != () or array.dtype.kind not in "biufV":
    raise ValueError(
      f"metric {name!r} is no real scalar: shape {array.shape}, dtype {array.dtype}"
    )
  return float(array)


def _write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file at once: a reader sees the old or the new one, never half."""
  draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
  draft.write_text(text)
  draft.replace(path)


def _git_state() -> dict[str, Any] | None:
  """The commit of the checkout this file is tracked in, and whether it is changed."""
  here = pathlib.Path(__file__).resolve()

  def git(*args: str) -> str:
    done = subprocess.run(
      ["git", "-C", str(here.parent), *args], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()

  try:
    # An installed copy may lie inside some other project's checkout.
    git("ls-files", "--error-unmatch", here.name)
    changes = git("status", "--porcelain", "--untracked-files=no")
    return dict(commit=git("rev-parse", "HEAD"), changed=bool(changes))
  except (FileNotFoundError, subprocess.CalledProcessError):
    return None
