"""The benchmarks' own parts, on tiny data; what they measure is not asserted here."""

import json

import jax
import numpy as np
import pytest

from benchmarks import loader as loader_benchmark
from lrm_jax.data import parquet
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
