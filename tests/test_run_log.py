"""The metrics file: one line per step, nothing non-finite, exact after a resume."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import run_log


def _quiet(folder, **options):
  return run_log.RunLog(folder, console=False, **options)


def test_lines_hold_step_and_scalars(tmp_path):
  with _quiet(tmp_path) as log:
    log.log(1, {"train/loss": np.float32(0.5), "train/lr": 1e-3})
    log.log(np.int64(5), {"train/loss": np.array(0.25)})
  assert run_log.read_metrics(tmp_path) == [
    {"step": 1, "train/loss": 0.5, "train/lr": 1e-3},
    {"step": 5, "train/loss": 0.25},
  ]
  assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_metric_stops_the_run(tmp_path, bad):
  with _quiet(tmp_path) as log:
    log.log(1, {"loss": 1.0})
    with pytest.raises(FloatingPointError, match="at step 2: loss = -?(nan|inf)"):
      log.log(2, {"fine": 1.0, "loss": bad})
  assert len(run_log.read_metrics(tmp_path)) == 1


def test_refuses_what_is_no_scalar(tmp_path):
  with _quiet(tmp_path) as log:
    with pytest.raises(ValueError, match="'loss' is no real scalar"):
      log.log(1, {"loss": np.zeros(2)})
    with pytest.raises(ValueError, match="'name' is no real scalar"):
      log.log(1, {"name": "text"})
    with pytest.raises(ValueError, match="'step' is not a metric"):
      log.log(1, {"step": 1})


def test_existing_folder_is_continued(tmp_path):
  with _quiet(tmp_path) as log:
    log.log(1, {"loss": 1.0})
  with _quiet(tmp_path) as log:
    assert log.last_step == 1
    with pytest.raises(ValueError, match="step 1 comes after step 1"):
      log.log(1, {"loss": 1.0})
    log.log(2, {"loss": 0.5})
  assert [line["step"] for line in run_log.read_metrics(tmp_path)] == [1, 2]


def test_resume_drops_later_lines_and_half_a_line(tmp_path):
  def run(folder, steps, **options):
    with _quiet(folder, **options) as log:
      for step in steps:
        log.log(step, {"loss": 1 / step})

  run(tmp_path / "whole", range(1, 9))
  run(tmp_path / "cut", range(1, 7))
  path = tmp_path / "cut" / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 7, "lo')
  run(tmp_path / "cut", range(5, 9), resume_step=4)
  assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
  "text, problem",
  [
    ("{}\n", "line 1: not an object with an integer step"),
    ('{"step": 1}\nrubbish\n', "line 2: not valid JSON"),
    ('{"step": 2}\n{"step": 2}\n', "line 2: step 2 after 2"),
  ],
)
def test_damaged_file_is_named(tmp_path, text, problem):
  (tmp_path / "metrics.jsonl").write_text(text)
  with pytest.raises(ValueError, match=f"metrics.jsonl, {problem}"):
    _quiet(tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == text  # left for inspection


def test_progress_line_shows_loss_speed_and_time_left(tmp_path, capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
  with run_log.RunLog(tmp_path, total_steps=100, console_metrics=("loss",)) as log:
    for step in range(1, 101):
      now[0] += 1.0
      log.log(step, {"loss": 0.25})
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == "step 5/100  loss 0.25  1 steps/s  1 min 35 s left"
  assert [line.split()[1] for line in lines] == [
    "5/100",
    "35/100",
    "65/100",
    "95/100",
    "100/100",
  ]


def test_short_run_is_quiet(tmp_path, capsys):
  with run_log.RunLog(tmp_path, total_steps=2) as log:
    log.log(1, {"train/loss": 1.0})
    log.log(2, {"train/loss": 1.0})
  assert capsys.readouterr().err == ""


def test_run_info(tmp_path):
  run_log.write_run_info(
    tmp_path, {"lr": 1e-3, "taps": (2, 4)}, seed=7, extra={"device": "cpu"}
  )
  info = json.loads((tmp_path / "run.json").read_text())
  assert info["config"] == {"lr": 1e-3, "taps": [2, 4]}
  assert info["seed"] == 7 and info["extra"] == {"device": "cpu"}
  assert set(info["versions"]) == {
    "python",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
  }
  assert info["git"] is None or len(info["git"]["commit"]) == 40
  with pytest.raises(TypeError):
    run_log.write_run_info(tmp_path, {"fn": len}, seed=7)


CONFIG = {"seed": 1, "train": {"lr": 0.1, "num_steps": 5}, "tags": (1, 2)}


def test_a_run_is_recognised_by_its_settings(tmp_path):
  run_log.write_run_info(tmp_path, CONFIG, seed=1)
  run_log.check_same_run(tmp_path, CONFIG, r"train\.num_steps")
  longer = {**CONFIG, "train": {"lr": 0.1, "num_steps": 9}}
  run_log.check_same_run(tmp_path, longer, r"train\.num_steps")
  other = {**CONFIG, "train": {"lr": 0.2, "num_steps": 9}, "new": 3}
  with pytest.raises(ValueError) as e:
    run_log.check_same_run(tmp_path, other, r"train\.num_steps")
  assert "new: None then, 3 now\n  train.lr: 0.1 then, 0.2 now" in str(e.value)
  assert "num_steps" not in str(e.value)


def test_checkpoints_without_a_run_or_with_a_damaged_one(tmp_path):
  with pytest.raises(ValueError, match="no run.json"):
    run_log.check_same_run(tmp_path, CONFIG, "")
  (tmp_path / "run.json").write_text('{"conf')
  with pytest.raises(ValueError, match="run.json cannot be read"):
    run_log.check_same_run(tmp_path, CONFIG, "")


def test_throughput_leaves_out_what_is_untimed(monkeypatch):
  clock = [100.0]
  monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
  speed = run_log.Throughput(peak_flops=1000.0)
  speed.add(images=20, flops=2000)
  clock[0] += 4
  with speed.untimed():
    clock[0] += 60
  assert speed.rates() == {"perf/images_per_s": 5.0, "perf/mfu": 0.5}
  assert speed.rates() == {}
  without_peak = run_log.Throughput(None)
  without_peak.add(images=3, flops=1)
  clock[0] += 1
  assert without_peak.rates() == {"perf/images_per_s": 3.0}


def test_wandb_gets_every_line_and_a_resumed_run_its_own(tmp_path, monkeypatch):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((step, values))

    def finish(self):
      calls.append("finish")

  def init(**options):
    calls.append(options["id"])
    assert options["project"] == "rewards" and options["resume"] == "allow"
    return Run()

  util = types.SimpleNamespace(generate_id=lambda: f"id{len(calls)}")
  fake = types.ModuleType("wandb")
  fake.init, fake.util = init, util
  fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for step in (1, 2):
    with _quiet(tmp_path, wandb_project="rewards") as log:
      log.log(step, {"loss": 0.5})
  assert calls == ["id0", (1, {"loss": 0.5}), "finish"] + [
    "id0",
    (2, {"loss": 0.5}),
    "finish",
  ]


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install wandb"):
    _quiet(tmp_path, wandb_project="rewards")


def _late(folder, **more):
  return run_log.LateLog(_quiet(folder), lambda: more, remedy="Lower the rate")


def _metrics(loss=1.0, norm=1.0):
  return {"train/loss": jnp.float32(loss), "train/grad_norm": jnp.float32(norm)}


def test_a_late_log_writes_a_step_when_the_next_one_is_there(tmp_path):
  log = _late(tmp_path, rate=3.0)
  with log:
    log.step(1, _metrics(2.0), now=True)
    assert run_log.read_metrics(tmp_path) == []
    log.step(2, _metrics(), now=False)
    want = {"step": 1, "train/loss": 2.0, "train/grad_norm": 1.0, "rate": 3.0}
    log._log._file.flush()
    assert run_log.read_metrics(tmp_path) == [want]
    log.step(3, {"eval/acc": 0.5}, now=True)
    log.flush(write=False)
    log.add({"eval/more": 0.25})
  lines = run_log.read_metrics(tmp_path)
  assert [line["step"] for line in lines] == [1, 3]
  assert lines[1] == {"step": 3, "eval/acc": 0.5, "eval/more": 0.25, "rate": 3.0}


@pytest.mark.parametrize("bad", [{"loss": np.nan}, {"norm": np.inf}])
def test_a_late_log_names_the_step_of_a_nan_also_where_nothing_is_written(
  tmp_path, bad
):
  with pytest.raises(FloatingPointError, match="at step 2: .*Lower the rate"):
    with _late(tmp_path) as log:
      log.step(1, _metrics(), now=True)
      log.step(2, _metrics(**bad), now=False)
      log.step(3, _metrics(), now=False)
  assert [line["step"] for line in run_log.read_metrics(tmp_path)] == [1]


def test_a_late_log_of_a_process_that_writes_nothing():
  with pytest.raises(FloatingPointError, match="at step 1"):
    with run_log.LateLog(None, dict, remedy="") as log:
      log.step(1, _metrics(np.nan), now=True)


def test_a_late_log_closes_its_log_after_an_error(tmp_path):
  log = _late(tmp_path)
  with pytest.raises(KeyError):
    with log:
      log.step(1, _metrics(), now=True)
      raise KeyError
  assert log._log._file.closed and run_log.read_metrics(tmp_path) == []
