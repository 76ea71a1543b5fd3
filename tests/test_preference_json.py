"""HPDv3-style JSON: every bad row is named, filters count, images never raise."""

import json
import pickle

import grain
import numpy as np
from PIL import Image
import pytest

from lrm_jax.data import buckets
from lrm_jax.data import images as images_lib
from lrm_jax.data import preference_json as pj
from lrm_jax.data.source import DataError


def row(**changes):
  values = dict(prompt="a cat", path1="a.png", path2="b.png")
  return {k: v for k, v in (values | changes).items() if v is not ...}


def save(path, values):
  path.write_text(json.dumps(values))
  return path


def test_read(tmp_path):
  values = [
    row(confidence=0.99, choice_dist=[7, 2], model1="x", model2="y", extra=[1]),
    row(path1="c.png"),
    row(prompt="zwei 猫", confidence=None, choice_dist=None, model1=None),
  ]
  want = [
    pj.ImagePair(0, "a cat", "a.png", "b.png", "x", "y", 0.99, (7, 2)),
    pj.ImagePair(1, "a cat", "c.png", "b.png"),
    pj.ImagePair(2, "zwei 猫", "a.png", "b.png"),
  ]
  assert pj.read(save(tmp_path / "list.json", values)) == (want, [])

  # One object per line, with a byte order mark and an empty line.
  lines = [json.dumps(value, ensure_ascii=False) for value in values]
  lines = "\r\n".join([lines[0], lines[1], "", lines[2]])
  (tmp_path / "lines.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
  pairs, bad = pj.read(tmp_path / "lines.jsonl")
  assert [pair.row for pair in pairs] == [0, 1, 3] and not bad
  assert [pair.prompt for pair in pairs] == [pair.prompt for pair in want]


BAD_ROWS = [
  (row(prompt=...), "prompt is missing"),
  (row(path2=None), "path2 is missing"),
  (row(prompt=" \n"), "prompt is empty"),
  (row(path1=""), "path1 is empty"),
  (row(prompt=3), "prompt is 3, should be text"),
  (row(path1=["a.png"]), r"path1 is \['a.png'\], should be text"),
  (row(model1=1.5), "model1 is 1.5, should be text"),
  (row(prompt="\ud800"), "UTF-8 cannot express"),
  (row(path2="a.png"), "path1 and path2 are the same image, 'a.png'"),
  (row(confidence="0.9"), "confidence is '0.9', should lie in"),
  (row(confidence=1.01), "confidence is 1.01"),
  (row(confidence=True), "confidence is True"),
  (row(confidence=float("nan")), "confidence is nan"),
  (row(choice_dist=[1]), r"choice_dist is \[1\], should be the two numbers"),
  (row(choice_dist=[1, -1]), r"choice_dist is \[1, -1\]"),
  (row(choice_dist=[1, "2"]), r"choice_dist is \[1, '2'\]"),
  (row(choice_dist={"a": 1, "b": 2}), "choice_dist is {"),
  ("a cat", "'a cat' is no object"),
  ([["x"] * 90], "x', ... is no object"),
  (None, "None is no object"),
]


@pytest.mark.parametrize("value, match", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, value, match):
  path = save(tmp_path / "train.json", [row(), row(), value, row()])
  with pytest.raises(
    DataError, match=rf"train.json: row 2 \(counted from 0\): .*{match}"
  ):
    pj.read(path)
  pairs, (bad,) = pj.read(path, skip_bad=True)
  assert [pair.row for pair in pairs] == [0, 1, 3]
  assert bad.row == 2 and bad.kind == pj.BAD_ROW and bad.reason


def test_bad_files(tmp_path):
  def bad(match, text=None, **kwargs):
    if text is not None:
      (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(DataError, match=match):
      pj.read(tmp_path / "x.json", **kwargs)

  bad("x.json does not exist")
  bad("x.json cannot be read", b"\xff\xfe\x00")
  bad("x.json is not valid JSON.*line 1 column 4", b"[1,")
  bad("x.json is not valid JSON", b"[" * 100_000)
  bad("holds no usable rows .0 bad", b"[]")
  bad("holds no usable rows .0 bad", b"\n\n")
  bad("holds no usable rows .1 bad", b"[{}]", skip_bad=True)
  bad("row 0 .*not valid JSON.*Expecting value", b"prompt,path1,path2\n")
  bad("row 0 .*prompt is missing", b'{"rows": []}\n')
  lines = [json.dumps(row()), '{"prompt": "a ca', json.dumps(row())]
  (tmp_path / "x.json").write_text("\n".join(lines))
  bad("row 1 .*not valid JSON: Unterminated string")
  pairs, skipped = pj.read(tmp_path / "x.json", skip_bad=True)
  assert len(pairs) == 2 and skipped[0].row == 1


# --- filters -----------------------------------------------------------------------


def pair(n=0, **changes):
  return pj.ImagePair(n, **(dict(prompt="p", path1=f"{n}a", path2=f"{n}b") | changes))


def test_filters_are_parsed_strictly():
  assert pj.parse_filters("") == pj.parse_filters("  ") == ()
  filters = pj.parse_filters("confidence>=0.95, votes > 3,vote_share<=1e-1,votes<8")
  assert [str(f) for f in filters] == [
    "confidence>=0.95", "votes>3", "vote_share<=0.1", "votes<8",
  ]  # fmt: skip
  for text in (
    "confidence", "confidence=0.9", "confidence==0.9", "certainty>=1", ",", "votes>=3,",
    "votes>=three", "votes>=1e", "votes>=3 and confidence>=1", "votes>=__import__(os)",
    "votes>=nan", "votes>=3;votes<4", "0.9<=confidence",
  ):  # fmt: skip
    with pytest.raises(ValueError, match="^filter '.*(is not understood|is no number)"):
      pj.parse_filters(text)


def test_what_filters_remove():
  pairs = [
    pair(0, confidence=0.95, votes=(3, 0)),
    pair(1, confidence=0.94, votes=(3, 0)),
    pair(2, confidence=0.99, votes=(1, 1)),
    pair(3, votes=(5, 1)),
    pair(4, confidence=1.0),
    pair(5, confidence=1.0, votes=(0, 0)),
    pair(6),
  ]
  filters = pj.parse_filters("confidence>=0.95,votes>=3")
  kept, removed = pj.select(pairs, filters)
  assert [p.row for p in kept] == [0]
  # The first reason counts: row 6 lacks both.
  assert removed == {
    "confidence>=0.95": 1, "no confidence": 2, "votes>=3": 2, "no votes": 1,
  }  # fmt: skip
  kept, removed = pj.select(pairs, filters, keep_unknown=True)
  assert [p.row for p in kept] == [0, 3, 4, 6]
  assert removed == {"confidence>=0.95": 1, "votes>=3": 2}
  # A share of no votes at all is unknown.
  kept, removed = pj.select(pairs, pj.parse_filters("vote_share>0.8"))
  assert [p.row for p in kept] == [0, 1, 3]
  assert removed == {"vote_share>0.8": 1, "no vote_share": 3}
  assert pj.select(pairs) == (pairs, {})


def test_duplicates_and_the_cap():
  pairs = [
    pair(0, path1="a", path2="b"),
    pair(1, path1="a", path2="b", confidence=1.0),
    pair(2, path1="b", path2="a"),
    pair(3, path1="a", path2="b", prompt="q"),
    pair(4),
    pair(5, prompt="q"),
    pair(6, confidence=1.0),
  ]
  kept, removed = pj.select(pairs, drop_duplicates=True, max_per_prompt=2)
  assert [p.row for p in kept] == [0, 2, 3, 5]
  assert removed == {"duplicate": 1, "max_per_prompt": 2}
  # A row that a filter removes is no first of its kind and takes no place.
  rules = pj.parse_filters("confidence>=1")
  kept, _ = pj.select(pairs, rules, drop_duplicates=True, max_per_prompt=2)
  assert [p.row for p in kept] == [1, 6]
  with pytest.raises(ValueError, match="max_per_prompt=0"):
    pj.select(pairs, max_per_prompt=0)


# --- images ------------------------------------------------------------------------


def picture(height, width, seed=0):
  values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
  return Image.fromarray(values.astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("images")
  picture(256, 256, 1).save(root / "a.png")
  picture(250, 250, 2).save(root / "b.png")
  picture(640, 480, 3).save(root / "tall.png")
  picture(300, 100, 4).save(root / "narrow.png")
  picture(480, 640, 5).save(root / "wide.png")
  rotated = Image.Exif()
  rotated[0x0112] = 6
  picture(480, 640, 6).save(root / "turned.jpg", exif=rotated)
  picture(480, 640, 6).save(root / "turned.png", exif=rotated)
  picture(480, 640, 6).save(root / "turned.webp", exif=rotated)
  (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:-5000])
  (root / "empty.png").write_bytes(b"")
  (root / "text.png").write_text("no image")
  (root / "folder.png").mkdir()
  Image.fromarray(np.zeros((64, 64), np.uint16)).save(root / "deep.png")
  return root


def of(*paths):
  return [pair(10 + i, path1=a, path2=b) for i, (a, b) in enumerate(paths)]


def test_both_images_have_the_size_of_the_pair(root):
  pairs = of(("a.png", "b.png"), ("tall.png", "turned.jpg"), ("tall.png", "tall.png"))
  source = pj.ImagePairs(pairs, root)
  assert len(source) == 3 and "3 pairs" in repr(source)
  sizes = [(256, 256), (1024, 768), (1024, 768)]
  for i, size in enumerate(sizes):
    got = source[i]
    assert got["problem"] is None and got["index"] == i
    assert got["size"] == source.size(i) == size
    for name, path in (("chosen", pairs[i].path1), ("rejected", pairs[i].path2)):
      image = buckets.resize_and_crop(images_lib.open_image(root / path), size)
      assert got[name].dtype == np.uint8 and got[name].shape == (*size, 3)
      np.testing.assert_array_equal(got[name], np.asarray(image))
  np.testing.assert_array_equal(source[0]["chosen"], np.asarray(picture(256, 256, 1)))

  # One size for all, whatever the aspect ratios.
  square = pj.ImagePairs(of(("tall.png", "wide.png")), root, size=(48, 32))
  assert square.size(0) == square[0]["size"] == (48, 32)
  assert square[0]["chosen"].shape == square[0]["rejected"].shape == (48, 32, 3)


@pytest.mark.parametrize("path", ["turned.jpg", "turned.png", "turned.webp", "a.png"])
def test_sizes_from_the_head(root, path):
  image = images_lib.open_image(root / path)
  assert images_lib.image_size(root / path) == (image.height, image.width)


@pytest.mark.parametrize(
  "paths, kind, at, reason",
  [
    (("a.png", "gone.png"), pj.BAD_IMAGE, 1, "gone.png does not exist"),
    (("cut.png", "a.png"), pj.BAD_IMAGE, 0, "cut.png cannot be read"),
    (("empty.png", "gone.png"), pj.BAD_IMAGE, 0, "empty.png cannot be read"),
    (("text.png", "a.png"), pj.BAD_IMAGE, 0, "text.png cannot be read"),
    (("a.png", "folder.png"), pj.BAD_IMAGE, 1, "folder.png cannot be read"),
    (("a.png", "\0.png"), pj.BAD_IMAGE, 1, "cannot be read: .*null"),
    (("a.png", "deep.png"), pj.BAD_IMAGE, 1, "deep.png has mode"),
    (("narrow.png", "a.png"), pj.NO_BUCKET, 0, "300x100 and 256x256"),
    (("a.png", "narrow.png"), pj.NO_BUCKET, 1, "256x256 and 300x100"),
    (("tall.png", "wide.png"), pj.ASPECT_RATIOS, 0, "640x480 and 480x640"),
  ],
)
def test_unusable_pairs_are_marked(root, paths, kind, at, reason):
  source = pj.ImagePairs(of(("a.png", "b.png"), paths), root)
  got = source[1]
  assert got["size"] == (0, 0) and got["chosen"].size == got["rejected"].size == 0
  problem = got["problem"]
  assert (problem.row, problem.kind, problem.path) == (11, kind, paths[at])
  assert reason.split(":")[0] in problem.reason
  head = source.size(1)
  behind_the_head = paths[0] == "cut.png" or paths[1] == "deep.png"
  assert head == ((256, 256) if behind_the_head else problem) or "deep.png" in paths


def test_through_grain(root):
  paths = [("a.png", "b.png"), ("a.png", "gone.png"), ("b.png", "a.png")]
  source = pickle.loads(pickle.dumps(pj.ImagePairs(of(*paths), root)))
  data = grain.MapDataset.source(source).to_iter_dataset(
    grain.ReadOptions(num_threads=3, prefetch_buffer_size=2)
  )
  got = list(data)
  assert [pair["index"] for pair in got] == [0, 1, 2]
  assert [pair["problem"] is None for pair in got] == [True, False, True]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images_never_raise_anything_else(root, tmp_path):
  """Decoders let all kinds of exceptions through; a loader must not fall over them."""
  rng = np.random.default_rng(0)
  exif = Image.Exif()
  exif[0x0112] = 6
  broken = 0
  for kind in ("png", "jpeg", "webp", "tiff", "gif"):
    picture(20, 30).save(tmp_path / f"whole.{kind}", exif=exif)
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    for i in range(60):
      data = bytearray(whole[: rng.integers(1, len(whole))] if i % 3 else whole)
      for place in rng.integers(0, min(len(data), 300), 4):
        data[place] = rng.integers(0, 256)
      (tmp_path / f"damaged.{kind}").write_bytes(data)
      source = pj.ImagePairs(of((f"damaged.{kind}",) * 2), tmp_path, size=(16, 16))
      source.size(0)
      broken += source[0]["problem"] is not None
  assert broken > 100
