"""What the trainers of train/ share: their command line, and how a run begins."""

from collections.abc import Callable, Iterator
import contextlib
import json
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
import jax
from ml_collections import ConfigDict, config_flags

from lrm_jax import aot, checkpoint, compilation, processes, run_log

DOES_NOT_FIT = 4  # exit code of --aot


def define_flags() -> None:
  """Of a script that is run; scripts that import each other must not define them."""
  config_flags.DEFINE_config_file("config", None, "a file of configs/")
  flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, or 'auto' where the cluster knows"
  )
  flags.DEFINE_integer("num_processes", 1, "processes of this run")
  flags.DEFINE_integer("process_id", 0, "which of them this is, from 0")
  flags.DEFINE_string(
    "aot",
    None,
    "compile for v5p:2x2x1, v5e:4x4, v6e:4x4, h200, ... and say whether it fits; run "
    "nothing",
  )
  flags.DEFINE_string(
    "aot_target_config", None, "a GPU's description: XLA's GpuTargetConfigProto as text"
  )
  flags.DEFINE_string("aot_out", None, "also write what --aot finds to this JSON file")
  flags.mark_flag_as_required("config")


def run(
  train: Callable[[ConfigDict], Any],
  reports: Callable[[ConfigDict, aot.Target, str], Iterator[tuple[str, aot.Report]]],
) -> None:
  """The whole command: joins the other processes and trains, or compiles for --aot.

  Args:
    train: a config's run.
    reports: (config, target, the recipe's name) -> (name, Report) of each program.
  """
  define_flags()

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    checkpoint.report_failures_once()
    values = flags.FLAGS
    try:
      if values.aot is not None:
        raise SystemExit(_compile(reports, values))
      compilation.configure()
      processes.initialize(values.coordinator, values.num_processes, values.process_id)
      train(values.config)
    except (ValueError, OSError, FloatingPointError, aot.NotInstalledError) as e:
      raise SystemExit(f"error: {e}") from e

  app.run(main)


def _compile(reports: Callable, values: flags.FlagValues) -> int:
  """Prints and writes all reports; the exit code."""
  file = config_flags.get_config_filename(values["config"])
  recipe = pathlib.Path(file).name.replace(".py", "")  # sd35m, sd35m_flow_grpo:fast
  target = aot.target(values.aot, values.aot_target_config)
  found = []
  for name, report in reports(values.config, target, recipe):
    print(f"{name}: {aot.format(report)}", flush=True)
    found.append(report)
  if values.aot_out is not None:
    rows = [report.to_dict() for report in found]
    pathlib.Path(values.aot_out).write_text(json.dumps(rows, indent=2) + "\n")
  return 0 if all(report.fits for report in found) else DOES_NOT_FIT


@contextlib.contextmanager
def checkpointed(
  config: ConfigDict, state: Any, *, may_change: str, best_metric: str
) -> Iterator[checkpoint.Checkpoints]:
  """The checkpoints of a run that begins or continues; writes run.json.

  Args:
    config: its `workdir`, `seed` and `train.keep_*` are read.
    state: the train state that is going to be saved.
    may_change: of the settings' dotted names, which a continuation may change.
    best_metric: which the best checkpoint is chosen by.

  Raises:
    ValueError: the folder holds a run with other settings; impossible `keep`s.
    OSError: too little space for the checkpoints.
  """
  workdir = pathlib.Path(config.workdir)
  with checkpoint.Checkpoints(
    workdir / "checkpoints",
    keep=config.train.keep_checkpoints,
    keep_best=config.train.keep_best,
    best_metric=best_metric,
  ) as checkpoints:
    checkpoints.check_space(state)
    if checkpoints.latest is not None:
      run_log.check_same_run(workdir, config.to_dict(), may_change)
    if processes.is_main():
      run_log.write_run_info(
        workdir,
        config.to_dict(),
        seed=config.seed,
        extra={
          "devices": [jax.device_count(), jax.devices()[0].device_kind],
          "processes": jax.process_count(),
          "command": sys.argv,
        },
      )
    yield checkpoints
