"""Checkpoints: what is kept, what moves between meshes, and what goes wrong."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import checkpoint, sharding

EXTRA = {"data": {"next": 3}, "key": [1, 2]}


def state(value: float = 1.0):
  return {"a": jnp.full((8, 4), value), "step": jnp.int32(value)}


def placed(tree, fsdp: int, devices=None):
  mesh = sharding.make_mesh(fsdp, devices)
  return sharding.shardings(tree, mesh, ((".*", "fsdp"),))


def kept(folder) -> list[int]:
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_the_newest_and_the_best_are_kept(tmp_path):
  scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: None, 5: 0.8, 6: 0.6}

  def open_it():
    return checkpoint.Checkpoints(tmp_path, keep=2, keep_best=1, best_metric="acc")

  with open_it() as checkpoints:
    assert checkpoints.latest is None and checkpoints.best is None
    for step in (1, 2, 3):
      checkpoints.save(step, state(step), EXTRA, {"acc": scores[step]})
  with open_it() as checkpoints:  # a resumed run remembers what was best
    assert (checkpoints.latest, checkpoints.best) == (3, 2)
    for step in (4, 5, 6):
      metrics = None if scores[step] is None else {"acc": scores[step]}
      checkpoints.save(step, state(step), EXTRA, metrics)
    checkpoints.wait()
    assert checkpoints.best == 2
    restored, extra = checkpoints.restore(2, state(), placed(state(), 1))
  assert kept(tmp_path) == [2, 5, 6]
  assert extra == EXTRA
  np.testing.assert_array_equal(restored["a"], state(2)["a"])


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 4), (2, 8)])
def test_a_checkpoint_moves_to_another_mesh(before, after, tmp_path):
  value = np.arange(32, dtype=np.float32).reshape(8, 4)
  tree = {"a": jnp.asarray(value), "step": jnp.int32(7)}
  written = jax.device_put(tree, placed(tree, before))
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, written, EXTRA)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    shardings = placed(tree, after)
    restored, _ = checkpoints.restore(7, tree, shardings)
  np.testing.assert_array_equal(restored["a"], value)
  assert restored["a"].sharding == shardings["a"]


def test_a_save_in_progress_does_not_count(tmp_path):
  """What a kill in the middle of a save leaves behind is not a checkpoint."""
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    checkpoints.save(1, state(1), EXTRA)
  shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.latest == 1
    checkpoints.save(2, state(2), EXTRA)  # takes the place of the half one
  assert kept(tmp_path) == [1, 2]
  assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_an_unreadable_checkpoint_is_named_with_the_way_out(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(step), EXTRA)
  for file in (tmp_path / "2" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:3])
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    with pytest.raises(checkpoint.CheckpointError) as e:
      checkpoints.restore(2, state(), placed(state(), 1))
    assert f"delete {tmp_path / '2'} to continue from step 1" in str(e.value)
    restored, _ = checkpoints.restore(1, state(), placed(state(), 1))
  np.testing.assert_array_equal(restored["a"], state(1)["a"])


def test_another_train_state_is_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state(), EXTRA)
    checkpoints.wait()
    other = {"a": jnp.zeros((8, 5)), "step": jnp.int32(0)}
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
      checkpoints.restore(1, other, placed(other, 1))


def test_a_folder_that_cannot_be_used(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(checkpoint.CheckpointError, match="cannot use .*file/x"):
    checkpoint.Checkpoints(tmp_path / "file" / "x", keep=1)


def test_too_little_space_is_said_before_training(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    with pytest.raises(checkpoint.CheckpointError, match="0.00 GiB free"):
      checkpoints.check_space(state())
    monkeypatch.undo()
    checkpoints.check_space(state())


@pytest.mark.parametrize("options", [dict(keep=0), dict(keep=1, keep_best=-1)])
def test_impossible_policies(options, tmp_path):
  with pytest.raises(ValueError, match="keep"):
    checkpoint.Checkpoints(tmp_path, **options)
