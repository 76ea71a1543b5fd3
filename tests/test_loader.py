"""Batches of pairs: exact over epochs, hosts and resumes, on two formats."""

import numpy as np
import pytest

from lrm_jax.data import loader, parquet, plan
from lrm_jax.data import source as source_lib
from tests import runs

COUNT = 37


class Memory(source_lib.PairSource):
  """Pairs of two sizes whose latents hold their own index."""

  def __init__(self, count=COUNT, tie=None):
    self.name = "memory"
    self.latent_shapes = ((2, 2, 1), (2, 4, 1))
    self.bucket = (np.arange(count) % 3 == 0).astype(np.int32)
    self.block = np.arange(count, dtype=np.int32)
    self.kind_names = ("all",)
    self._tie = tie

  def __getitem__(self, index):
    latent = np.full(self.latent_shapes[self.bucket[index]], index, np.float32)
    return source_lib.Pair(
      chosen=latent,
      rejected=-latent,
      prompt=f"prompt {index}",
      preference=np.float32(0.5 if index == self._tie else 1.0),
      kind=np.int32(0),
      index=np.int64(index),
    )


def as_text(prompts):
  return {"length": np.array([len(p) for p in prompts])}


def make(source, rows=range(8), batch_size=8, num_epochs=None, **options):
  p = plan.BatchPlan(
    source.bucket, batch_size=batch_size, seed=5, num_epochs=num_epochs
  )
  options = {"text_fn": as_text, "seed": 5} | options
  return loader.make_loader(source, p, rows, **options)


def test_a_batch_is_what_the_plan_says():
  source = Memory()
  p = plan.BatchPlan(source.bucket, batch_size=8, seed=5)
  for step, batch in zip(range(12), make(source), strict=False):
    np.testing.assert_array_equal(batch["index"], p.batch(step))
    shape = source.latent_shapes[source.bucket[batch["index"][0]]]
    assert batch["chosen"].shape == (8, *shape)
    np.testing.assert_array_equal(batch["chosen"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["rejected"], -batch["chosen"])
    assert batch["length"].tolist() == [len(f"prompt {i}") for i in batch["index"]]
    assert batch["weight"].tolist() == [1.0] * 8


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_an_epoch_exactly_also_after_a_resume(hosts):
  """Every host stops at another moment of reading ahead, and none loses a row."""
  source = Memory()
  per_host = 8 // hosts
  whole = [b["index"][b["weight"] > 0] for b in make(source, num_epochs=2, prefetch=3)]
  parts = []
  for host in range(hosts):
    rows = range(host * per_host, (host + 1) * per_host)
    batches = iter(make(source, rows, num_epochs=2, prefetch=2 + host))
    stream = loader.device_prefetch(batches, lambda b: b, depth=host)
    taken, state = [], batches.get_state()
    for _ in range(4):
      batch, state = next(stream)
      taken.append(batch)
    again = iter(make(source, rows, num_epochs=2))
    again.set_state(state)
    parts.append(taken + list(again))
  joined = [np.concatenate([b["index"] for b in step]) for step in zip(*parts)]  # noqa: B905
  weights = [np.concatenate([b["weight"] for b in step]) for step in zip(*parts)]  # noqa: B905
  assert len(joined) == len(whole)
  for got, weight, want in zip(joined, weights, whole, strict=True):
    np.testing.assert_array_equal(got[weight > 0], want)
  seen = np.concatenate([i[w > 0] for i, w in zip(joined, weights, strict=True)])
  np.testing.assert_array_equal(np.bincount(seen, minlength=COUNT), 2)


def test_the_same_on_parquet(tmp_path):
  parquet.write_part(tmp_path / "a.parquet", runs.records(COUNT), rows_per_group=5)
  parquet.write_index(tmp_path)
  source = parquet.ParquetPairs(tmp_path, cache_blocks=2)
  batches = list(make(source, num_epochs=1))
  seen = np.concatenate([b["index"][b["weight"] > 0] for b in batches])
  np.testing.assert_array_equal(np.sort(seen), np.arange(COUNT))
  written = list(runs.records(COUNT))
  for batch in batches:
    for i, chosen in zip(batch["index"], batch["chosen"], strict=True):
      np.testing.assert_array_equal(chosen, written[i]["chosen"])


def test_prompt_dropout_depends_on_the_place_alone():
  source = Memory(300)
  options = dict(prompt_dropout=0.3, num_epochs=1)
  whole = [b["length"] for b in make(source, **options)]
  dropped = np.mean(np.concatenate(whole) == 0)
  assert 0.2 < dropped < 0.4
  halves = zip(
    make(source, range(4), **options), make(source, range(4, 8), **options), strict=True
  )
  for want, (a, b) in zip(whole, halves, strict=True):
    np.testing.assert_array_equal(np.concatenate([a["length"], b["length"]]), want)
  everything = make(source, prompt_dropout=1.0, num_epochs=1)
  assert all((b["length"] == 0).all() for b in everything)


def test_a_tie_is_refused_where_the_loss_cannot_use_it():
  list(make(Memory(tie=5), num_epochs=1))
  with pytest.raises(source_lib.DataError, match="memory: pair 5 is a tie"):
    list(make(Memory(tie=5), num_epochs=1, allow_ties=False))


def test_errors_of_the_source_come_through_as_they_are():
  class Broken(Memory):
    def __getitem__(self, index):
      if index == 9:
        raise source_lib.DataError("part 3, row 9: corrupt")
      return super().__getitem__(index)

  with pytest.raises(source_lib.DataError, match="^part 3, row 9: corrupt"):
    list(make(Broken(), num_epochs=1))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(prompt_dropout=1.5), "prompt_dropout=1.5"),
    (dict(num_threads=0), "num_threads=0"),
    (dict(prefetch=1), "prefetch=1 must be at least num_threads=2"),
  ],
)
def test_impossible_options(options, message):
  with pytest.raises(ValueError, match=message):
    make(Memory(), **options)


def test_cached_text_stacks_rows():
  cache = {p: (np.full((2, 3), i), np.full(4, i)) for i, p in enumerate(("", "a"))}
  out = loader.cached_text(cache)(["a", "", "a"])
  assert out["context"].shape == (3, 2, 3) and out["pooled"].shape == (3, 4)
  assert out["pooled"][:, 0].tolist() == [1, 0, 1]
