"""The benchmarks' own parts, on tiny data; what they measure is not asserted here."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import explore as explore_benchmark
from benchmarks import loader as loader_benchmark
from lrm_jax.data import parquet
from lrm_jax.models import mmdit, reward
from tests import runs  # puts train/ and configs/ on the path, for the next line

from benchmarks import fsdp_memory  # isort: skip

SIZES = loader_benchmark.Sizes(
  latents=((4, 4, 3), (2, 6, 3)),
  pairs=40,
  prompts=3,
  rows_per_group=5,
  context=(6, 8),
  pooled=4,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("loader")
  loader_benchmark.write_data(folder, SIZES)
  return folder


def ways(data, with_torch):
  return loader_benchmark.variants(
    data,
    SIZES,
    batch_size=4,
    window=2,
    threads=0 if with_torch else 2,
    slow_batches=3,
    with_torch=with_torch,
  )


def test_loader_reads_all_pairs_and_counts_row_groups(data):
  source = parquet.ParquetPairs(data / "pairs")
  assert len(source) == 40 and np.bincount(source.bucket).tolist() == [20, 20]
  rows = loader_benchmark.measure(ways(data, with_torch=False), rounds=2)
  by_name = {row["name"]: row for row in rows}
  for name, row in by_name.items():
    slow = name == "parquet, shuffled"
    assert [run["samples"] for run in row["rounds"]] == [12 if slow else 40] * 2
    assert 0 < row["samples_per_s_min"] <= row["samples_per_s"]
  # 8 row groups, each once or, at the border of two windows, twice.
  assert 8 / 40 <= by_name["parquet, window"]["row_groups_per_sample"] <= 16 / 40
  assert by_name["tfds, shuffled"]["row_groups_per_sample"] is None
  assert loader_benchmark.ratios(rows, "torch") == [None] * len(rows)
  assert "| tfds, shuffled |" in loader_benchmark.table(rows)
  json.dumps(rows)


def test_torch_reads_the_same_pairs(data):
  pytest.importorskip("torch")
  index = parquet.read_index(data / "pairs")
  places = [
    (index.files[f], int(g), int(r))
    for f, g, r in zip(index.file, index.row_group, index.row, strict=True)
  ]
  dataset = loader_benchmark.RowGroupDataset(places)
  source = parquet.ParquetPairs(data / "pairs")
  for keep in (False, True):
    batch = loader_benchmark.collate([dataset[keep, i] for i in (7, 9, 6, 0)])
    assert batch["read"] == (2 if keep else 4)  # row groups 1 1 1 0
    for row, i in enumerate((7, 9, 6, 0)):
      for side in ("chosen", "rejected"):
        got = batch[side][row].numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(got, source[i][side])
      assert batch["prompt"][row] == source[i]["prompt"]
  # Without workers: starting them takes seconds.
  torch_ways = {k: v for k, v in ways(data, with_torch=True).items() if "torch" in k}
  rows = loader_benchmark.measure(torch_ways, rounds=2)
  assert [row["rounds"][1]["samples"] for row in rows] == [12, 12, 40]
  each, kept, window = (row["row_groups_per_sample"] for row in rows)
  assert each == 1 and window < kept <= 1
  assert loader_benchmark.ratios(rows, "torch")[0] == 1


def test_full_size_state_falls_with_the_devices():
  """By shapes and shardings alone."""
  recipe = fsdp_memory.full_config(None)
  assert recipe.to_dict() == runs.config_of("drm_sd35m").to_dict()
  config = fsdp_memory.full_config(0.999)
  one, eight = (fsdp_memory.state_bytes(config, jax.devices()[:n]) for n in (1, 8))
  # Parameters, their average, and twice as much of Adam's.
  assert one["params"] == one["ema"] > 7.5e9
  assert 2 * one["params"] <= one["opt_state"] <= 2 * one["params"] + 100
  for part in (*fsdp_memory.PARTS, "total"):
    # What no axis divides stays whole: next to nothing.
    assert one[part] / 8 <= eight[part] <= 1.001 * one[part] / 8


def test_compiled_arguments_fall_with_the_devices(tmp_path):
  """The trainer's step for a narrow model, by XLA's own account."""
  narrow = fsdp_memory.narrow_config(
    tmp_path / "base", 0.999, heads=2, layers=1, batch_size=4, pixels=32
  )
  narrow.model.head.update(base_channels=16, num_groups=4, hidden=32)
  state, memory = {}, {}
  for count in (1, 4):
    devices = jax.devices()[:count]
    state[count] = fsdp_memory.state_bytes(narrow, devices)["total"]
    memory[count] = fsdp_memory.compiled_memory(narrow, devices)
    # The arguments are the state and little else; all of the state is donated.
    assert state[count] <= memory[count].aliased <= memory[count].arguments
    assert memory[count].arguments < 1.1 * state[count]
  assert state[4] < 1.05 * state[1] / 4
  assert memory[4].arguments < 1.05 * memory[1].arguments / 4


def test_explore_compares_and_counts():
  """Every kind of case at a tiny size; beside PyTorch where it is installed."""
  sizes = explore_benchmark.Sizes(
    layers=3,
    dual=2,
    dina_layers=2,
    taps=(1, 2),
    drm_layers=2,
    heads=3,
    head_dim=8,
    latent=8,
    text_tokens=5,
    steps=3,
  )
  cases = [
    explore_benchmark.PLAIN,
    explore_benchmark.Case("drm", 2),
    explore_benchmark.Case("dina", 2, chunk=1),
    explore_benchmark.Case("cheap", 4),
  ]
  ours = explore_benchmark.JaxSide(sizes)
  theirs = {}
  if importlib.util.find_spec("torch") is not None:
    theirs["torch"] = explore_benchmark.TorchSide(sizes, "eager")
  report = explore_benchmark.measure(sizes, cases, ours, theirs, rounds=1, calls=1)
  assert not explore_benchmark.problems(report, list(theirs), sizes.dtype)
  assert report["recompiled"] == {"calls": 2 * len(cases), "compilations": 0}
  assert ours.compiles.count > 0  # it does count

  rows = {row["case"]: row for row in report["rows"]}
  assert rows["plain"]["flops_to_plain"] == rows["plain"]["jax"]["to_plain"]["max"] == 1
  for name in theirs:
    assert all(row[name]["relative_error"] < 1e-4 for row in report["rows"])
    # Not always the first candidate.
    assert sum(row[name]["distinct_choices"] > 1 for row in report["rows"]) >= 2
  json.dumps(report)
  assert explore_benchmark.table(report, list(theirs)).count("\n") == 1 + len(cases)
  assert "compilations: 0" in explore_benchmark.details(report, list(theirs))


def test_explore_at_full_size_keeps_the_proportions():
  """By formula and shapes: the narrow model's cost ratios are those of the real one."""
  narrow, full = explore_benchmark.Sizes(), explore_benchmark.Sizes.full()
  assert full.generator == mmdit.MMDiTConfig.sd35_medium()
  assert full.rewards["dina"] == reward.RewardConfig.dina_sd35m_12layers()
  assert full.rewards["drm"] == reward.RewardConfig.drm_2b()
  for case in explore_benchmark.CASES.values():
    ratio = explore_benchmark.relative_flops(full, case)
    # The cheap mode's window ends within a step: one of 5 is more than one of 50.
    tolerance = 0.06 if case.mode == "cheap" else 0.03
    assert explore_benchmark.relative_flops(narrow, case) == pytest.approx(
      ratio, tolerance
    )
  # Published (DRM, k = 6): 3.41 in time. The cheap mode's limit: 1.6.
  of_name = {
    name: explore_benchmark.relative_flops(full, case)
    for name, case in explore_benchmark.CASES.items()
  }
  assert 3.6 < of_name["drm-6"] < 3.8
  assert all(1.5 < of_name[f"cheap-{k}"] <= 1.6 for k in (4, 6))


def test_products_of_prompts_inside_of_loops_are_found():
  def inside(context, w):
    return jax.lax.scan(lambda c, _: (c + (context @ w).sum(), None), 0.0, None, 3)[0]

  shapes = (
    jax.ShapeDtypeStruct((2, 5, 6), "float32"),
    jax.ShapeDtypeStruct((6, 4), "f4"),
  )
  jaxpr = jax.make_jaxpr(inside)(*shapes).jaxpr
  assert explore_benchmark.prompt_products(jaxpr, 5, 6) == (0, 1)
  jaxpr = jax.make_jaxpr(lambda c, w: jax.nn.relu(c @ w))(*shapes).jaxpr
  assert explore_benchmark.prompt_products(jaxpr, 5, 6) == (1, 0)
