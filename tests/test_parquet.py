"""The released parquet layout: exact both ways, clear errors, each row group once."""

import collections
from concurrent import futures
import csv
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import threading

import grain
import numpy as np
import precompute_latents
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrm_jax.data import lru, parquet, records
from lrm_jax.data.source import DataError
from tests import pair_records

# Four of one size after another: what row groups of four can hold.
RECORDS = [
  pair_records.make(i, ((2, 3), (3, 2), (4, 4))[i // 4 % 3]) for i in range(20)
]


@pytest.fixture
def folder(tmp_path):
  """Two parts of 3 and 2 row groups: 4 4 4 and 4 4 pairs."""
  folder = tmp_path / "pairs"
  parquet.write_part(folder / "a.parquet", RECORDS[:12], rows_per_group=4)
  parquet.write_part(folder / "b.parquet", RECORDS[12:], rows_per_group=4)
  parquet.write_index(folder)
  return folder


# What is written comes back.


@pytest.mark.parametrize("with_index", [True, False])
def test_round_trip(folder, with_index):
  if not with_index:
    (folder / parquet.INDEX).unlink()
  source = parquet.ParquetPairs(folder)
  assert source.name == str(folder) and source.kind_names == ("hard", "plain")
  assert source.latent_shapes == ((2, 3, 4), (3, 2, 4), (4, 4, 4))
  assert source.block.tolist() == np.repeat(np.arange(5), 4).tolist()
  assert source.bucket.dtype == source.block.dtype == np.int32
  pair_records.assert_pairs(source, RECORDS)
  for stored, record in zip(source.records(), RECORDS, strict=True):
    for name, value in record.items():
      np.testing.assert_array_equal(stored[name], value)
  for i in (-1, 20):
    with pytest.raises(IndexError, match=f"pair {i} of 20"):
      source[i]


def test_special_values_come_back_bit_for_bit(tmp_path):
  chosen = np.zeros((2, 2, 4), np.float32)
  chosen.reshape(-1)[:4] = [-0.0, np.float32(1e-45), np.finfo(np.float32).max, 1 / 3]
  record = dict(prompt="", chosen=chosen, rejected=chosen.transpose(1, 0, 2))
  parquet.write_part(tmp_path / "a.parquet", [record], rows_per_group=8)
  source = parquet.ParquetPairs(tmp_path)
  assert source.kind_names == ("all",) and source[0]["prompt"] == ""
  assert source[0]["chosen"].tobytes() == chosen.tobytes()


def test_written_layout_is_the_released_one(folder):
  part = pq.ParquetFile(folder / "a.parquet")
  assert part.num_row_groups == 3
  assert part.metadata.row_group(0).column(0).compression == "ZSTD"
  row = part.read().to_pylist()[1]
  assert row["latent1_shape"] == row["latent2_shape"] == [4, 2, 3]
  for name, of in (("latent1", "chosen"), ("latent2", "rejected")):
    latent = np.load(io.BytesIO(row[name]), allow_pickle=False)
    assert latent.dtype == np.float32
    np.testing.assert_array_equal(latent, RECORDS[1][of].transpose(2, 0, 1))
  with open(folder / "bucket_index.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert list(lines[0])[:7] == list(parquet.INDEX_COLUMNS)
  assert list(lines[13].values()) == (
    ["13", "b.parquet", "0", "1", "24", "16", "16x24", "hard"]
  )
  parquet.write_index(folder, pixels_per_cell=1)
  assert parquet.read_index(folder).buckets[0] == ("2x3", 2, 3)
  pair_records.assert_pairs(parquet.ParquetPairs(folder), RECORDS)


def test_row_groups_hold_one_shape(tmp_path):
  """A new one where the shape changes; else they are full, and the order stays."""
  sizes = [(2, 3)] * 5 + [(3, 2)] * 2 + [(4, 4)] * 4 + [(2, 3)]
  expected = [pair_records.make(i, size) for i, size in enumerate(sizes)]
  parquet.write_part(tmp_path / "a.parquet", expected, rows_per_group=4)
  source = parquet.ParquetPairs(tmp_path)
  pair_records.assert_pairs(source, expected)
  assert np.bincount(source.block).tolist() == [4, 1, 2, 4, 1]
  assert len(set(zip(source.block, source.bucket, strict=True))) == 5


def test_order_of_rows_is_the_index_s(folder):
  path = folder / parquet.INDEX
  header, *lines = path.read_text().splitlines()
  order = np.random.default_rng(0).permutation(20)[:15]  # also a subset
  path.write_text("\n".join([header, *(lines[i] for i in order)]) + "\n")
  pair_records.assert_pairs(parquet.ParquetPairs(folder), [RECORDS[i] for i in order])


# The released files, made without our writer.


def _npy(array):
  stream = io.BytesIO()
  np.save(stream, array)
  return stream.getvalue()


def _released_row(record, **changes):
  latents = [record[name].transpose(2, 0, 1) for name in ("chosen", "rejected")]
  return (
    dict(
      prompt=record["prompt"],
      model1="m",
      model2="n",
      detailed_results="{'votes_chosen': 3}",
      image1_path="x.png",
      image2_path="y.png",
      latent1=_npy(latents[0]),
      latent2=_npy(latents[1]),
      latent1_shape=list(latents[0].shape),
      latent2_shape=list(latents[1].shape),
    )
    | changes
  )


def _write_released(path, rows, rows_per_group=3, **types):
  names = {name: pa.string() for name in ("prompt", "model1", "model2")}
  names |= {name: pa.string() for name in ("detailed_results", "image1_path")}
  names |= {"image2_path": pa.string(), "latent1": pa.binary(), "latent2": pa.binary()}
  names |= {f"latent{i}_shape": pa.list_(pa.int64()) for i in (1, 2)}
  names = {name: names.get(name, pa.float64()) for name in rows[0]} | types
  table = pa.Table.from_pylist(rows, schema=pa.schema(names))
  pq.write_table(table, path, compression="zstd", row_group_size=rows_per_group)


def _write_released_index(folder, lines, header=parquet.INDEX_COLUMNS):
  with open(folder / "bucket_index.csv", "w", newline="") as file:
    csv.writer(file).writerows([header, *lines])


@pytest.fixture
def released(tmp_path):
  """Absolute paths of another machine, numbered buckets, no columns of ours."""
  expected = [pair_records.make(i, preference=1.0, kind="all") for i in range(10)]
  rows = [_released_row(record) for record in expected]
  _write_released(tmp_path / "part_rank00.parquet", rows[:6])
  _write_released(tmp_path / "part_rank01.parquet", rows[6:])
  lines = []
  for i in range(10):
    h, w = pair_records.SIZES[i % 3]
    place = (0, i // 3, i % 3) if i < 6 else (1, (i - 6) // 3, (i - 6) % 3)
    part = f"/mnt/theirs/sd35m/part_rank{place[0]:02d}.parquet"
    lines.append([100 + i, part, place[1], place[2], 8 * w, 8 * h, i % 3 + 5])
  _write_released_index(tmp_path, lines)
  return tmp_path, expected, lines


def test_released_layout(released):
  folder, expected, _ = released
  source = parquet.ParquetPairs(folder)
  assert source.kind_names == ("all",)
  assert source.latent_shapes == ((2, 3, 4), (3, 2, 4), (4, 4, 4))
  pair_records.assert_pairs(source, expected)
  assert next(source.records())["detailed_results"] == "{'votes_chosen': 3}"
  (folder / parquet.INDEX).unlink()
  pair_records.assert_pairs(parquet.ParquetPairs(folder), expected)


def test_parts_are_found_where_the_index_says_or_in_the_folder(released, tmp_path):
  folder, expected, lines = released
  elsewhere = tmp_path / "elsewhere"
  (elsewhere / "sub").mkdir(parents=True)
  (folder / "part_rank01.parquet").rename(elsewhere / "sub" / "part_rank01.parquet")
  absolute = [
    [i, folder / "part_rank00.parquet" if j < 6 else "sub/part_rank01.parquet", *line]
    for j, (i, _, *line) in enumerate(lines)
  ]
  _write_released_index(elsewhere, absolute)
  pair_records.assert_pairs(parquet.ParquetPairs(elsewhere), expected)


def test_variants_of_the_layout_are_read(released):
  """Other integer types, floats and more columns in the index, a part's own columns."""
  folder, expected, lines = released
  rows = [
    _released_row(
      r, preference=0.5, aesthetic=1.5, latent1_shape=[4, *r["chosen"].shape[:2]]
    )
    for r in expected[6:]
  ]
  kinds = {f"latent{i}_shape": pa.list_(pa.int32()) for i in (1, 2)}
  kinds |= {f"latent{i}": pa.large_binary() for i in (1, 2)}
  _write_released(folder / "part_rank01.parquet", rows, **kinds)
  lines = [[*line[:4], f"{line[4]}.0", *line[5:], "x,y"] for line in lines]
  _write_released_index(folder, lines, (*parquet.INDEX_COLUMNS, "note"))
  half = [r | dict(preference=0.5) for r in expected[6:]]
  pair_records.assert_pairs(parquet.ParquetPairs(folder), expected[:6] + half)


def test_equal_latents_are_one_bucket_and_sizes_split_ids(released):
  """Bucket ids may be of an older table of buckets."""
  folder, expected, lines = released
  for line in lines:
    line[-1] = 0 if line[0] < 105 else 1
  _write_released_index(folder, lines)
  source = parquet.ParquetPairs(folder)
  assert len(parquet.read_index(folder).buckets) == 6
  assert source.latent_shapes == ((2, 3, 4), (3, 2, 4), (4, 4, 4))
  pair_records.assert_pairs(source, expected)


# Errors of the index.


def _edit(old, new):
  def damage(folder):
    path = folder / parquet.INDEX
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))

  return damage


@pytest.mark.parametrize(
  "damage, problem",
  [
    (lambda f: (f / "bucket_index.csv").write_text(""), "not a readable index"),
    (_edit("row_index", "row"), r"lacks the columns \['row_index'\]"),
    (_edit("5,a.parquet,1,1,", "5,a.parquet,1,x,"), "not a readable index .*'x'"),
    (_edit("5,a.parquet,1,1,", "5,a.parquet,1,1.5,"), "line 7: row_index is 1.5"),
    (_edit("5,a.parquet,1,1,", "5,a.parquet,1,-1,"), "line 7: row_index is -1"),
    (_edit("5,a.parquet,1,1,", "5,a.parquet,1,,"), "line 7: row_index is nan"),
    (_edit("5,a.parquet,1,1,16,", "5,a.parquet,1,1,0,"), "line 7: width is 0"),
    (_edit("5,a.parquet,1,1,16,24,24x16,hard", "5,a.parquet"), "not a readable index"),
    (_edit("\n5,a.parquet", "\n4,a.parquet"), "line 7: global_id 4 again"),
    (
      _edit("5,a.parquet,1,1,", "5,a.parquet,1,0,"),
      "line 7: a.*, row group 1, row 0 again",
    ),
    (_edit("16x24,hard", "16x24,"), "kind is empty"),
    (
      _edit("0,a.parquet,0,0,24,16", "0,a.parquet,0,0,24,17"),
      "17x24 pixels .* 2x3 cells",
    ),
    (
      _edit("0,a.parquet,0,0,24,16", "0,a.parquet,0,0,16,24"),
      "24x16 pixels .* 2x3 cells",
    ),
    (_edit("0,a.parquet,0,0,", "0,a.parquet,9,0,"), "has 3 row groups, .* group 9"),
    (_edit("0,a.parquet,0,0,", "0,a.parquet,0,4,"), "group 0 has 4 rows, .* row 4 of"),
    (
      lambda f: (f / "b.parquet").unlink(),
      "1 of 2 parts are missing: b.parquet; restore",
    ),
    (lambda f: _write_released_index(f, []), "names no pairs"),
    (_edit("12,b.parquet", "12,old/b.parquet"), "old/b.parquet and b.parquet would"),
    (
      lambda f: (f / "a.parquet").write_bytes(b"no"),
      "a.parquet: cannot be read .* rest",
    ),
    (
      lambda f: pq.write_table(pa.table({"prompt": ["x"]}), f / "a.parquet"),
      r"a.parquet: lacks the columns \['latent1', ",
    ),
  ],
)
def test_bad_index_is_refused_on_opening(folder, damage, problem):
  damage(folder)
  with pytest.raises(DataError, match=problem):
    parquet.ParquetPairs(folder)


def test_missing_parts_are_listed_and_counted(released):
  folder, _, lines = released
  lines = [[i, f"/x/p{i}.parquet", *line] for i, (_, _, *line) in enumerate(lines * 3)]
  _write_released_index(folder, lines)
  problem = r"30 of 30 parts are missing: /x/p0.parquet, .*p9.parquet and 20 more; re"
  with pytest.raises(DataError, match=problem):
    parquet.ParquetPairs(folder)


def test_folder_without_pairs(tmp_path):
  with pytest.raises(DataError, match="no such folder"):
    parquet.ParquetPairs(tmp_path / "nothing")
  with pytest.raises(DataError, match="holds neither bucket_index.csv nor parts"):
    parquet.ParquetPairs(tmp_path)
  parquet.write_part(tmp_path / "a.parquet", [], rows_per_group=4)
  with pytest.raises(DataError, match="its 1 parts hold no pairs"):
    parquet.write_index(tmp_path)
  parquet.write_part(tmp_path / "b.parquet", RECORDS[:2], rows_per_group=4)
  assert len(parquet.ParquetPairs(tmp_path)) == 2
  with pytest.raises(ValueError, match="cache_blocks=0"):
    parquet.ParquetPairs(tmp_path, cache_blocks=0)


def test_a_folder_that_is_being_precomputed_is_refused(folder):
  assert precompute_latents.SETTINGS == parquet.PRECOMPUTE
  (folder / parquet.PRECOMPUTE).write_text("{}")
  assert len(parquet.ParquetPairs(folder)) == 20
  (folder / parquet.INDEX).unlink()  # as it is until the last part is there
  problem = "holds precompute.json but no bucket_index.csv: .* run convert/precompute"
  for read in (parquet.ParquetPairs, parquet.read_index):
    with pytest.raises(DataError, match=problem):
      read(folder)
  parquet.write_index(folder)  # what the run does at its end
  pair_records.assert_pairs(parquet.ParquetPairs(folder), RECORDS)


def test_channels_of_one_folder_agree(tmp_path):
  one, other = (
    RECORDS[0],
    dict(prompt="", chosen=np.ones((2, 3, 16), np.float32)),
  )
  other["rejected"] = other["chosen"]
  parquet.write_part(tmp_path / "a.parquet", [one, other], rows_per_group=4)
  with pytest.raises(DataError, match="latents of 4, 16 channels"):
    parquet.write_index(tmp_path)


# Errors of the parts.


ROW = _released_row(pair_records.make(0))
NAN = np.full((4, 2, 3), np.nan, np.float32)
ONES = np.ones((4, 3, 3), np.float32)
OBJECTS = io.BytesIO()
np.save(OBJECTS, np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize(
  "changes, problem",
  [
    (dict(prompt=None), "row group 0, row 1: has no prompt"),
    (dict(latent1=None), "row group 0, row 1, latent1: is missing"),
    (dict(latent2=b""), "row 1, latent2: not the bytes of a .npy file"),
    (dict(latent2=b"not numpy at all"), "row 1, latent2: not the bytes of a .npy file"),
    (dict(latent2=ROW["latent2"][:-1]), r"latent2: .*95 bytes of data, .* needs 96"),
    (dict(latent2=ROW["latent2"] + b"x"), r"latent2: not the bytes .*97 bytes of data"),
    (dict(latent2=ROW["latent2"].replace(b"{", b"(")), "latent2: not the bytes"),
    (dict(latent2=ROW["latent2"].replace(b"<f4", b"<q9")), "latent2: not the bytes"),
    (dict(latent2=ROW["latent2"].replace(b"4, 2, 3", b"4,-2,-3")), "not the bytes"),
    (dict(latent2=OBJECTS.getvalue()), "never unpickled"),
    (dict(latent2=_npy(NAN)), "row 1, latent2: holds NaN"),
    (dict(latent2=_npy(np.ones((4, 2, 3), int))), "row 1, latent2: dtype int64"),
    (dict(latent2=_npy(ONES)), r"\(4, 3, 3\) .* its shape column says \[4, 2, 3\]"),
    (
      dict(latent2=_npy(ONES), latent2_shape=[4, 3, 3]),
      r"row 1, latent2: .*\(3, 3, 4\) \(h w c\), the index says \(2, 3, 4\)",
    ),
    (dict(latent2=_npy(ONES[0, 0]), latent2_shape=[3]), r"\(3,\), should be \(c h w\)"),
    (dict(preference=0.7), "row group 0, row 1: preference 0.7, should be 1"),
    (dict(preference=None), "row group 0, row 1: preference None"),
  ],
)
def test_bad_rows_are_refused_on_reading(tmp_path, changes, problem):
  row = ROW | dict(preference=1.0)
  _write_released(tmp_path / "p.parquet", [row, row | changes, row])
  lines = [[i, "p.parquet", 0, i, 24, 16, "b"] for i in range(3)]
  _write_released_index(tmp_path, lines)
  source = parquet.ParquetPairs(tmp_path)
  pair_records.assert_pair(source, 2, pair_records.make(0, kind="all", preference=1.0))
  with pytest.raises(DataError, match=f"p.parquet: .*{problem}"):
    source[1]


@pytest.mark.parametrize(
  "changes, problem",
  [
    (dict(latent1_shape=None), "latent1_shape: row 1 is None"),
    (dict(latent1_shape=[2, 3]), r"latent1_shape: row 1 is \[2, 3\]"),
    (dict(latent1_shape=[4, 0, 3]), "latent1_shape: has rows"),
    (dict(latent1_shape=[4, None, 3]), "latent1_shape: has rows"),
    (dict(latent2_shape=[4, 3, 2]), r"group 0, row 1: .*\(4, 2, 3\) and \(4, 3, 2\)"),
  ],
)
def test_bad_shapes_are_refused_by_the_scan(tmp_path, changes, problem):
  _write_released(tmp_path / "p.parquet", [ROW, ROW | changes])
  with pytest.raises(DataError, match=f"p.parquet: .*{problem}"):
    parquet.ParquetPairs(tmp_path)


def test_column_of_another_type(tmp_path):
  _write_released(tmp_path / "p.parquet", [ROW | dict(prompt=3)], prompt=pa.int64())
  with pytest.raises(DataError, match="column prompt is of type int64"):
    parquet.ParquetPairs(tmp_path)


def _latent_bytes(path, row_group):
  """The place of a row group's chosen latents in its file."""
  group = pq.read_metadata(path).row_group(row_group)
  for i in range(group.num_columns):
    if group.column(i).path_in_schema == "latent1":
      start = group.column(i).data_page_offset
      return start, start + group.column(i).total_compressed_size


def test_corrupt_row_group_is_named_and_others_are_read(folder):
  path = folder / "a.parquet"
  start, end = _latent_bytes(path, 1)
  data = bytearray(path.read_bytes())
  data[(start + end) // 2] ^= 0x10
  path.write_bytes(data)
  source = parquet.ParquetPairs(folder)
  for i in (0, 3, 8, 19):
    pair_records.assert_pair(source, i, RECORDS[i])
  for i in (4, 7, 4):  # again: a failure is not remembered as data
    where = re.escape(f"{path}: row group 1")
    with pytest.raises(DataError, match=where + ": cannot be read .* remove its rows"):
      source[i]


def test_truncated_part(folder):
  path = folder / "b.parquet"
  source = parquet.ParquetPairs(folder)  # its footer is not read: see `_buckets`
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(DataError, match="b.parquet: cannot be read"):
    source[15]
  path.unlink()
  with pytest.raises(DataError, match="b.parquet: cannot be read .*[Nn]o such file"):
    source[15]


@pytest.mark.parametrize("with_index", [True, False])
def test_no_flipped_bit_goes_unnoticed(tmp_path, with_index):
  """Anywhere in a part: the pair is right, or an error says so."""
  expected = [pair_records.make(i, (1, 2)) for i in range(3)]
  path = tmp_path / "a.parquet"
  parquet.write_part(path, expected, rows_per_group=2)
  if with_index:
    parquet.write_index(tmp_path)
  good = path.read_bytes()
  rng = np.random.default_rng(with_index)
  outcomes = collections.Counter()
  for place in rng.choice(len(good), 250, replace=False):
    data = bytearray(good)
    data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    try:
      source = parquet.ParquetPairs(tmp_path)
      for i in range(len(source)):
        pair_records.assert_pair(source, i, expected[i])
      assert len(source) == 3
      outcomes["right"] += 1
    except DataError:
      outcomes["refused"] += 1
  assert min(outcomes["right"], outcomes["refused"]) > 20, outcomes


# Reading: how often, from how many threads and processes.


@pytest.fixture
def reads(monkeypatch):
  """(file, row group) of every read of latents, in order."""
  reads, original = [], pq.ParquetFile.read_row_group

  def read_row_group(self, i, columns, **options):
    if "latent1" in columns:
      reads.append((self.num_row_groups, i))  # the two parts have 3 and 2 row groups
    return original(self, i, columns, **options)

  monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
  return reads


@pytest.mark.parametrize("cache_blocks", [1, 3])
def test_each_row_group_is_read_once_in_block_order(folder, reads, cache_blocks):
  source = parquet.ParquetPairs(folder, cache_blocks=cache_blocks)
  assert not reads
  pair_records.assert_pairs(source, RECORDS)
  assert reads == [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)]
  reads.clear()
  for i in (19, 0, 17, 1):
    source[i]
  expected = [(2, 1), (3, 0)] * 2 if cache_blocks == 1 else [(2, 1), (3, 0)]
  assert reads == expected[-len(reads) :]  # (2, 1) was the last one read before


def test_threads_read_what_one_thread_reads(folder, reads):
  source = parquet.ParquetPairs(folder, cache_blocks=2)
  order = np.random.default_rng(0).integers(20, size=400)

  with futures.ThreadPoolExecutor(8) as pool:
    list(
      pool.map(
        lambda i: pair_records.assert_pair(source, int(i), RECORDS[i]),
        order,
      )
    )
  reads.clear()
  source = parquet.ParquetPairs(folder, cache_blocks=2)
  together = threading.Barrier(8)

  def read(i):
    together.wait()
    pair_records.assert_pair(source, i, RECORDS[i])

  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(read, [4, 5, 6, 7, 4, 5, 6, 7]))
  assert reads == [(3, 1)]  # all waited for the one who came first


def test_cache_makes_different_values_in_parallel_and_keeps_no_errors():
  together, made = threading.Barrier(2, timeout=10), []

  def make(key):
    made.append(key)
    if key == "bad":
      raise DataError("bad")
    if key in ("x", "y"):
      together.wait()  # times out unless the other one is being made, too
    return key

  cache = lru.Cache(2, make)
  with futures.ThreadPoolExecutor(2) as pool:
    assert list(pool.map(cache.__getitem__, ["x", "y"])) == ["x", "y"]
  made.clear()
  assert [cache[key] for key in ("x", "z", "x", "w", "x")] == ["x", "z", "x", "w", "x"]
  assert made == ["z", "w"]  # the one used last is kept
  for _ in range(2):
    with pytest.raises(DataError):
      cache["bad"]
  assert made == ["z", "w", "bad", "bad"]


def test_pickle_carries_the_index_not_the_data(folder):
  source = parquet.ParquetPairs(folder)
  source[0]
  data = pickle.dumps(source)
  assert len(data) < 5000
  (folder / parquet.INDEX).unlink()  # the copy has the same pairs in the same order
  pair_records.assert_pairs(pickle.loads(data), RECORDS)


def test_inside_grain(folder):
  source = parquet.ParquetPairs(folder)
  dataset = grain.MapDataset.source(source).shuffle(seed=1)
  options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
  seen = []
  for pair in dataset.to_iter_dataset(options):
    i = int(pair["index"])
    np.testing.assert_array_equal(pair["chosen"], RECORDS[i]["chosen"])
    seen.append(i)
  assert sorted(seen) == list(range(20)) != seen
  whole = pair_records.make(0)["chosen"].shape
  dataset = grain.MapDataset.source(source).filter(lambda p: p["chosen"].shape == whole)
  batch = next(iter(dataset.to_iter_dataset(options).batch(3)))
  assert batch["chosen"].shape == (3, *whole) and batch["kind"].dtype == np.int32
  assert batch["preference"].dtype == np.float32 and batch["index"].dtype == np.int64


# Writing.


def _with(name, value):
  return lambda record: record | {name: value}


@pytest.mark.parametrize(
  "damage, problem",
  [
    (_with("prompt", None), "prompt is None, should be text"),
    (_with("prompt", b"bytes"), "prompt is b'bytes'"),
    (_with("image1_path", "\udcff"), "image1_path .* UTF-8 cannot express"),
    (_with("detailed_results", {"votes": 1}), "detailed_results is {'votes': 1}"),
    (_with("kind", ""), "kind is empty"),
    (_with("votes", 1), r"unknown fields \['votes'\]"),
    (lambda r: {k: v for k, v in r.items() if k != "chosen"}, r"lacks \['chosen'\]"),
    (_with("preference", 0.6), "preference 0.6"),
    (_with("preference", float("nan")), "preference nan"),
    (_with("chosen", NAN), "chosen: holds NaN"),
    (_with("rejected", -NAN), "rejected: holds NaN"),
    (_with("chosen", np.ones((2, 3, 4))), "chosen: dtype float64, should be float32"),
    (_with("chosen", np.ones((3, 4), np.float32)), r"chosen: shape \(3, 4\)"),
    (_with("chosen", np.ones((0, 3, 4), np.float32)), r"chosen: shape \(0, 3, 4\)"),
    (_with("chosen", np.ones((3, 2, 4), np.float32)), r"chosen has shape \(3, 2, 4\)"),
  ],
)
def test_writer_refuses_records_that_do_not_fit(tmp_path, damage, problem):
  bad = damage(pair_records.make(0))
  path = tmp_path / "a.parquet"
  with pytest.raises(DataError, match=f"a.parquet: record 2: {problem}"):
    parquet.write_part(path, [RECORDS[0], RECORDS[1], bad], rows_per_group=1)
  assert not list(tmp_path.iterdir())


def test_writer_refuses_bad_arguments(tmp_path):
  with pytest.raises(ValueError, match="rows_per_group=0"):
    parquet.write_part(tmp_path / "a.parquet", RECORDS, rows_per_group=0)
  with pytest.raises(ValueError, match="must end in .parquet"):
    parquet.write_part(tmp_path / "a.pq", RECORDS, rows_per_group=1)


def test_existing_part_is_replaced_only_on_request_and_whole(tmp_path):
  path = tmp_path / "a.parquet"
  (tmp_path / ".a.parquet.partial-1").write_text("of a run that was killed")
  assert parquet.write_part(path, RECORDS[:3], rows_per_group=2) == 3
  with pytest.raises(FileExistsError, match="force=True"):
    parquet.write_part(path, RECORDS, rows_per_group=2)

  def failing():
    yield from RECORDS[3:8]
    raise RuntimeError("out of images")

  with pytest.raises(RuntimeError, match="out of images"):
    parquet.write_part(path, failing(), rows_per_group=2, force=True)
  pair_records.assert_pairs(parquet.ParquetPairs(tmp_path), RECORDS[:3])
  parquet.write_part(path, iter(RECORDS[3:8]), rows_per_group=2, force=True)
  pair_records.assert_pairs(parquet.ParquetPairs(tmp_path), RECORDS[3:8])
  assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_writer_holds_one_row_group(tmp_path, monkeypatch):
  """Row groups are written as the records come."""
  given, written = [], []

  def stream():
    for i in range(6):
      given.append(i)
      yield RECORDS[i]

  original = pq.ParquetWriter.write_table

  def write_table(self, table, **options):
    written.append((len(given), len(table)))
    original(self, table, **options)

  monkeypatch.setattr(pq.ParquetWriter, "write_table", write_table)
  parquet.write_part(tmp_path / "a.parquet", stream(), rows_per_group=4)
  assert written == [(4, 4), (6, 2)]


def test_a_source_is_written_with_all_its_fields(folder, tmp_path):
  source = parquet.ParquetPairs(folder)
  parquet.write_part(tmp_path / "copy" / "a.parquet", source, rows_per_group=7)
  copy = parquet.ParquetPairs(tmp_path / "copy")
  pair_records.assert_pairs(copy, RECORDS)
  assert [r["image1_path"] for r in copy.records()] == [
    r["image1_path"] for r in RECORDS
  ]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from lrm_jax.data import parquet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
latent = np.random.default_rng(0).standard_normal((32, 32, 16)).astype(np.float32)
record = dict(prompt="", chosen=latent, rejected=latent)
try:
  parquet.write_part(sys.argv[1], [record] * 4, rows_per_group=2)
except OSError as e:
  print(e)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes")
def test_full_disk_leaves_nothing(tmp_path):
  """A limit on the size of files stands in for the disk's."""
  run = [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.parquet")]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  result = subprocess.run(run, capture_output=True, text=True, env=env, timeout=120)
  assert re.search("[Ff]ile too large.*a.parquet", result.stdout), result
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "array",
  [
    np.arange(6, dtype=">f4").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.float16(3),
    np.zeros((0, 3)),
  ],
)
def test_npy_bytes(array):
  array = np.asarray(array)
  for data in (records.encode_npy(array), _npy(array)):
    decoded = records.decode_npy(data)
    assert decoded.dtype == array.dtype and not decoded.flags.writeable
    np.testing.assert_array_equal(decoded, array)
