"""Pairs as a tensorflow-datasets dataset: exact, readable by tfds too, clear errors."""

from concurrent import futures
import json
import pickle
import re
import subprocess
import sys

import grain
import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")

from lrm_jax.data import parquet, tfds_pairs  # noqa: E402
from lrm_jax.data.source import DataError  # noqa: E402
from tests import pair_records  # noqa: E402
from tests.pair_records import RECORDS  # noqa: E402

SHARD = "preference_pairs-train.array_record-0000"  # and its number


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A dataset where `tfds.data_source` finds it: 15 pairs in 3 shards, and 5."""
  folder = tmp_path_factory.mktemp("tfds") / "preference_pairs" / "1.0.0"
  splits = {"train": iter(RECORDS[:15]), "held_out": RECORDS[15:]}
  counts = tfds_pairs.write(folder, splits, pairs_per_shard=6)
  assert counts == {"train": 15, "held_out": 5}
  return folder


@pytest.fixture
def folder(made, tmp_path):
  """A copy to damage."""
  folder = tmp_path / "pairs"
  folder.mkdir()
  for path in made.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  return folder


def test_round_trip(made):
  source = tfds_pairs.TfdsPairs(made, "train")
  assert source.name == f"{made}: train" and source.kind_names == ("hard", "plain")
  assert source.latent_shapes == ((2, 3, 4), (3, 2, 4), (4, 4, 4))
  assert source.block.tolist() == list(range(15))
  assert source.bucket.dtype == source.block.dtype == np.int32
  pair_records.assert_pairs(source, RECORDS[:15])
  pair_records.assert_pairs(tfds_pairs.TfdsPairs(str(made), "held_out"), RECORDS[15:])
  for stored, record in zip(source.records(), RECORDS[:15], strict=True):
    for name, value in record.items():
      np.testing.assert_array_equal(stored[name], value)
  for i in (-1, 15):
    with pytest.raises(IndexError, match=f"pair {i} of 15"):
      source[i]


def test_special_values_come_back_bit_for_bit(tmp_path):
  chosen = np.zeros((2, 2, 4), np.float32)
  chosen.reshape(-1)[:4] = [-0.0, np.float32(1e-45), np.finfo(np.float32).max, 1 / 3]
  record = dict(prompt="", chosen=chosen, rejected=chosen)
  tfds_pairs.write(tmp_path / "pairs", {"train": [record]})
  source = tfds_pairs.TfdsPairs(tmp_path / "pairs", "train")
  assert source.kind_names == ("all",) and source[0]["prompt"] == ""
  assert source[0]["chosen"].tobytes() == chosen.tobytes()


def test_tfds_itself_reads_it(made):
  """The builder, tfds.data_source and its split arithmetic, in the order written."""
  by_name = tfds.data_source(
    "preference_pairs", split="train", data_dir=made.parent.parent, download=False
  )
  by_folder = tfds.builder_from_directory(made).as_data_source("train[6:9]")
  assert len(by_name) == 15 and len(by_folder) == 3
  for example, record in [(by_name[7], RECORDS[7]), (by_folder[1], RECORDS[7])]:
    latent = example["latent2"]
    np.testing.assert_array_equal(latent, record["rejected"].transpose(2, 0, 1))
    assert example["image2_path"].decode() == record["image2_path"]
    assert example["prompt"].decode() == record["prompt"]


def test_tensorflow_is_not_imported_and_nothing_registered(made):
  program = f"""
import sys
from lrm_jax.data import tfds_pairs
source = tfds_pairs.TfdsPairs({str(made)!r}, "train")
tfds_pairs.write({str(made.parent / "again")!r}, {{"train": source}})
print(len(source), source[3]["prompt"])
import tensorflow_datasets as tfds
registered = tfds.core.registered.list_imported_builders()
print("tensorflow" in sys.modules, tfds_pairs.NAME in registered)
"""
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
  )
  assert result.stdout.splitlines() == ["15 prompt 3 é", "False False"], result


def test_from_parquet_with_all_fields(tmp_path):
  parquet.write_part(tmp_path / "pq" / "a.parquet", RECORDS, rows_per_group=6)
  source = parquet.ParquetPairs(tmp_path / "pq")
  tfds_pairs.write(tmp_path / "tfds", {"train": source})
  copy = tfds_pairs.TfdsPairs(tmp_path / "tfds", "train")
  pair_records.assert_pairs(copy, RECORDS)
  assert copy.latent_shapes == source.latent_shapes
  parquet.write_part(tmp_path / "back" / "a.parquet", copy, rows_per_group=6)
  back = parquet.ParquetPairs(tmp_path / "back")
  for stored, record in zip(back.records(), RECORDS, strict=True):
    for name, value in record.items():
      np.testing.assert_array_equal(stored[name], value)


# What is wrong with a folder.


def _cut(name, keep):
  def damage(folder):
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])

  return damage


def _unlink(name):
  return lambda folder: (folder / name).unlink()


def _index(**changes):
  def damage(folder):
    path = folder / "bucket_index-train.npz"
    arrays = dict(np.load(path)) | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})

  return damage


def _feature(change):
  def damage(folder):
    path = folder / "features.json"
    features = json.loads(path.read_text())
    change(features["featuresDict"]["features"])
    path.write_text(json.dumps(features))

  return damage


@pytest.mark.parametrize(
  "damage, problem",
  [
    (_unlink("dataset_info.json"), "not a dataset .*no dataset_info.json"),
    (_unlink("features.json"), "not a dataset .*no features.json"),
    (_cut("dataset_info.json", 40), "dataset_info.json or features.json cannot be"),
    (_cut("features.json", 40), "dataset_info.json or features.json cannot be read"),
    (_cut("features.json", 0), "dataset_info.json or features.json cannot be read"),
    (_feature(lambda f: f.pop("latent2")), "feature latent2 is None, should be Tens"),
    (_feature(lambda f: f.update(latent1=f["kind"])), "feature latent1 is Tensor"),
    (_unlink(f"{SHARD}1"), f"1 of 3 shards of train are missing: {SHARD}1; restore"),
    (_unlink("bucket_index-train.npz"), "bucket_index-train.npz: is missing; restore"),
    (_cut("bucket_index-train.npz", 300), "bucket_index-train.npz: cannot be read"),
    (_cut("bucket_index-train.npz", 0), "bucket_index-train.npz: cannot be read"),
    (_index(kind=None), "bucket_index-train.npz: cannot be read .*kind"),
    (_index(bucket=np.zeros(14, int)), r"bucket of shape \(14,\) does not fit 15"),
    (_index(bucket=np.full(15, 3)), "does not fit 15 pairs and 3 buckets"),
    (_index(kind=np.full(15, -1)), "kind of .* does not fit 15 pairs and 2 kinds"),
  ],
)  # fmt: skip
def test_damaged_folder_is_refused_on_opening(folder, damage, problem):
  damage(folder)
  with pytest.raises(DataError, match=problem):
    tfds_pairs.TfdsPairs(folder, "train")


def test_unknown_folder_or_split(made, tmp_path):
  with pytest.raises(DataError, match="nothing: not a dataset"):
    tfds_pairs.TfdsPairs(tmp_path / "nothing", "train")
  with pytest.raises(DataError, match=r"no split 'val'; there are \['held_out', 'tr"):
    tfds_pairs.TfdsPairs(made, "val")
  with pytest.raises(DataError, match=r"no split 'train\[:3\]'"):
    tfds_pairs.TfdsPairs(made, "train[:3]")


@pytest.mark.parametrize(
  "damage",
  [
    _cut(f"{SHARD}1", 0),
    _cut(f"{SHARD}1", 30_000),
    _cut(f"{SHARD}1", -1),
    lambda f: (f / f"{SHARD}1").write_bytes((f / f"{SHARD}2").read_bytes()),
  ],
)
def test_damaged_shard_is_named_and_others_are_read(folder, damage):
  damage(folder)
  source = tfds_pairs.TfdsPairs(folder, "train")
  for i in (0, 5, 12, 14):
    pair_records.assert_pair(source, i, RECORDS[i])
  problem = f"{SHARD}1: record 5: cannot be read .* restore that shard"
  for _ in range(2):
    with pytest.raises(DataError, match=problem):
      source[11]


def test_no_flipped_bit_goes_unnoticed(folder):
  path = folder / f"{SHARD}0"
  good = path.read_bytes()
  used = [i for i in range(len(good)) if good[i]]  # the rest is padding
  rng = np.random.default_rng(0)
  refused = 0
  for place in rng.choice(used, 100, replace=False):
    data = bytearray(good)
    data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    source = tfds_pairs.TfdsPairs(folder, "train")
    for i in range(6):
      try:
        pair_records.assert_pair(source, i, RECORDS[i])
      except DataError:
        refused += 1
  assert refused > 20


@pytest.mark.parametrize(
  "changes, problem",
  [
    (
      dict(bucket=np.zeros(15, int)),
      r"record 4, latent1: .*\(4, 4, 4\) .* says \(2, 3",
    ),
    (dict(kind_names=np.array(["a", "b"])), None),
  ],
)
def test_the_index_is_checked_as_pairs_are_read(folder, changes, problem):
  _index(**changes)(folder)
  source = tfds_pairs.TfdsPairs(folder, "train")
  if problem is None:
    assert source.kind_names == ("a", "b")
    return
  with pytest.raises(DataError, match=problem):
    source[4]


def _rewrite(folder, **changes):
  """The first pair replaced by one that `write` would refuse."""
  info = tfds.builder_from_directory(folder).info
  example = tfds.builder_from_directory(folder).as_data_source("train")[0]
  writer = tfds.core.SequentialWriter(info, 6, file_format="array_record")
  writer.initialize_splits(["train"])
  writer.add_examples({"train": [example | changes] * 15})
  writer.close_all()


@pytest.mark.parametrize(
  "changes, problem",
  [
    (dict(latent2=np.full((4, 2, 3), np.inf, np.float32)), "latent2: holds NaN"),
    (
      dict(latent1=np.ones((4, 3, 2), np.float32)),
      r"latent1: .* \(3, 2, 4\) \(h w c\)",
    ),
    (dict(preference=np.float32(0)), r"preference 0\.0, should be 1"),
    (dict(prompt=b"\xff"), "prompt is not UTF-8"),
  ],
)
def test_bad_pairs_are_refused_on_reading(folder, changes, problem):
  """Of a dataset that another program wrote."""
  _rewrite(folder, **changes)
  source = tfds_pairs.TfdsPairs(folder, "train")
  with pytest.raises(DataError, match=f"{SHARD}0: record 0.*{problem}"):
    source[0]


# Threads, processes, Grain.


def test_threads_read_what_one_thread_reads(made):
  source = tfds_pairs.TfdsPairs(made, "train")
  order = np.random.default_rng(0).integers(15, size=400).tolist()
  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda i: pair_records.assert_pair(source, i, RECORDS[i]), order))


def test_source_pickles_as_its_folder(made):
  source = tfds_pairs.TfdsPairs(made, "train")
  source[0]
  data = pickle.dumps(source)
  assert len(data) < 500
  pair_records.assert_pairs(pickle.loads(data), RECORDS[:15])


def test_inside_grain(made):
  source = tfds_pairs.TfdsPairs(made, "train")
  options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
  dataset = grain.MapDataset.source(source).shuffle(seed=1).to_iter_dataset(options)
  seen = []
  for pair in dataset:
    i = int(pair["index"])
    np.testing.assert_array_equal(pair["rejected"], RECORDS[i]["rejected"])
    seen.append(i)
  assert sorted(seen) == list(range(15)) != seen


# Writing.


def test_failed_write_leaves_nothing_and_keeps_the_old(folder):
  bad = RECORDS[4] | dict(rejected=np.full((4, 4, 4), np.nan, np.float32))
  splits = {"train": RECORDS[:3], "held_out": [RECORDS[3], bad]}
  with pytest.raises(FileExistsError, match="--force"):
    tfds_pairs.write(folder, splits)
  problem = re.escape(f"{folder}: held_out: record 1: rejected: holds NaN")
  with pytest.raises(DataError, match=problem):
    tfds_pairs.write(folder, splits, force=True)
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]
  pair_records.assert_pairs(tfds_pairs.TfdsPairs(folder, "train"), RECORDS[:15])
  tfds_pairs.write(folder, {"train": RECORDS[:3]}, force=True)
  pair_records.assert_pairs(tfds_pairs.TfdsPairs(folder, "train"), RECORDS[:3])
  with pytest.raises(DataError, match="no split 'held_out'"):
    tfds_pairs.TfdsPairs(folder, "held_out")


@pytest.mark.parametrize(
  "splits, options, error, problem",
  [
    ({}, {}, ValueError, "no splits"),
    ({"all": RECORDS}, {}, ValueError, "split 'all' must be"),
    ({"Train-1": RECORDS}, {}, ValueError, "split 'Train-1' must be"),
    ({"train": []}, {}, DataError, "train: there are no records"),
    ({"train": RECORDS}, dict(pairs_per_shard=0), ValueError, "pairs_per_shard=0"),
  ],
)
def test_write_refuses_bad_arguments(tmp_path, splits, options, error, problem):
  with pytest.raises(error, match=problem):
    tfds_pairs.write(tmp_path / "pairs", splits, **options)
  assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
import numpy as np
from lrm_jax.data import tfds_pairs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
latent = np.random.default_rng(0).standard_normal((32, 32, 16)).astype(np.float32)
record = dict(prompt="", chosen=latent, rejected=latent)
try:
  tfds_pairs.write(sys.argv[1], {"train": [record] * 4})
except OSError as e:
  print(e)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes")
def test_full_disk_leaves_nothing(tmp_path):
  """A limit on the size of files stands in for the disk's."""
  run = [sys.executable, "-c", FULL_DISK, str(tmp_path / "pairs")]
  result = subprocess.run(run, capture_output=True, text=True, timeout=120)
  assert re.search("pairs: cannot be written: .*too large", result.stdout), result
  assert not list(tmp_path.iterdir())
