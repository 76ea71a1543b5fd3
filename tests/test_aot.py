"""Reports on programs compiled for a described device: memory, advice, errors."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from benchmarks import aot as benchmark
from benchmarks import explore as explore_benchmark
from lrm_jax import aot, flops

ROOT = pathlib.Path(__file__).resolve().parent.parent
GIB = aot.GIB


# --- targets -----------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, message",
  [
    ("v9:4x4", "no target 'v9:4x4': use one of h200, .* v5e:4x4, v5p:2x2x1"),
    ("h100", "no target 'h100'"),
    ("v5e", "'v5e' lacks the topology's shape"),
    ("v5e:16", "'v5e:16' lacks the topology's shape"),
    ("h200", "h200 needs a description of the device"),
  ],
)
def test_targets_that_do_not_exist(name, message):
  with pytest.raises(aot.TargetError, match=message):
    aot.target(name)


def test_missing_description():
  with pytest.raises(aot.TargetError, match="no device description nowhere.txtpb"):
    aot.target("h200", "nowhere.txtpb")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="installed")
def test_missing_compiler_for_tpus():
  with pytest.raises(aot.NotInstalledError, match='pip install "libtpu'):
    aot.target("v5e:2x2")


@pytest.mark.skipif(
  importlib.util.find_spec("jax_plugins") is not None, reason="installed"
)
def test_missing_compiler_for_gpus(tmp_path):
  (tmp_path / "h200.txtpb").touch()
  with pytest.raises(aot.NotInstalledError, match=f"cuda]=={jax.__version__}"):
    aot.target("h200", tmp_path / "h200.txtpb")


def test_clocks_and_peaks_agree():
  """peak = clock x 2 FLOP x cells of the matrix units."""
  cells = {"v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
  for name, chip in aot.TPUS.items():
    assert chip.clock * 2 * cells[name] == pytest.approx(chip.peak_flops, rel=0.01)


# --- out of memory -----------------------------------------------------------------

LISTED = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm. Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.

Total hbm usage >= 24.00G:
    reserved        256.00M
    program          21.50G
    arguments         2.25G

Output size 1.00G
"""
EARLY = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
  "temporaries (101.01G) exceeds available HBM (15.75G)."
)


def test_out_of_memory_with_a_list():
  available, memory = aot.parse_out_of_memory(LISTED)
  assert available == 15.75 * GIB
  assert memory.temporaries == 21.5 * GIB
  assert memory.arguments == 2.25 * GIB
  assert memory.total == 23.75 * GIB


def test_out_of_memory_of_temporaries():
  available, memory = aot.parse_out_of_memory(EARLY)
  assert available == 15.75 * GIB
  assert memory.temporaries == memory.total == round(101.01 * GIB)
  assert memory.arguments == 0


@pytest.mark.parametrize("message", ["INTERNAL: no such thing", "Used to 3 of 4"])
def test_other_errors_are_not_out_of_memory(message):
  assert aot.parse_out_of_memory(message) is None


# --- advice ------------------------------------------------------------------------


def memory(arguments, temporaries):
  return aot.Memory(
    arguments * GIB, 0, 0, temporaries * GIB, 0, (arguments + temporaries) * GIB
  )


SETTINGS = {
  "train.batch_size": 128,
  "train.accumulate": 1,
  "model.remat": "none",
  "mesh.fsdp": 1,
  "model.lora": True,
}


def keys(advice):
  return [text.split(":")[0] for text in advice]


def test_temporaries_are_recomputed_then_split_in_time():
  advice = aot.advise(memory(2, 30), 15 * GIB, 16, SETTINGS)
  assert keys(advice)[:3] == ["model.remat", "train.accumulate", "mesh.fsdp"]
  assert "'none' -> 'attention', then 'full'" in advice[0]
  assert "1 -> 4" in advice[1]  # 30 GiB into 13, and 8 pairs per chip divide by 4


def test_what_is_done_already_is_not_advised():
  done = SETTINGS | {"model.remat": "full", "mesh.fsdp": -1, "train.accumulate": 8}
  advice = aot.advise(memory(2, 30), 15 * GIB, 16, done)
  assert keys(advice)[0] == "train.batch_size"
  assert "128 -> 16" in advice[0]
  assert not {"model.remat", "mesh.fsdp", "train.accumulate", "model.lora"} & set(
    keys(advice)
  )
  assert any("larger topology" in text for text in advice)


def test_too_large_a_state_is_split_over_chips():
  advice = aot.advise(memory(30, 2), 15 * GIB, 16, SETTINGS | {"model.lora": False})
  assert keys(advice)[0] == "mesh.fsdp"
  assert "1 -> 16" in advice[0]
  assert "model.remat" not in keys(advice)  # it could not help
  assert "model.lora" in keys(advice)


def test_large_state_with_room_left():
  advice = aot.advise(memory(12, 5), 15 * GIB, 16, SETTINGS)
  assert keys(advice)[:3] == ["mesh.fsdp", "model.remat", "train.accumulate"]
  assert "1 -> 2" in advice[2]


def test_without_settings():
  assert keys(aot.advise(memory(2, 30), 15 * GIB, 1, {}))[0] == "model.remat"


# --- a report on the CPU's own compiler --------------------------------------------


@pytest.fixture
def target():
  """8 fake chips with 1 MB each; 1 FLOP/s and 1 B/s make the bounds readable."""
  chip = aot.Chip(10**6, peak_flops=1.0, memory_rate=1.0, link_rate=1.0, clock=1.0)
  return aot.Target("fake:8", "tpu", jax.devices()[:8], chip, {})


def step_and_args(target, *, rows=8):
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=target.devices
  )
  place = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))  # noqa: E731

  def step(w, x):
    return w - jnp.mean(x @ w, axis=0), jnp.zeros(())

  w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place())
  x = jax.ShapeDtypeStruct((rows, 64), jnp.float32, sharding=place("data"))
  return jax.jit(step, donate_argnums=0, out_shardings=(place(), place())), (w, x)


def test_kernels_take_the_attention_share_of_the_peak(target):
  chip = dataclasses.replace(target.chip, attention_share=0.25)
  step, args = step_and_args(target)
  target = dataclasses.replace(target, chip=chip)
  report = aot.report(step, args, target, flops_per_step=800.0, kernel_flops=80.0)
  assert (report.kernel_seconds, report.kernel_share) == (80 / 8 / 0.25, 0.25)


def test_report(target):
  step, args = step_and_args(target)
  report = aot.report(step, args, target, flops_per_step=800.0, reserve=10**5)
  assert report.num_chips == 8
  assert report.fits
  assert report.advice == ()
  assert report.capacity == 900_000
  # One row of x per chip; w is donated.
  assert report.memory.arguments == 64 * 64 * 4 + 64 * 4
  assert report.memory.outputs >= 64 * 64 * 4 + 4
  assert report.memory.aliased == 64 * 64 * 4
  assert report.spare == report.capacity - report.memory.total
  assert report.model_flops == report.compute_bound == 100.0
  assert report.program.collective_bytes["all-reduce"] == 64 * 4
  assert report.link_bound == 2 * 7 / 8 * 64 * 4
  assert report.memory_bound > 2 * 64 * 64 * 4
  assert report.lower_bound == report.memory_bound
  assert report.compiler_seconds is None  # a CPU's program has no cycles
  assert json.loads(json.dumps(report.to_dict()))["fits"] is True
  text = aot.format(report)
  assert "fits" in text
  assert "all-reduce" in text
  assert "DOES NOT FIT" not in text


def test_report_on_what_does_not_fit(target):
  step, args = step_and_args(target)
  small = dataclasses.replace(
    target, chip=dataclasses.replace(target.chip, memory=10_000)
  )
  report = aot.report(
    step, args, small, flops_per_step=1.0, reserve=0, settings={"mesh.fsdp": 1}
  )
  assert not report.fits
  assert report.spare == 10_000 - report.memory.total
  assert report.advice[0].startswith("mesh.fsdp: 1 -> 8")
  text = aot.format(report)
  assert "DOES NOT FIT" in text
  assert "1. mesh.fsdp" in text


def test_table_of_reports(target):
  step, args = step_and_args(target)
  settings = {
    "recipe": "sd35m",
    "train.batch_size": 64,
    "train.accumulate": 2,
    "model.remat": "full",
    "model.scan_blocks": True,
    "mesh.fsdp": -1,
  }
  report = aot.report(step, args, target, flops_per_step=8e12, settings=settings)
  head, _, row = benchmark.training_table([report.to_dict()]).splitlines()
  assert head.count("|") == row.count("|")
  cells = [cell.strip() for cell in row.split("|")]
  assert cells[1:6] == ["sd35m", "fake:8", "1 x 8", "64 (4)", "full"]
  assert cells[7].startswith("**no**, -")  # less than the reserve
  assert cells[8] == "1.0"


def test_scaling_table():
  def report(chips, link, **settings):
    return {
      "target": f"v5p:{chips}",
      "num_chips": chips,
      "settings": {"recipe": "sd35m", **settings},
      "memory": {"total": 3 * aot.GIB},
      "model_flops": 5e12,
      "program": {"wire_bytes": 2.5e9},
      "link_bound": link,
      "compiler_seconds": 0.2,
      "kernel_seconds": 0.1,
    }

  reports = [report(64, 0.1), report(4, 0.0), report(4, 0.3, program="update")]
  rows = benchmark.scaling_table(reports).splitlines()[2:]
  cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
  assert [row[:3] for row in cells] == [
    ["sd35m", "v5p:4", "4"],
    ["sd35m", "v5p:64", "64"],
    ["sd35m, update", "v5p:4", "4"],
  ]
  assert cells[1][3:] == ["3.0", "5.0", "2.50", "100.00", "0.300", "75.0%"]
  assert [row[-1] for row in cells] == ["100.0%", "75.0%", "50.0%"]


@pytest.mark.parametrize("name", ["plain", "drm-4", "cheap-4"])
def test_explore_and_select_on_many_chips_sends_nothing(target, name):
  sizes = explore_benchmark.Sizes(
    heads=1, head_dim=16, latent=4, text_tokens=3, steps=2
  )
  case = dataclasses.replace(explore_benchmark.CASES[name], batch=2)
  row = explore_benchmark.compile_for(
    dataclasses.replace(target, kind="cpu"), sizes, case
  )
  assert row["chips"] == 8 and row["collective_bytes"] == 0
  config = sizes.generator
  one = flops.mmdit(config, flops.image_tokens(config, 4, 4), 3)
  ratio = explore_benchmark.relative_flops(sizes, case)
  assert row["teraflops"] == pytest.approx(2 * 2 * 2 * one * ratio / 1e12)
  head, _, line = explore_benchmark.aot_table([row]).splitlines()
  assert head.count("|") == line.count("|")


class Failing:
  """Stands in for a jitted function whose compiler runs out of memory."""

  def __init__(self, message):
    self.message = message

  def lower(self, *args):
    return self

  def compile(self, compiler_options):
    raise jax.errors.JaxRuntimeError(self.message)


def test_running_out_of_memory_is_a_report(target):
  _, args = step_and_args(target)
  chip = dataclasses.replace(target.chip, memory=int(15.75 * GIB))
  target = dataclasses.replace(target, chip=chip)
  report = aot.report(Failing(EARLY), args, target, flops_per_step=1.0, reserve=0)
  assert not report.fits
  # The message counts temporaries only.
  assert report.memory.arguments == 64 * 64 * 4 + 64 * 4
  assert report.memory.total == round(101.01 * GIB) + report.memory.arguments
  assert report.program is None
  assert "85.26 GiB too much" in aot.format(report)
  assert json.dumps(report.to_dict())


def test_other_failures_stay_errors(target):
  _, args = step_and_args(target)
  with pytest.raises(jax.errors.JaxRuntimeError, match="no such thing"):
    aot.report(Failing("INTERNAL: no such thing"), args, target, flops_per_step=1.0)


# --- with libtpu -------------------------------------------------------------------

SCRIPT = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from lrm_jax import aot, flops
from lrm_jax.models import attention

target = aot.target("v5e:2x2")
mesh = jax.make_mesh((4,), ("data",), devices=target.devices,
                     axis_types=(jax.sharding.AxisType.Auto,))

def struct(shape, *spec):
  place = NamedSharding(mesh, P(*spec))
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

def step(w, x):
  def loss(w):
    def layer(x, w):
      y = (x @ w).reshape(*x.shape[:2], -1, 64)
      return attention.attention(y, y, y, "splash").reshape(x.shape), None
    return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32))
  return w - jax.grad(loss)(w)

w = struct((3, 128, 128))
x = struct((8, 300, 128), "data")
r = aot.report(jax.jit(step, donate_argnums=0, out_shardings=w.sharding), (w, x),
               target, flops_per_step=1e9)
print(aot.format(r))
assert r.fits and r.compiler_seconds > 0, r
assert r.program.collective_bytes.get("all-reduce", 0) >= 3 * 128 * 128 * 2, r.program
kernels = {k: v for k, v in r.program.custom_calls.items() if "splash" in k}
assert sum(kernels.values()) == 3 * 3, kernels  # forward, dq, dkv in 3 layers
huge = struct((8, 300000, 128), "data")
f = jax.jit(lambda x: jnp.sum(jnp.sort(x @ x.swapaxes(1, 2), axis=1), 2))
r = aot.report(f, (huge,), target, flops_per_step=1e9)
print(aot.format(r))
assert not r.fits and r.program is None
try:
  aot.target("v5e:3x5")
except aot.TargetError as e:
  print(e)
else:
  raise AssertionError("v5e:3x5 exists?")
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_for_a_tpu():
  """In a process of its own: a TPU target changes what jax calls its platform."""
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    cwd=ROOT,
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
      # The suite's "highest" asks the kernel for float32 products of bfloat16 tiles.
      "JAX_DEFAULT_MATMUL_PRECISION": "default",
    },
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stdout + run.stderr[-3000:]
