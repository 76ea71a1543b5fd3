"""Benchmarks in their published layouts, written tiny, and score files."""

import io
import json

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrm_jax.data import benchmarks, parquet, score_files
from lrm_jax.data import images as images_lib
from lrm_jax.data.source import DataError


def picture(seed: int, height: int = 16, width: int = 16) -> Image.Image:
  values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
  return Image.fromarray(values.astype(np.uint8))


def png(seed: int) -> bytes:
  file = io.BytesIO()
  picture(seed).save(file, "PNG")
  return file.getvalue()


def same(image: Image.Image, seed: int) -> bool:
  return np.array_equal(np.asarray(image), np.asarray(picture(seed)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A folder with 0.png to 5.png and one broken file."""
  folder = tmp_path_factory.mktemp("images")
  for i in range(6):
    picture(i).save(folder / f"{i}.png")
  (folder / "broken.png").write_bytes(png(0)[:60])
  return folder


def write_json(path, rows):
  path.write_text(json.dumps(rows))
  return path


def lists(benchmark):
  return [benchmark[i] for i in range(len(benchmark))]


# --- every layout -------------------------------------------------------------------


HPDV3 = dict(prompt="a cat", path1="0.png", path2="1.png")
HPDV2 = dict(prompt="a cat", image_path=["0.png", "1.png", "2.png"], rank=[2, 0.5, 2])
IMAGEREWARD = dict(
  id="x", prompt="a cat", generations=["0.png", "1.png"], ranking=[2, 1]
)
GENAIBENCH = dict(
  prompt="a cat", left_image="0.png", right_image="1.png", vote_type="leftvote"
)


def test_hpdv3(tmp_path, files):
  votes = dict(confidence=0.97, choice_dist=[1, 9], model1="flux", model2="real")
  rows = [HPDV3, HPDV3 | votes, HPDV3 | dict(choice_dist=[], confidence=None, extra=1)]
  benchmark = benchmarks.read("hpdv3", write_json(tmp_path / "test.json", rows), files)
  assert (
    len(benchmark) == 3 and not benchmark.is_latent and benchmark.tie_credit is None
  )
  assert {ranked.images for ranked in lists(benchmark)} == {("0.png", "1.png")}
  assert {ranked.ranks for ranked in lists(benchmark)} == {(0.0, 1.0)}
  assert len({ranked.id for ranked in lists(benchmark)}) == 3
  assert benchmark.notes == [
    "1 rows have more votes for path2; path1 counts as preferred"
  ]
  loaded = benchmark.load(0, [1, 0])
  assert same(loaded[0], 1) and same(loaded[1], 0)


def test_hpdv2(tmp_path, files):
  rows = [HPDV2 | dict(raw_annotations=[{"rank": [0, 1, 2], "user_hash": "u"}])]
  (ranked,) = lists(
    benchmarks.read("hpdv2", write_json(tmp_path / "test.json", rows), files)
  )
  assert ranked.images == ("0.png", "1.png", "2.png") and ranked.ranks == (2, 0.5, 2)


def test_imagereward(tmp_path, files):
  rows = [IMAGEREWARD, IMAGEREWARD | dict(id="y")]
  path = write_json(tmp_path / "test.json", rows)
  assert [r.id for r in lists(benchmarks.read("imagereward", path, files))] == [
    "x",
    "y",
  ]
  # Ids that are not unique are told apart by their row.
  path = write_json(tmp_path / "test.json", [IMAGEREWARD] * 2)
  first, second = lists(benchmarks.read("imagereward", path, files))
  assert (first.id, second.id) == ("x#0", "x#1")
  assert first.images == ("0.png", "1.png") and first.ranks == (2.0, 1.0)
  path = write_json(
    tmp_path / "test.json", [{k: IMAGEREWARD[k] for k in IMAGEREWARD if k != "id"}]
  )
  assert lists(benchmarks.read("imagereward", path, files))[0].id == "0"


def pickapic(**changes):
  columns = dict(
    caption=["a cat", "a dog", "a dog", "a car"],
    jpg_0=[png(0), png(1), png(2), png(3)],
    jpg_1=[png(4), png(5), png(6), png(7)],
    label_0=[1.0, 0.0, 0.5, 0.0],
    label_1=[0.0, 1.0, 0.5, 0.0],
    has_label=[True, True, True, False],
    ranking_id=[7, 8, 9, 10],
    image_0_uid=["a", "b", "c", "d"],
    image_1_uid=["e", "f", "b", "h"],
  )
  columns |= changes
  return pa.table({k: v for k, v in columns.items() if v is not None})


def test_pickapic(tmp_path):
  for part, rows in (("a", slice(0, 3)), ("b", slice(3, 4))):
    table = pickapic()[rows.start : rows.stop]
    pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=1)
  benchmark = benchmarks.read("pickapic", tmp_path)
  assert benchmark.tie_credit == 0.5
  assert benchmark.excluded == {"has_label is false": 1}
  first, second, tied = lists(benchmark)
  assert (first.id, first.prompt, first.images) == ("7", "a cat", ("a", "e"))
  assert first.ranks[0] < first.ranks[1] and second.ranks[0] > second.ranks[1]
  assert tied.ranks[0] == tied.ranks[1] and tied.images == ("c", "b")
  for i in (2, 0, 1):  # out of order, across row groups
    assert all(
      same(image, seed)
      for image, seed in zip(benchmark.load(i, [0, 1]), (i, i + 4), strict=True)
    )
  assert same(benchmark.load(1, [1])[0], 5)


def test_pickapic_without_the_optional_columns(tmp_path):
  optional = ("has_label", "ranking_id", "image_0_uid", "image_1_uid")
  table = pickapic(**dict.fromkeys(optional))[:3]
  path = tmp_path / "x.parquet"
  pq.write_table(table, path)
  first, *_ = lists(benchmarks.read("pickapic", path))
  assert (first.id, first.images) == ("0", ("0/jpg_0", "0/jpg_1"))


@pytest.mark.parametrize("kind", ["json", "jsonl", "bytes", "struct", "path"])
def test_genaibench(tmp_path, files, kind):
  votes = ["leftvote", "rightvote", "tievote", "bothbad_vote"]
  rows = [GENAIBENCH | dict(vote_type=vote) for vote in votes]
  path = tmp_path / f"test.{kind if 'json' in kind else 'parquet'}"
  if kind == "json":
    write_json(path, rows)
  elif kind == "jsonl":
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
  else:
    for row in rows:
      for side, seed in (("left_image", 0), ("right_image", 1)):
        stored = dict(bytes=png(seed), path="gone.png")
        if kind != "path":
          row[side] = stored if kind == "struct" else stored["bytes"]
    pq.write_table(pa.Table.from_pylist(rows), path)
  benchmark = benchmarks.read("genaibench", path, files)
  assert [r.ranks for r in lists(benchmark)] == [(0, 1), (1, 0), (0, 0), (0, 0)]
  assert benchmark.tie_credit == 0.0
  left, right = benchmark.load(3, [0, 1])
  assert same(left, 0) and same(right, 1)


def test_latents(tmp_path):
  rng = np.random.default_rng(0)
  records = [
    dict(
      prompt=f"prompt {i}",
      chosen=rng.normal(size=(4, 4, 16)).astype(np.float32),
      rejected=rng.normal(size=(4, 4, 16)).astype(np.float32),
      preference=0.5 if i == 1 else 1.0,
    )
    for i in range(3)
  ]
  parquet.write_part(tmp_path / "part.parquet", records, rows_per_group=2)
  parquet.write_index(tmp_path)
  benchmark = benchmarks.read("latents", tmp_path)
  assert benchmark.is_latent and len(benchmark) == 3
  assert [r.ranks for r in lists(benchmark)] == [(0, 1), (0, 0), (0, 1)]
  assert benchmark[2].prompt == "prompt 2"
  np.testing.assert_array_equal(benchmark.load(2, [1])[0], records[2]["rejected"])
  np.testing.assert_array_equal(benchmark.load(0, [0])[0], records[0]["chosen"])
  assert benchmark.noise_group(0) != benchmark.noise_group(1)
  with pytest.raises(ValueError, match="has no image folder"):
    benchmarks.read("latents", tmp_path, tmp_path)


def test_tfds(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  from lrm_jax.data import tfds_pairs

  latent = np.ones((4, 4, 16), np.float32)
  records = [dict(prompt="a cat", chosen=latent, rejected=-latent)]
  tfds_pairs.write(tmp_path / "pairs", {"test": records})
  benchmark = benchmarks.read("tfds", f"{tmp_path / 'pairs'}:test")
  assert benchmark.is_latent and benchmark[0].prompt == "a cat"
  np.testing.assert_array_equal(benchmark.load(0, [1])[0], -latent)
  with pytest.raises(DataError, match="FOLDER:SPLIT"):
    benchmarks.read("tfds", "pairs")


def test_lists_of_one_prompt_come_together(tmp_path, files):
  prompts = ["b", "a", "b", "c", "a"]
  path = write_json(tmp_path / "x.json", [HPDV3 | dict(prompt=p) for p in prompts])
  benchmark = benchmarks.read("hpdv3", path, files)
  assert benchmark.order().tolist() == [0, 2, 1, 4, 3]
  assert benchmark.order(3).tolist() == [0, 2, 1]
  assert benchmark.noise_group(0) == benchmark.noise_group(2) == "b"


# --- images that cannot be used -----------------------------------------------------


def test_bad_image_files_are_returned(tmp_path, files):
  rows = [HPDV3 | dict(path1="broken.png", path2="gone.png")]
  benchmark = benchmarks.read("hpdv3", write_json(tmp_path / "x.json", rows), files)
  broken, gone = benchmark.load(0, [0, 1])
  assert isinstance(broken, images_lib.ImageError) and "broken.png" in str(broken)
  assert isinstance(gone, images_lib.ImageError) and "does not exist" in str(gone)


def test_bad_images_in_parquet_are_returned(tmp_path):
  cells = dict(jpg_0=[b"", b"nonsense", png(0)[:60]], jpg_1=[None, None, png(1)])
  names = ("caption", "label_0", "label_1")
  table = {name: pickapic()[name][:3] for name in names} | cells
  pq.write_table(pa.table(table), tmp_path / "x.parquet")
  benchmark = benchmarks.read("pickapic", tmp_path / "x.parquet")
  reasons = [str(benchmark.load(i, [0])[0]) for i in range(3)]
  assert reasons[0] == "image 0/jpg_0 is empty"
  assert reasons[1] == "image 1/jpg_0 is 8 bytes of no known image format"
  assert reasons[2].startswith("image 2/jpg_0 cannot be read")
  assert "neither bytes nor path" in str(benchmark.load(0, [1])[0])


# --- rows that do not fit -----------------------------------------------------------


@pytest.mark.parametrize(
  ("format", "row", "message"),
  [
    ("hpdv3", HPDV3 | dict(prompt=3), "row 1: field 'prompt' is 3, should be text"),
    ("hpdv3", HPDV3 | dict(path1=""), "row 1: field 'path1' is '', should be text"),
    ("hpdv3", HPDV3 | dict(choice_dist=[1]), "'choice_dist' is .1., should be null"),
    ("hpdv3", {"prompt": "x", "path1": "a"}, "row 1: lacks the field 'path2'.*format"),
    ("hpdv3", ["x"], "row 1 is .'x'., should be an object"),
    (
      "hpdv2",
      HPDV2 | dict(rank=[1, 2]),
      "'rank' holds 2 numbers for 3 of 'image_path'",
    ),
    ("hpdv2", HPDV2 | dict(rank=[1, "2", 3]), "'rank' holds '2' at place 1"),
    ("hpdv2", HPDV2 | dict(rank=[1, True, 3]), "'rank' holds True at place 1"),
    ("hpdv2", HPDV2 | dict(rank=[1, float("nan"), 3]), "'rank' holds nan at place 1"),
    ("hpdv2", HPDV2 | dict(rank=None), "'rank' is None, should be a list"),
    ("hpdv2", HPDV2 | dict(image_path=["a"], rank=[1]), "holds 1 image"),
    (
      "hpdv2",
      HPDV2 | dict(image_path=["a", 2, "c"]),
      "'image_path' holds 2 at place 1",
    ),
    (
      "imagereward",
      IMAGEREWARD | dict(ranking=[1]),
      "1 numbers for 2 of 'generations'",
    ),
    ("imagereward", IMAGEREWARD | dict(id=5), "field 'id' is 5"),
    (
      "genaibench",
      GENAIBENCH | dict(vote_type="left"),
      "'vote_type' is 'left', should",
    ),
    ("genaibench", GENAIBENCH | dict(left_image=None), "'left_image' is None"),
  ],
)
def test_a_bad_json_row_is_named(tmp_path, files, format, row, message):
  good = dict(hpdv3=HPDV3, hpdv2=HPDV2, imagereward=IMAGEREWARD, genaibench=GENAIBENCH)[
    format
  ]
  path = write_json(tmp_path / "rows.json", [good, row])
  with pytest.raises(DataError, match=f"rows.json, .*{message}"):
    benchmarks.read(format, path, files)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(label_0=[1.0, 0.3, 0.5, 0]), r"row 1: field 'label_0' is 0.3, should be one"),
    (dict(label_1=[1.0, 1, 0.5, 0]), "row 0: field 'label_1' is 1.0 beside a label_0"),
    (dict(label_0=[None, 0.0, 0.5, 0]), "row 0: field 'label_0' is None"),
    (dict(has_label=None), "row 3: field 'label_1' is 0.0 beside"),
    (dict(caption=[None, "b", "c", "d"]), "row 0: field 'caption' is None"),
    (dict(jpg_1=None), r"lacks the columns \['jpg_1'\].*right format"),
    (dict(has_label=[False] * 4), "no pickapic rows to evaluate; 4 rows: has_label"),
  ],
)
def test_a_bad_parquet_row_is_named(tmp_path, changes, message):
  pq.write_table(pickapic(**changes), tmp_path / "x.parquet")
  with pytest.raises(DataError, match=message):
    benchmarks.read("pickapic", tmp_path / "x.parquet")


def test_files_that_cannot_be_used(tmp_path, files):
  def bad(match, format, path, root=None, error=DataError):
    with pytest.raises(error, match=match):
      benchmarks.read(format, path, root)

  path = tmp_path / "x.json"
  bad("x.json does not exist: give the hpdv2 file", "hpdv2", path)
  bad("format 'csv': use one of hpdv3, ", "csv", path, error=ValueError)
  path.write_text("[{")
  bad("x.json is not valid JSON", "hpdv3", path)
  path.write_text('{"prompt": "x"}')
  bad("x.json holds .'prompt.*should be a list of rows", "hpdv3", path)
  path.write_text("[]")
  bad("holds no hpdv3 rows", "hpdv3", path)
  bad("is a folder: give the JSON file", "hpdv3", tmp_path)
  bad("image folder .*gone of .* does not exist", "hpdv3", path, tmp_path / "gone")
  bad("holds no .parquet file", "pickapic", files)
  (tmp_path / "x.parquet").write_bytes(b"PAR1 or not")
  bad("x.parquet cannot be read as parquet", "pickapic", tmp_path / "x.parquet")


def test_a_damaged_row_group_is_named(tmp_path):
  path = tmp_path / "x.parquet"
  pq.write_table(pickapic(), path, compression="zstd", row_group_size=1)
  benchmark = benchmarks.read("pickapic", path)
  offset = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
  content = bytearray(path.read_bytes())
  content[offset : offset + 200] = bytes(200)
  path.write_bytes(content)
  assert same(benchmark.load(0, [0])[0], 0)
  with pytest.raises(DataError, match="x.parquet cannot be read as parquet"):
    benchmark.load(1, [0])


# --- score files --------------------------------------------------------------------


def table() -> score_files.ScoreTable:
  raw = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
  return score_files.ScoreTable(
    ids=("a", "a", "b", "b"),
    prompts=('a "cat",\nsitting', 'a "cat",\nsitting', "", ""),
    images=("0.png", "1.png", "2,5.png", "ü.png"),
    ranks=np.array([0.0, 1 / 3, 2.0, 2.0]),
    levels=(
      score_files.Level("u=0.1", 0.1, 0.0998004),
      score_files.Level("tokens(u=0.1,0.4)", None, None),
    ),
    raw=raw,
    reported=(raw + 10) / 10,
  )


@pytest.mark.parametrize("suffix", score_files.SUFFIXES)
def test_score_files_hold_every_bit(tmp_path, suffix):
  path = tmp_path / f"scores{suffix}"
  score_files.write(path, table())
  got, want = score_files.read(path), table()
  for name in ("ids", "prompts", "images", "levels"):
    assert getattr(got, name) == getattr(want, name), name
  for name in ("ranks", "raw", "reported"):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert getattr(got, name).dtype == getattr(want, name).dtype
  assert score_files.numbered(got.ids).tolist() == [0, 0, 1, 1]


def test_score_files_that_cannot_be_used(tmp_path):
  path = tmp_path / "scores.csv"
  score_files.write(path, table())
  text = path.read_text()

  def bad(match, old, new):
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=match):
      score_files.read(path)

  bad(r"row 0: lacks \['rank'\]", ",rank,", ",place,")
  bad("row 2: rank is 'low'; evaluate again", ",2.0,", ",low,")
  bad("row 0: rank is nan", ",0.0,", ",nan,")
  bad("level 'tokens.*' holds 4 images, level 'u=0.1' 4", "2,5.png", "9.png")
  path.write_text(text.splitlines()[0] + "\n")
  with pytest.raises(DataError, match="holds no scores"):
    score_files.read(path)
  with pytest.raises(DataError, match=r"gone.csv cannot be read"):
    score_files.read(tmp_path / "gone.csv")
  (tmp_path / "x.parquet").write_bytes(b"nonsense")
  with pytest.raises(DataError, match="x.parquet cannot be read"):
    score_files.read(tmp_path / "x.parquet")
  with pytest.raises(ValueError, match=r"ends in .csv or .parquet"):
    score_files.write(tmp_path / "x.txt", table())
