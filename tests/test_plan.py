"""Batch plans: every sample once per epoch, one bucket per batch, any host split."""

import pickle

import jax
import numpy as np
import pytest

from lrm_jax import sharding
from lrm_jax.data import loader, plan

N = 101


def layout(seed: int = 0):
  rng = np.random.default_rng(seed)
  bucket = rng.choice([3, 5, 9], p=[0.6, 0.37, 0.03], size=N).astype(np.int32)
  return bucket, (np.arange(N) // 10).astype(np.int32)


def make(batch_size=8, seed=1, **options):
  return plan.BatchPlan(*layout(), batch_size=batch_size, seed=seed, **options)


def stream(p, num):
  return [p.batch(step) for step in range(num)]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("batch_size", [1, 8, 40])
def test_every_sample_comes_once_per_epoch_of_its_bucket(batch_size, window):
  bucket, _ = layout()
  p = make(batch_size, window=window)
  epochs = 6
  seen: dict[int, list[int]] = {b: [] for b in np.unique(bucket)}
  for step in range(p.epoch_start(epochs)):
    batch = p.batch(step)
    assert len(set(bucket[batch])) == 1
    seen[bucket[batch[0]]] += batch.tolist()
  for b, order in seen.items():
    members = np.flatnonzero(bucket == b)
    assert len(order) == epochs * len(members) // batch_size * batch_size
    for start in range(0, len(order), len(members)):
      epoch = order[start : start + len(members)]
      assert len(set(epoch)) == len(epoch)  # none twice
      if len(epoch) == len(members):
        assert set(epoch) == set(members)  # all of them


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_epochs", [1, 3])
def test_a_plan_that_ends_covers_every_sample_exactly(shuffle, num_epochs):
  bucket, _ = layout()
  p = make(shuffle=shuffle, num_epochs=num_epochs)
  batches = stream(p, p.num_batches)
  samples = np.concatenate(batches)
  real = samples[samples != plan.PADDING]
  assert np.array_equal(np.bincount(real, minlength=N), np.full(N, num_epochs))
  for batch in batches:
    assert batch[0] != plan.PADDING  # something to fill up with
    assert len(set(bucket[batch[batch != plan.PADDING]])) == 1
  with pytest.raises(IndexError):
    p.batch(p.num_batches)


def test_epochs_are_reshuffled_or_repeated():
  bucket = np.zeros(16, np.int32)

  def epochs(**options):
    p = plan.BatchPlan(bucket, batch_size=4, seed=3, **options)
    flat = np.concatenate(stream(p, 8))
    return flat[:16], flat[16:]

  first, second = epochs()
  assert not np.array_equal(first, second)
  assert not np.array_equal(first, np.arange(16))
  again, repeated = epochs(reshuffle=False)
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(again, repeated)
  np.testing.assert_array_equal(epochs(shuffle=False)[0], np.arange(16))


def test_seeds_differ_and_are_not_shifted_epochs_of_each_other():
  orders = [np.concatenate(stream(make(seed=s), 24)) for s in range(4)]
  for a in range(4):
    for b in range(a):
      assert not np.array_equal(orders[a][:96], orders[b][:96])
      assert not np.array_equal(orders[a][96:], orders[b][:96])


def test_epoch_of_is_the_inverse_of_epoch_start():
  p = make()
  for epoch in (0, 1, 2, 17, 1000):
    start = p.epoch_start(epoch)
    assert p.epoch_of(start) == epoch
    assert p.epoch_of(p.epoch_start(epoch + 1) - 1) == epoch


def test_a_window_keeps_storage_blocks_together():
  """A reader that holds two windows of blocks reads every block once an epoch."""
  n, per_block = 400, 10
  block = (np.arange(n) // per_block).astype(np.int32)
  bucket = np.zeros(n, np.int32)

  def reads(window):
    p = plan.BatchPlan(bucket, block, batch_size=8, seed=0, window=window)
    held, count = [], 0
    for step in range(n // 8):
      for b in block[p.batch(step)]:
        if b in held:
          held.remove(b)
        else:
          count += 1
        held = [*held, b][-8:]
    return count

  assert reads(4) == 40
  assert reads(None) > 200


def test_plans_survive_pickling():
  p = make(window=2)
  p.batch(3)
  q = pickle.loads(pickle.dumps(p))
  np.testing.assert_array_equal(stream(p, 30), stream(q, 30))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(batch_size=0), "batch_size=0"),
    (dict(window=0), "shuffle_window=0"),
    (dict(num_epochs=0), "num_epochs=0"),
  ],
)
def test_impossible_plans(change, message):
  with pytest.raises(ValueError, match=message):
    make(**change)


def test_no_samples():
  with pytest.raises(ValueError, match="no samples"):
    plan.BatchPlan(np.zeros(0, np.int32), batch_size=1, seed=0)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_devices_hold_the_whole_batch_between_them(fsdp):
  mesh = sharding.make_mesh(fsdp)
  placement = sharding.batch_sharding(mesh)
  assert loader.local_rows(placement, 16) == tuple(range(16))
  held = placement.devices_indices_map((16,)).values()
  rows = [r for (index,) in held for r in range(*index.indices(16))]
  assert sorted(rows) == list(range(16))
  assert jax.process_count() == 1
