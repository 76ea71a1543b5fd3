"""Training that is killed, interrupted or starved, in processes of its own."""

from collections.abc import Iterator
import contextlib
import pathlib
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests import runs

STEPS = 200
PATIENCE = 300  # seconds: on a machine with other work a run of seconds takes minutes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp("survival")
  return runs.make_base(root / "base"), runs.make_pairs(root / "pairs")


@pytest.fixture(scope="module")
def one_size(data, tmp_path_factory):
  """Half as many programs: every process of a multi-host run compiles its own."""
  root = tmp_path_factory.mktemp("one_size")
  return data[0], runs.make_pairs(root / "pairs", runs.SIZES[:1])


def long_run(data, workdir):
  c = runs.tiny("sd35m", *data, workdir)
  c.train.num_steps = STEPS
  c.train.log_every = 5
  c.train.checkpoint_every = 25
  c.train.ema_decay = 0.9
  c.train.accumulate = 2
  c.model.remat = "none"  # traces faster, and every process traces
  c.data.prompt_dropout = 0.2
  c.eval.every = STEPS
  return c


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
  config = long_run(data, tmp_path_factory.mktemp("whole") / "run")
  runs.finish(runs.start(config), config)
  return config


def logged_step(config) -> int:
  path = pathlib.Path(config.workdir, "metrics.jsonl")
  return path.read_text().count("\n") * config.train.log_every if path.exists() else 0


def interrupt(process: subprocess.Popen, config, at_step: int, number: int) -> bool:
  """Sends a signal once the run's log has come so far; False if it ended before."""
  deadline = time.monotonic() + PATIENCE
  while process.poll() is None and time.monotonic() < deadline:
    if logged_step(config) >= at_step:
      process.send_signal(number)
      return True
    time.sleep(0.002)
  return False


@pytest.mark.slow
def test_a_run_interrupted_at_random_ends_as_if_it_had_not_been(
  data, uninterrupted, tmp_path
):
  config = long_run(data, tmp_path / "run")
  rng = random.Random(9)
  numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
  stops = sorted(rng.sample(range(STEPS - 10), len(numbers)))
  for number, stop_at in zip(numbers, stops, strict=True):
    process = runs.start(config)
    assert interrupt(process, config, stop_at, number)
    time.sleep(0 if number == signal.SIGTERM else rng.uniform(0, 0.1))
    code = process.wait(timeout=PATIENCE)
    if number == signal.SIGTERM:
      output = runs.log_file(config).read_text()
      assert code == 0, output[-3000:]
      assert "the same command continues" in output.splitlines()[-1]
    else:
      assert code == -signal.SIGKILL
  log = runs.finish(runs.start(config), config)
  runs.assert_same_run(uninterrupted.workdir, config.workdir, STEPS)
  # The first signal may come before a checkpoint.
  assert log.count("continuing") >= len(numbers) - 1


@pytest.mark.slow
def test_two_processes_equal_one(one_size, tmp_path):
  """Two hosts with two devices each, against one with four; then changing places."""
  results = {}
  for name in ("one", "two"):
    config = runs.tiny("drm_sd35m", *one_size, tmp_path / name)
    config.mesh.fsdp = 2
    config.train.num_steps = 6
    config.train.keep_checkpoints = 5
    if name == "one":
      runs.finish(runs.start(config, devices=4), config)
    else:
      with two_processes(config, devices=2) as processes:
        for i, process in enumerate(processes):
          runs.finish(process, config, f"host{i}")
    results[name] = runs.metrics(config.workdir)
    # Every host read only its own rows, and together every row.
  for a, b in zip(results["one"], results["two"], strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_allclose(a[key], b[key], rtol=2e-3, atol=2e-5, err_msg=key)

  # A checkpoint of two processes continues in one process, on another mesh.
  other = runs.tiny("drm_sd35m", *one_size, tmp_path / "other")
  shutil.copytree(tmp_path / "two", tmp_path / "other")
  for step in (4, 6):
    shutil.rmtree(tmp_path / "other" / "checkpoints" / str(step))
  other.mesh.fsdp = 1
  other.train.num_steps = 6
  other.train.keep_checkpoints = 5
  output = runs.finish(runs.start(other), other)
  assert "from step 2" in output
  for a, b in zip(results["one"], runs.metrics(other.workdir), strict=True):
    np.testing.assert_allclose(a["train/loss"], b["train/loss"], rtol=2e-3)


@contextlib.contextmanager
def two_processes(config, devices: int) -> Iterator[list[subprocess.Popen]]:
  """A run of two processes with so many devices each; none outlives the block."""
  port = runs.free_port()
  processes = [
    runs.start(
      config,
      f"--coordinator=127.0.0.1:{port}",
      "--num_processes=2",
      f"--process_id={i}",
      devices=devices,
      name=f"host{i}",
    )
    for i in range(2)
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_the_run_continues(
  one_size, tmp_path
):
  config = runs.tiny("sd35m", *one_size, tmp_path / "run")
  config.train.num_steps = 400
  config.train.checkpoint_every = 1000
  config.eval.every = 400
  with two_processes(config, devices=1) as processes:
    assert interrupt(processes[1], config, 5, signal.SIGTERM)
    for i, process in enumerate(processes):
      output = runs.finish(process, config, f"host{i}")
      assert "stopped by a signal at step" in output
  stopped = int(output.split("at step ")[1].split()[0])
  assert 5 <= stopped < 400
  config.train.num_steps = stopped + 2
  assert f"from step {stopped}" in runs.finish(runs.start(config), config)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_the_older_checkpoint_stays(
  one_size, tmp_path
):
  """A limit on the size of files stands in for the disk: writes fail in the middle."""
  config = runs.tiny("drm_sd35m", *one_size, tmp_path / "run")
  config.train.num_steps = 2
  runs.finish(runs.start(config), config)
  config.train.num_steps = 4

  process = runs.start(
    config,
    wrapper=("bash", "-c", 'ulimit -f 40; exec "$@"', "limited"),
    # Programs are read from the cache and never written: that would be cut short, too.
    env={"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e6"},
  )
  assert process.wait(timeout=PATIENCE) == 1
  output = runs.log_file(config).read_text()
  assert "error: writing" in output and "Traceback" not in output, output[-3000:]
  # Not always the last line: Python may warn about a write that nobody awaits any more.
  (error,) = (line for line in output.splitlines() if line.startswith("error: "))
  assert "step 2" in error
  assert "from step 2" in runs.finish(runs.start(config), config)
