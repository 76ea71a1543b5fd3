"""Pair folders refuse what is wrong with one error; the loader is exact."""

import json
import pickle

import numpy as np
import pytest

from lrm_jax.data import pairs

NUM = 10


def _arrays(dtype=np.float32):
  """Pairs whose every number tells which pair or prompt it belongs to."""
  marks = np.arange(1, NUM + 1, dtype=dtype)[:, None, None, None]
  prompts = np.arange(3, dtype=dtype)
  return dict(
    chosen=np.broadcast_to(marks, (NUM, 2, 3, 4)),
    rejected=np.broadcast_to(-marks, (NUM, 2, 3, 4)),
    prompt_id=np.arange(NUM) % 2 + 1,
    prompts=["", "one", "two"],
    context=np.broadcast_to(prompts[:, None, None], (3, 5, 6)),
    pooled=np.broadcast_to(prompts[:, None], (3, 7)),
    kind=np.arange(NUM, dtype=np.int8) % 2,
    kind_names=["even", "odd"],
  )


@pytest.fixture
def folder(tmp_path):
  pairs.write_pairs(tmp_path / "pairs", **_arrays())
  return tmp_path / "pairs"


def _loader(source, **changes):
  options = dict(
    batch_size=4,
    seed=0,
    shuffle=True,
    num_epochs=1,
    prompt_dropout=0.0,
    drop_remainder=False,
  )
  return pairs.make_loader(source, **(options | changes))


def _marks(batches):
  return [[int(mark) for mark in batch["chosen"][:, 0, 0, 0]] for batch in batches]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip(tmp_path, dtype):
  arrays = _arrays(dtype)
  pairs.write_pairs(tmp_path / "deep" / "pairs", **arrays)
  source = pairs.PairSource(tmp_path / "deep" / "pairs")
  assert len(source) == NUM and source.latent_shape == (2, 3, 4)
  assert source.kind_names == ("even", "odd") and source.prompt_of(1) == "two"
  assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pairs"]
  for i in range(NUM):
    record = source[i]
    assert record["chosen"].dtype == dtype and record["kind"] == i % 2
    np.testing.assert_array_equal(record["chosen"], arrays["chosen"][i])
    np.testing.assert_array_equal(record["rejected"], arrays["rejected"][i])
    np.testing.assert_array_equal(record["context"], np.full((5, 6), i % 2 + 1))
    np.testing.assert_array_equal(record["pooled"], np.full(7, i % 2 + 1))
  with pytest.raises(IndexError):
    source[NUM]


def test_kinds_are_optional(tmp_path):
  arrays = _arrays()
  del arrays["kind"], arrays["kind_names"]
  pairs.write_pairs(tmp_path / "pairs", **arrays)
  source = pairs.PairSource(tmp_path / "pairs")
  assert source.kind_names == ("all",) and source[3]["kind"] == 0


def test_existing_folder_is_replaced_only_on_request(folder):
  with pytest.raises(FileExistsError, match="force=True"):
    pairs.write_pairs(folder, **_arrays())
  half = {name: value[:5] for name, value in _arrays().items() if len(value) == NUM}
  pairs.write_pairs(folder, **(_arrays() | half), force=True)
  assert len(pairs.PairSource(folder)) == 5
  assert [path.name for path in folder.parent.iterdir()] == ["pairs"]


def test_failed_write_leaves_nothing_and_keeps_the_old(folder):
  chosen = _arrays()["chosen"].copy()
  chosen[7, 0, 0, 0] = np.nan
  with pytest.raises(pairs.PairFolderError, match=r"chosen.npy: row 7 holds NaN"):
    pairs.write_pairs(folder, **(_arrays() | dict(chosen=chosen)), force=True)
  assert [path.name for path in folder.parent.iterdir()] == ["pairs"]
  pairs.PairSource(folder).check_values()


def _save(name, change):
  def damage(folder):
    np.save(folder / name, change(np.load(folder / name)))

  return damage


def _meta(**changes):
  def damage(folder):
    meta = json.loads((folder / "pairs.json").read_text())
    (folder / "pairs.json").write_text(json.dumps(meta | changes))

  return damage


def _cut(name):
  def damage(folder):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])

  return damage


@pytest.mark.parametrize(
  "damage, problem",
  [
    (lambda f: (f / "pairs.json").unlink(), "pairs.json: not found"),
    (lambda f: (f / "pairs.json").write_text("{"), "pairs.json: not valid JSON"),
    (_meta(format="other"), "pairs.json: its format is not 'lrm_jax.pairs'"),
    (_meta(version=2), "pairs.json: version 2, this code reads 1"),
    (_meta(extra=1), "pairs.json: has keys .*extra"),
    (_meta(count=0), "pairs.json: count is 0"),
    (_meta(count=9), r"chosen.npy: shape \(10, 2, 3, 4\), should be \(9, 2, 3, 4\)"),
    (_meta(latent_shape=[2, 3]), r"pairs.json: latent_shape is \[2, 3\]"),
    (_meta(prompts=["one", "", "two"]), "pairs.json: .* empty prompt"),
    (_meta(prompts=["", "one", "one"]), "pairs.json: prompts .* twice"),
    (_meta(prompts=["", "one"]), r"context.npy: shape \(3, 5, 6\), should be \(2,"),
    (_meta(kinds=[]), "kind.npy: is present, but"),
    (_meta(kinds=["even"]), "kind.npy: pair 1 has 1, but there are 1 kinds"),
    (lambda f: (f / "kind.npy").unlink(), "kind.npy: is missing, but"),
    (lambda f: (f / "pooled.npy").unlink(), "pooled.npy: not found"),
    (_cut("rejected.npy"), "rejected.npy: not a readable array"),
    (_save("rejected.npy", lambda a: a[1:]), r"rejected.npy: shape \(9, 2, 3, 4\)"),
    (_save("rejected.npy", np.float16), "rejected.npy: dtype float16, .* float32"),
    (_save("chosen.npy", np.float64), "chosen.npy: dtype float64, .* float16"),
    (_save("pooled.npy", lambda a: a[:, :0]), r"pooled.npy: shape \(3, 0\)"),
    (_save("prompt_id.npy", np.float32), "prompt_id.npy: dtype float32"),
    (_save("prompt_id.npy", lambda a: a + 1), "prompt_id.npy: pair 1 has 3, .* 3 pr"),
    (_save("prompt_id.npy", lambda a: a - 2), "prompt_id.npy: pair 0 has -1"),
  ],
)
def test_damaged_folder_is_refused_on_opening(folder, damage, problem):
  damage(folder)
  with pytest.raises(pairs.PairFolderError, match=problem):
    pairs.PairSource(folder)


@pytest.mark.parametrize("name", ["chosen", "rejected", "context", "pooled"])
def test_non_finite_values_are_refused_on_reading(folder, name):
  array = np.load(folder / f"{name}.npy")
  array[2].flat[0] = np.inf
  np.save(folder / f"{name}.npy", array)
  source = pairs.PairSource(folder)
  reads_row_2 = {"context": 1, "pooled": 1}.get(name, 2)  # pair 1 has prompt 2
  source[0]
  with pytest.raises(pairs.PairFolderError, match=f"{name}.npy: row 2 holds NaN"):
    source[reads_row_2]


def test_source_pickles_as_its_folder(folder):
  source = pairs.PairSource(folder)
  data = pickle.dumps(source)
  assert len(data) < 1000
  np.testing.assert_array_equal(pickle.loads(data)[4]["chosen"], source[4]["chosen"])


def test_each_pair_once_per_epoch_in_a_new_order(folder):
  source = pairs.PairSource(folder)
  marks = sum(_marks(_loader(source, num_epochs=3, batch_size=5)), [])
  epochs = [marks[i : i + NUM] for i in range(0, 3 * NUM, NUM)]
  assert all(sorted(epoch) == list(range(1, NUM + 1)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  in_order = _marks(_loader(source, shuffle=False))
  assert in_order == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_seeds_give_unrelated_orders(folder):
  source = pairs.PairSource(folder)

  def epochs(seed):
    marks = sum(_marks(_loader(source, num_epochs=4, seed=seed, batch_size=5)), [])
    return {tuple(marks[i : i + NUM]) for i in range(0, 4 * NUM, NUM)}

  assert epochs(0) == epochs(0)
  assert not epochs(0) & epochs(1)


def test_batches_and_remainder(folder):
  source = pairs.PairSource(folder)
  batches = list(_loader(source))
  assert [len(batch["kind"]) for batch in batches] == [4, 4, 2]
  shapes = {name: array.shape for name, array in batches[0].items()}
  assert shapes == dict(
    chosen=(4, 2, 3, 4),
    rejected=(4, 2, 3, 4),
    context=(4, 5, 6),
    pooled=(4, 7),
    kind=(4,),
  )
  for batch in batches:
    mark = batch["chosen"][:, 0, 0, 0]
    np.testing.assert_array_equal(batch["rejected"], -batch["chosen"])
    np.testing.assert_array_equal(batch["pooled"][:, 0], (mark - 1) % 2 + 1)
    np.testing.assert_array_equal(batch["kind"], (mark - 1) % 2)
  assert [len(batch["kind"]) for batch in _loader(source, drop_remainder=True)] == [
    4,
    4,
  ]


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_iterator_resumes_exactly(folder, stop):
  """The state passes through JSON, as a checkpoint would carry it."""
  options = dict(num_epochs=None, prompt_dropout=0.5, batch_size=3, seed=3)
  whole = iter(_loader(pairs.PairSource(folder), **options))
  expected = [next(whole) for _ in range(12)]
  first = iter(_loader(pairs.PairSource(folder), **options))
  for _ in range(stop):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  second = iter(_loader(pairs.PairSource(folder), **options))
  next(second)
  second.set_state(state)
  for batch in expected[stop:]:
    resumed = next(second)
    for name, array in batch.items():
      np.testing.assert_array_equal(resumed[name], array)


def test_prompt_dropout_rate_and_determinism(folder):
  source = pairs.PairSource(folder)

  def dropped(rate, epochs, seed=0):
    loader = _loader(
      source, num_epochs=epochs, prompt_dropout=rate, batch_size=100, seed=seed
    )
    batches = list(loader)
    for batch in batches:  # both embeddings change, or neither
      np.testing.assert_array_equal(batch["context"][:, 0, 0], batch["pooled"][:, 0])
    return np.concatenate([batch["pooled"][:, 0] == 0 for batch in batches])

  assert not dropped(0.0, 3).any() and dropped(1.0, 3).all()
  fifth = dropped(0.2, 60)
  assert abs(fifth.mean() - 0.2) < 0.07  # 4 standard deviations of 600 draws
  np.testing.assert_array_equal(fifth[:100], dropped(0.2, 10))
  assert (fifth[:100] != dropped(0.2, 10, seed=1)).any()
  assert len(np.unique(fifth.reshape(60, NUM), axis=0)) > 10  # anew each epoch


@pytest.mark.parametrize(
  "changes, problem",
  [
    (dict(batch_size=0), "batch_size must be"),
    (dict(num_epochs=0), "num_epochs must be"),
    (dict(prompt_dropout=1.5), "prompt_dropout must be"),
    (dict(batch_size=11, drop_remainder=True), "do not fill one batch of 11"),
  ],
)
def test_loader_refuses_bad_options(folder, changes, problem):
  with pytest.raises(ValueError, match=problem):
    _loader(pairs.PairSource(folder), **changes)
