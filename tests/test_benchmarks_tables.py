"""Tables of benchmarks beside PyTorch: on tiny models both sides agree."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import attention_kernels
import compile_time
import grpo
import kernel_times
import model_sizes
import precision
import protocol
import scoring
import text_and_pixels
import training

TINY = model_sizes.Sizes(
  layers=4,
  dual=2,
  dina_layers=2,
  taps=(1, 2),
  drm_layers=3,
  heads=1,
  head_dim=16,
  latent=4,
  text_tokens=3,
  steps=3,
)


def run(table: protocol.Table, cases, sizes=TINY):
  """As the command, in this process; a round each."""
  names = ["torch-eager"]
  reports = []
  report = protocol.measure(
    cases,
    table.ours(sizes),
    {name: table.theirs(sizes, "eager") for name in names},
    lambda case: table.count(sizes, case),
    rounds=1,
    calls=1,
    together=table.together,
    done=lambda report: reports.append(len(report["rows"])),
  )
  assert reports == list(range(1, 1 + len(cases)))  # nothing is lost of a run cut short
  assert not protocol.problems(report, names, "float32")
  text = protocol.table(report, names)
  assert text.count("\n") == 1 + len(cases) and " ms" not in text  # not of a CPU
  json.dumps(report)
  return report


def test_scoring():
  cases = [scoring.Case(name, TINY.latent, 2) for name in scoring.SCORERS]
  report = run(scoring.TABLE, cases)
  for row, case in zip(report["rows"], cases, strict=True):
    assert row["teraflops"] == scoring.count(TINY, case) / 1e12 > 0
    assert row["torch-eager"]["difference"]["output"] < 1e-4
    side = row["jax"]
    rate = row["teraflops"] / side["median"] / row["product"]["teraflops_per_s"]
    assert side["of_product"] == pytest.approx(rate)


def test_attention_kernels():
  cases = attention_kernels.cases(attention_kernels.NARROW)
  assert {case.direction for case in cases} == {"forward", "gradient"}
  report = run(attention_kernels.TABLE, cases, attention_kernels.NARROW)
  assert set(report["rows"][-1]["torch-eager"]["difference"]) == set("qkv")
  forward, gradient = report["rows"][0], report["rows"][-2]
  assert gradient["teraflops"] == pytest.approx(3 * forward["teraflops"])


def test_training():
  cases = [
    training.Case("lora", 2, "none", False),
    training.Case("full", 2, "full", True),
  ]
  report = run(training.TABLE, cases)
  for row in report["rows"]:
    assert set(row["torch-eager"]["difference"]) == {"loss", "grad_norm"}


def test_grpo():
  """A plain loop in PyTorch finds the reward, divergence and gradient of ours."""
  cases = [grpo.Case("step_grpo", 3, 2, 2), grpo.Case("flow_grpo", 1, 4, 2)]
  report = run(grpo.TABLE, cases)
  for row in report["rows"]:
    assert set(row["torch-eager"]["difference"]) == {"reward", "grad_norm", "kl"}
  # By hand: 3 guided steps, of which 2 are scored by 3 of 4 blocks (k = 3) and learnt
  # from (backward, reference), 4 samples.
  assert grpo.passes(TINY, cases[0]) == 4 * (2 * 3 + 2 * 3 * 3 / 4 + 2 * 2 * 4)


@pytest.mark.parametrize("table", [scoring.TABLE, training.TABLE, grpo.TABLE])
def test_full_size_has_more_cases_than_a_cpu_can_take(table):
  full = table.cases(table.full)
  assert len(full) > len(table.cases(table.narrow))
  assert len({case.name for case in full}) == len(full)
  assert all(table.count(table.full, case) > 1e12 for case in full)


def test_sides_that_disagree_are_named():
  one, other = np.ones(4), np.full(4, 1.1)
  found = protocol.differences({"loss": one}, {"loss": other})
  assert found["loss"] == pytest.approx(0.1 / 1.1)
  report = {"rows": [{"case": "c", "jax": {}, "torch-eager": {"difference": found}}]}
  assert protocol.problems(report, ["torch-eager"], "float32") == [
    "c: loss of torch-eager differs by 9.1e-02"
  ]
  assert not protocol.problems(report, ["torch-eager"], "bfloat16")
  with pytest.raises(ValueError, match="torch's loss is not finite, or zero"):
    protocol.differences({"loss": one}, {"loss": 0 * one})


def test_an_error_in_bfloat16_beyond_pytorchs_is_named():
  row = {"case": "c", "jax": {"error": {"score": 2e-3}}, "exact_rows": 8}
  row["torch-eager"] = {"difference": {"score": 1.0}, "error": {"score": 1e-3}}
  bad = protocol.problems({"rows": [row]}, ["torch-eager"], "bfloat16")
  assert bad == ["c: score is 2.0e-03 from float32's, PyTorch's 1.0e-03"]
  assert not protocol.problems({"rows": [row | {"exact_rows": 1}]}, ["torch-eager"], "")
  row["jax"]["error"]["score"] = 1.4e-3
  assert not protocol.problems({"rows": [row]}, ["torch-eager"], "bfloat16")


def test_bfloat16_scores_are_held_against_float32():
  sizes = dataclasses.replace(TINY, dtype="bfloat16", scan=False)
  report = protocol.measure(
    [scoring.Case("dina", TINY.latent, 3)],
    scoring.Ours(sizes),
    {"torch-eager": scoring.Theirs(sizes, "eager")},
    lambda case: scoring.count(sizes, case),
    rounds=1,
    calls=1,
  )
  (row,) = report["rows"]
  for name in ("jax", "torch-eager"):
    assert 1e-5 < row[name]["error"]["output"] < 0.1
  assert "jax, error | torch-eager, error" in protocol.table(report, ["torch-eager"])


class OutOfMemory(protocol.TorchSide):
  """Fails one of two cases."""

  def make(self, case):
    if case.name == "large":
      raise RuntimeError("out of memory")
    return lambda: {"output": self.torch.ones(2)}


class Ones(protocol.JaxSide):
  """May not compile a case."""

  fails_at: str | None = None

  def make(self, case):
    function = jax.jit(lambda: jnp.ones(2))
    return protocol.Program(Refused() if case.name == self.fails_at else function, ())


class Refused:
  def lower(self):
    return self

  def compile(self):
    raise RuntimeError("the compiler gave up")


@pytest.mark.parametrize("together", [True, False])
def test_a_side_that_fails_a_case_is_reported_and_the_others_go_on(together):
  report = protocol.measure(
    [Fake("large"), Fake("small")],
    Ones(None),
    {"torch-eager": OutOfMemory(None, "eager")},
    lambda case: 1e9,
    rounds=2,
    calls=1,
    together=together,
  )
  large, small = report["rows"]
  assert len(large["jax"]["seconds"]) == 2 and "seconds" not in large["torch-eager"]
  assert len(small["torch-eager"]["seconds"]) == 2
  assert small["torch-eager"]["difference"] == {"output": 0}
  assert protocol.problems(report, ["torch-eager"], "float32") == [
    "large: torch-eager failed: out of memory"
  ]
  _, _, first, second = protocol.table(report, ["torch-eager"]).splitlines()
  assert "| large | 0.001 | - |" in first and "| small | 0.001 | - |" not in second
  assert first.count("|") == second.count("|")


@dataclasses.dataclass(frozen=True)
class Fake:
  name: str = "fake"


class Drifting:
  """A GPU whose product takes 1 s, 1 s, then 2 s, ..."""

  def __init__(self, products):
    self.products, self.runs = list(products), 0

  def product(self):
    return self.products.pop(0), 8.0

  def run(self, case, calls):
    self.runs += 1
    return 0.5


def test_a_round_on_a_gpu_that_drifts_is_measured_again():
  side = Drifting([1.0, 2.0, 1.0, 1.01])
  product, found = protocol._round(Fake(), side, {"jax": side}, {"jax": 1}, True)
  assert side.runs == 2 and found == {"jax": 0.5}
  assert product["seconds"] == pytest.approx(1.005)
  side = Drifting([1.0, 2.0, 1.0, 1.01])
  product, _ = protocol._round(Fake(), side, {"jax": side}, {"jax": 1}, False)
  assert side.runs == 1 and product["drift"] == 2.0  # reported


def test_text_and_pixels():
  full, narrow = text_and_pixels.FULL, text_and_pixels.NARROW
  smaller = dict(dim=32, mlp_dim=64, num_layers=2, num_heads=2)
  tiny = dataclasses.replace(
    narrow,
    vae=dataclasses.replace(narrow.vae, block_out_channels=(8, 8), norm_num_groups=4),
    **{
      name: dataclasses.replace(getattr(narrow, name), **smaller)
      for name in ("t5", "clip_l", "clip_g")
    },
    pixels=(16,),
    lengths=(9,),
    batches=(2,),
  )
  report = run(text_and_pixels.TABLE, text_and_pixels.cases(tiny), tiny)
  assert len(report["rows"]) == 5
  # FLOPs of SD3.5's own encoders, which nothing of this size is allocated for.
  counted = {
    case.name: text_and_pixels.count(full, case) for case in text_and_pixels.cases(full)
  }
  assert counted["decode-512-1"] == pytest.approx(2.515e12, rel=1e-3)
  assert counted["t5-256-8"] == pytest.approx(8 * 2.397e12, rel=1e-3)
  assert counted["clip_g-77-1"] == pytest.approx(97.9e9, rel=1e-3)


def test_a_case_of_ours_that_does_not_compile_is_reported():
  ours = Ones(None)
  ours.fails_at = "large"
  report = protocol.measure(
    [Fake("large"), Fake("small")],
    ours,
    {"torch-eager": OutOfMemory(None, "eager")},
    lambda case: 1e9,
    rounds=1,
    calls=1,
  )
  assert protocol.problems(report, ["torch-eager"], "float32") == [
    "large: jax failed: the compiler gave up",
    "large: torch-eager failed: out of memory",
  ]
  assert len(report["rows"][1]["jax"]["seconds"]) == 1
  assert "| large |" in protocol.table(report, ["torch-eager"])


def test_precision_of_known_errors():
  exact = np.random.default_rng(0).standard_normal(400).astype(np.float32)
  shifted = precision.compare(exact, exact + 0.5 * exact.std())
  assert shifted["rms_error"] == pytest.approx(0.5, rel=1e-4)
  assert shifted["rms_error_centred"] < 1e-5 and shifted["same_order"] == 1
  backwards = precision.compare(exact, -exact)
  assert backwards["same_order"] == 0 == backwards["same_order_of_nearest_tenth"]
  ties = precision.compare(exact, 0 * exact)  # what is no longer told apart is lost
  assert ties["same_order"] < 0.01


def test_precision_command(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(model_sizes, "Sizes", lambda: TINY)
  out = tmp_path / "rows.json"
  argv = ["--random", "dina", "--samples", "20", "--batch", "16", "--out", str(out)]
  assert precision.main(argv) == 0
  rows = json.loads(out.read_text())["rows"]
  assert [row["sigma"] for row in rows] == list(precision.SIGMAS)
  assert all(0 < row["rms_error"] < 0.3 and row["n"] == 20 for row in rows)
  assert "of 3 within 0.01 of the spread" in capsys.readouterr().out


def test_compile_time(monkeypatch, tmp_path, capsys):
  tiny = dataclasses.replace(scoring.TABLE, narrow=TINY)
  monkeypatch.setattr(scoring, "TABLE", tiny)
  found = compile_time.compile_once("scoring", full=False)
  assert found["case"] == "scoring: dina-merged-32px-8" and found["compile_s"] > 0

  seconds = iter([8.0, 2.0])

  def in_a_process(name, full, cache):
    return {**found, "compile_s": next(seconds)}

  monkeypatch.setattr(compile_time, "in_a_process", in_a_process)
  out = tmp_path / "rows.json"
  assert compile_time.main(["--programs", "scoring", "--out", str(out)]) == 0
  assert "| 0.25 | 8.0 | 2.0 |" in capsys.readouterr().out
  (row,) = json.loads(out.read_text())["rows"]
  assert row["cold"]["compile_s"] == 8 and row["warm"]["compile_s"] == 2


def test_a_table_of_a_gpu_has_times_and_bytes():
  side = {"median": 0.0025, "of_product": 0.5, "difference": {"output": 1e-3}}
  spread = {"median": 0.5, "min": 0.4, "max": 0.6}
  jax = side | {"peak_bytes_so_far": 1, "program_bytes": 2**30, "temporary_bytes": 0}
  row = {"case": "a", "teraflops": 1.0, "jax": jax | {"compile_s": 1.0}}
  row["torch-eager"] = side | {"peak_bytes": 3 * 2**30, "jax_to_it": spread}
  head, _, line = protocol.table({"rows": [row]}, ["torch-eager"]).splitlines()
  assert "jax, ms | torch-eager, ms | jax, program GiB | torch-eager, peak GiB" in head
  assert "| 0.50 (0.40 to 0.60) |" in line and "| 2.50 | 2.50 | 1.00 | 3.00 |" in line
  assert head.count("|") == line.count("|")


def test_kernel_times_of_a_known_profile():
  """Two calls on a GPU's stream, and what is not a kernel."""
  space = jax.profiler.ProfileData.text_proto_to_serialized_xspace(
    """
    planes { name: "/device:GPU:0"
      event_metadata { key: 1 value { id: 1 name: "nvjet_hsh_128" } }
      event_metadata { key: 2 value { id: 2 name: "cudnn_fmha_fwd" } }
      event_metadata { key: 3 value { id: 3 name: "loop_add_fusion" } }
      lines { name: "Stream #7(Compute)"
        events { metadata_id: 1 duration_ps: 4000000000 }
        events { metadata_id: 2 duration_ps: 2000000000 }
        events { metadata_id: 3 duration_ps: 1000000000 }
        events { metadata_id: 1 duration_ps: 4000000000 } }
      lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000000 } } }
    planes { name: "/host:CPU"
      event_metadata { key: 1 value { id: 1 name: "gemm" } }
      lines { name: "Stream" events { metadata_id: 1 duration_ps: 9000000000 } } }
    """
  )
  data = jax.profiler.ProfileData.from_serialized_xspace(space)
  found = kernel_times.summarise(kernel_times.events_of(data), calls=2, wall=6e-3)
  assert found["kinds_ms"] == pytest.approx(
    {"products": 4, "attention": 1, kernel_times.OTHER: 0.5, "nothing runs": 0.5}
  )
  assert "| products | 4.00 |" in kernel_times.table({"jax": found})
