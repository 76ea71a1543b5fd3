"""Precomputed latents are right, whatever is killed, shared or broken on the way."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from flax import nnx
import numpy as np
from PIL import Image
import precompute_latents
import pytest

from lrm_jax import build, weights
from lrm_jax import folder as folder_lib
from lrm_jax.data import buckets, parquet, tfds_pairs
from lrm_jax.data import images as images_lib
from lrm_jax.models import reward, vae
from lrm_jax.scorer import Scorer
from tests import golden_models

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = vae.VAEConfig((4, 4, 8, 8), 1, 16, norm_num_groups=4)
NUM = 30
BAD = (4, 17)  # rows with an unusable image
SHAPE = (6, 4, 16)  # of the latents with SIZE
SIZE = ("--size", "48x32")


def save_model(folder, seed=0):
  model = golden_models.random_model(lambda: vae.VAE(CONFIG, rngs=nnx.Rngs(0)), seed)
  folder.mkdir()
  folder_lib.save_params(folder / "vae", weights.flatten(model.params))
  entry = {"config": build.config_to_dict(CONFIG)}
  folder_lib.write_config(folder, {"components": {"vae": entry}})


def save_picture(path, height, width, seed):
  values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
  Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A model, a JSON file and its images, in one folder."""
  data = tmp_path_factory.mktemp("data")
  save_model(data / "model")
  (data / "images").mkdir()
  rows = []
  for i in range(NUM):
    names = [f"{i}a.png", f"{i}b.png"]
    for j, name in enumerate(names):
      save_picture(data / "images" / name, 40 + i, 64 - i, 2 * i + j)
    row = dict(prompt=f"prompt {i % 7}", path1=names[0], path2=names[1])
    if i % 3:
      row |= dict(confidence=i / NUM, choice_dist=[i, 1], model1="x", model2="y")
    rows.append(row)
  (data / "images" / "4b.png").unlink()
  whole = (data / "images" / "17a.png").read_bytes()
  (data / "images" / "17a.png").write_bytes(whole[:-2000])
  (data / "train.json").write_text(json.dumps(rows))
  return data


def arguments(data, out, *more):
  args = ["--model", data / "model", "--json", data / "train.json"]
  args += ["--images", data / "images", "--out", out, "--rows-per-part", 8]
  return [str(arg) for arg in (*args, "--rows-per-group", 4, *more)]


def run(data, out, *more):
  precompute_latents.main(arguments(data, out, *more))
  return out


@pytest.fixture(scope="module")
def whole(data):
  """What one undisturbed run makes."""
  return run(data, data / "whole", *SIZE)


def contents(folder):
  """Name -> bytes of everything but hidden files."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and not path.name.startswith(".")
  }


def hidden(folder):
  return [p.name for p in folder.rglob(".*partial*")]


def scorer(folder):
  """One that can only encode images."""
  model, scoring = build.load_vae(folder), reward.ScoringConfig.drm()
  return Scorer(folder, model, scoring, sigma_table=None, dtype="float32", t5_length=1)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8])
def test_batches_fit_the_devices(num_devices):
  for size in ((256, 256), (512, 512), (1472, 832), (4096, 4096)):
    for batch_size in (1, 2, 3, 8):
      pairs = precompute_latents.pairs_per_batch(size, batch_size, num_devices)
      per_device, left = divmod(2 * pairs, num_devices)
      assert not left and per_device <= max(batch_size, 2)
      assert per_device <= 2 or per_device * size[0] * size[1] <= 1 << 22


# --- what is written ---------------------------------------------------------------


def test_latents_are_the_scorers(data, whole):
  source = parquet.ParquetPairs(whole)
  assert len(source) == NUM - len(BAD) and source.latent_shapes == (SHAPE,)
  good = [i for i in range(NUM) if i not in BAD]
  prepared = [
    buckets.resize_and_crop(
      images_lib.open_image(data / "images" / f"{i}{side}.png"), (48, 32)
    )
    for side in "ab"
    for i in good
  ]
  latents = np.asarray(scorer(data / "model").encode_images(prepared))
  for n, (i, record) in enumerate(zip(good, source.records(), strict=True)):
    for name, j in (("chosen", n), ("rejected", n + len(good))):
      np.testing.assert_allclose(record[name], latents[j], rtol=1e-5, atol=1e-5)
    assert record["prompt"] == f"prompt {i % 7}"
    assert record["image1_path"] == f"{i}a.png"
    assert record["image2_path"] == f"{i}b.png"
    details = record["detailed_results"]
    if i % 3:
      assert json.loads(details) == {"confidence": i / NUM, "choice_dist": [i, 1]}
      assert (record["model1"], record["model2"]) == ("x", "y")
    else:
      assert details == record["model1"] == ""
  assert not np.allclose(latents[0], latents[1])


def test_the_report(whole):
  report = json.loads((whole / "report.json").read_text())
  assert report == {
    "read": NUM,
    "bad_rows": [],
    "removed": {},
    "selected": NUM,
    "dropped": {"no bucket": 0, "aspect ratios differ": 0},
    "bad_images": 2,
    "encoded": NUM - 2,
    "by_size": {"48x32": NUM - 2},
  }
  with open(whole / "bad_images.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert [(line["row"], line["path"]) for line in lines] == [
    ("4", "4b.png"), ("17", "17a.png"),
  ]  # fmt: skip
  assert "does not exist" in lines[0]["reason"]
  assert "cannot be read" in lines[1]["reason"]
  parts = sorted(path.name for path in whole.glob("*.parquet"))
  assert parts == [f"part-0000{i}.parquet" for i in range(4)]


def test_each_pair_in_its_bucket(data, tmp_path, capsys, monkeypatch):
  small = ((32, 32), (64, 64), (128, 96), (96, 128), (96, 64))
  monkeypatch.setattr(buckets, "BUCKETS", small)
  sizes = [
    ((33, 33), (30, 30)),
    ((120, 90), (16, 12)),
    ((100, 33), (32, 32)),
    ((30, 30), (70, 70)),
    ((64, 48), (48, 64)),
    ((90, 60), (96, 64)),
    ((32, 32), (32, 32)),
  ]
  rows = []
  for i, pair in enumerate(sizes):
    for j, size in enumerate(pair):
      save_picture(tmp_path / f"{i}{j}.png", *size, seed=i)
    rows.append(dict(prompt="p", path1=f"{i}0.png", path2=f"{i}1.png"))
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  more = ["--json", tmp_path / "rows.json", "--images", tmp_path, "--batch-size", 1]
  out = run(data, tmp_path / "out", *more)
  source = parquet.ParquetPairs(out)
  # Sorted by size, then as in the file.
  paths = [record["image1_path"] for record in source.records()]
  assert paths == ["00.png", "30.png", "60.png", "50.png", "10.png"]
  got = [source.latent_shapes[b] for b in source.bucket]
  assert got == [(4, 4, 16)] * 3 + [(12, 8, 16), (16, 12, 16)]
  report = json.loads((out / "report.json").read_text())
  assert report["dropped"] == {"no bucket": 1, "aspect ratios differ": 1}
  assert report["by_size"] == {"32x32": 3, "96x64": 1, "128x96": 1}
  printed = capsys.readouterr().out
  assert "encoded pairs                            5" in printed
  assert "32x32                                  3" in printed


def test_filters_duplicates_and_bad_rows(data, tmp_path):
  rows = json.loads((data / "train.json").read_text())
  lines = [json.dumps(row) for row in (*rows, rows[8])]
  lines[2] = '{"prompt": "no images"}'
  (tmp_path / "rows.jsonl").write_text("\n".join(lines))
  more = [*SIZE, "--json", tmp_path / "rows.jsonl", "--filter", "confidence>=0.1"]
  with pytest.raises(SystemExit, match="row 2 .counted from 0.: path1 is missing"):
    run(data, tmp_path / "out", *more)
  assert not (tmp_path / "out").exists()
  more += ["--skip-bad", "--drop-duplicates", "--max-per-prompt", 1]
  report = run(data, tmp_path / "out", *more) / "report.json"
  report = json.loads(report.read_text())
  assert [problem["row"] for problem in report["bad_rows"]] == [2]
  assert report["read"] == NUM + 1 and report["selected"] == 7
  assert report["removed"] == {
    "confidence>=0.1": 1,  # row 1; row 2 is bad
    "no confidence": 10,
    "duplicate": 1,
    "max_per_prompt": 11,
  }


def test_draws_from_the_posterior(data, whole, tmp_path):
  sample = ["--posterior", "sample", *SIZE]
  first = parquet.ParquetPairs(run(data, tmp_path / "a", *sample))
  # The draw belongs to the image, not to its place.
  rows = ["--rows-per-part", 30, "--batch-size", 3]
  again = parquet.ParquetPairs(run(data, tmp_path / "b", *sample, *rows))
  other = parquet.ParquetPairs(run(data, tmp_path / "c", *sample, "--seed", 1))
  mean = parquet.ParquetPairs(whole)
  for i in range(len(mean)):
    np.testing.assert_allclose(first[i]["chosen"], again[i]["chosen"], atol=1e-4)
    for source in (other, mean):
      assert np.abs(first[i]["rejected"] - source[i]["rejected"]).mean() > 0.01
  noise = [first[0][name] - mean[0][name] for name in ("chosen", "rejected")]
  assert np.abs(noise[0] - noise[1]).mean() > 0.01


def test_as_a_tfds_dataset(data, whole, tmp_path, capsys):
  out = tmp_path / "set"
  args = ["--format", "tfds", "--split", "held_out", *SIZE]
  run(data, out, *args)
  assert contents(tmp_path / "set.parts") == contents(whole)
  found, want = tfds_pairs.TfdsPairs(out, "held_out"), parquet.ParquetPairs(whole)
  assert len(found) == len(want)
  for a, b in zip(found.records(), want.records(), strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  # Done is done, and what is something else is not replaced.
  before = contents(out)
  run(data, out, *args)
  assert contents(out) == before
  shutil.rmtree(tmp_path / "set.parts")
  with pytest.raises(SystemExit, match="set exists: choose another --out"):
    run(data, out, *args)


# --- shared, interrupted, continued ------------------------------------------------


def test_hosts_make_the_same_files(data, whole, tmp_path, capsys):
  for host in (2, 0, 1):
    assert not (tmp_path / "report.json").exists()
    run(data, tmp_path, *SIZE, "--host-count", 3, "--host-index", host)
  printed = capsys.readouterr().out
  assert "3 of 4 parts are other hosts' to make" in printed
  assert contents(tmp_path) == contents(whole)


@pytest.fixture
def stuck(data, tmp_path):
  """A run that has made two parts and waits for an image of the third; and its --out.

  The image is a pipe: reading it takes until something is written.
  """
  images, out = tmp_path / "images", tmp_path / "out"
  images.mkdir()
  for path in (data / "images").iterdir():
    if path.name != "20a.png":
      (images / path.name).symlink_to(path)
  os.mkfifo(images / "20a.png")
  script = str(ROOT / "convert" / "precompute_latents.py")
  process = subprocess.Popen(
    [sys.executable, script, *arguments(data, out, *SIZE, "--images", images)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  while not (out / "chunks" / "00001.json").exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  yield process, out
  process.kill()
  process.communicate()


def test_killed_and_continued(data, whole, stuck):
  """SIGKILL leaves no half part; what is there is kept, the rest is made."""
  process, out = stuck
  process.kill()
  process.communicate()
  parts = sorted(out.glob("*.parquet"))
  assert [path.name for path in parts] == ["part-00000.parquet", "part-00001.parquet"]
  assert not (out / "report.json").exists() and not (out / parquet.INDEX).exists()
  made = parts[0].stat().st_mtime_ns
  # As if killed while a part was written, and before the note on another was.
  (out / ".part-00002.parquet.partial-1").write_text("half")
  (out / "chunks" / "00001.json").unlink()
  run(data, out, *SIZE)
  assert contents(out) == contents(whole)
  assert parts[0].stat().st_mtime_ns == made
  assert not hidden(out)


def test_sigterm(data, whole, stuck):
  process, out = stuck
  process.send_signal(signal.SIGTERM)
  time.sleep(0.1)
  os.close(os.open(out.parent / "images" / "20a.png", os.O_WRONLY))  # no image at all
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 143, stderr
  assert "Traceback" not in stderr
  assert not hidden(out)
  run(data, out, *SIZE)
  assert contents(out) == contents(whole)


def test_what_is_lost_is_made_again(data, whole, tmp_path):
  out = tmp_path / "out"
  shutil.copytree(whole, out)
  (out / "part-00002.parquet").unlink()
  (out / "report.json").unlink()
  (out / "bucket_index.csv").unlink()
  run(data, out, *SIZE)
  assert contents(out) == contents(whole)
  (out / "chunks" / "00003.json").write_text("{")
  with pytest.raises(SystemExit, match="00003.json is damaged.*Delete it"):
    run(data, out, *SIZE)


def test_bad_images_are_tried_again_on_request(data, whole, tmp_path):
  images, out = tmp_path / "images", tmp_path / "out"
  shutil.copytree(data / "images", images)
  shutil.copytree(whole, out)
  save_picture(images / "4b.png", 50, 60, 0)
  args = [*SIZE, "--images", images]
  run(data, out, *args)
  assert contents(out) == contents(whole)
  run(data, out, *args, "--retry-bad")
  source = parquet.ParquetPairs(out)
  assert len(source) == NUM - 1
  assert [r["image1_path"] for r in source.records()][4] == "4a.png"
  assert json.loads((out / "report.json").read_text())["bad_images"] == 1
  assert "4b.png" not in (out / "bad_images.csv").read_text()


# --- errors ------------------------------------------------------------------------


def test_other_settings_are_refused(data, whole, tmp_path):
  def refused(match, *args):
    before = contents(whole)
    with pytest.raises(SystemExit, match=f"error: .*{match}.*another --out"):
      run(data, whole, *SIZE, *args)
    assert contents(whole) == before

  refused("size '48x32', not '32x48'", "--size", "32x48")
  refused("filter '', not 'votes>=3'; rows 30, not ", "--filter", "votes >= 3")
  refused("posterior 'mean', not 'sample'", "--posterior", "sample")
  refused("rows_per_part 8, not 9", "--rows-per-part", 9)
  save_model(tmp_path / "model", seed=1)
  refused("vae 'sha256:", "--model", tmp_path / "model")
  rows = json.loads((data / "train.json").read_text())
  rows[0]["prompt"] = "another"
  (tmp_path / "train.json").write_text(json.dumps(rows))
  refused("json 'sha256:", "--json", tmp_path / "train.json")


def test_unusable_input(data, tmp_path, capsys):
  def refused(match, *args, out="out"):
    with pytest.raises(SystemExit) as caught:
      run(data, tmp_path / out, *SIZE, *args)
    message = str(caught.value) + capsys.readouterr().err
    assert match in message, message

  refused("no folder", "--images", tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  refused("none of 30 pairs", "--images", tmp_path / "empty")
  refused("no row is left of 30", "--filter", "confidence>1")
  refused("is not understood", "--filter", "confidence=1")
  refused("is not HEIGHTxWIDTH", "--size", "512")
  refused("is not HEIGHTxWIDTH", "--size", "0x512")
  refused("multiples of 16", "--size", "40x48")
  refused("--host-index 2 must lie in 0..1", "--host-index", 2, "--host-count", 2)
  refused("--num-workers 0 must be 1 or more", "--num-workers", 0)
  refused("max_per_prompt=0", "--max-per-prompt", 0)
  refused("does not exist", "--json", tmp_path / "no.json")
  refused("not a model folder", "--model", tmp_path)
  assert not (tmp_path / "out").exists()

  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "mine.parquet").write_text("")
  refused("holds mine.parquet, but no precompute.json", out="taken")


def test_all_images_damaged(data, tmp_path):
  """Heads that promise images: only decoding shows that there are none."""
  images = tmp_path / "images"
  images.mkdir()
  for path in (data / "images").iterdir():
    (images / path.name).write_bytes(path.read_bytes()[:600])
  args = [*SIZE, "--images", images]
  with pytest.raises(SystemExit, match="none of 30 pairs can be used.*--retry-bad"):
    run(data, tmp_path / "out", *args)
  assert not list((tmp_path / "out").glob("*.parquet"))
  assert len((tmp_path / "out" / "bad_images.csv").read_text().splitlines()) == 1 + NUM
  run(data, tmp_path / "out", *SIZE, "--retry-bad")
  assert len(parquet.ParquetPairs(tmp_path / "out")) == NUM - 2


def test_a_head_that_is_wrong(data, tmp_path, monkeypatch):
  """Sizes are planned by the heads; a pair that turns out different is left out."""
  monkeypatch.setattr(buckets, "BUCKETS", ((32, 32), (64, 64)))
  rows = []
  for i in range(2):
    for side in "ab":
      save_picture(tmp_path / f"{i}{side}.png", 64, 64, i)
    rows.append(dict(prompt="p", path1=f"{i}a.png", path2=f"{i}b.png"))
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  right = images_lib.image_size
  wrong = lambda path: (32, 32) if path.name == "0a.png" else right(path)  # noqa: E731
  monkeypatch.setattr(images_lib, "image_size", wrong)
  more = ["--json", tmp_path / "rows.json", "--images", tmp_path]
  out = run(data, tmp_path / "out", *more)
  source = parquet.ParquetPairs(out)
  assert [record["image1_path"] for record in source.records()] == ["1a.png"]
  assert "(32, 32) by the heads" in (out / "bad_images.csv").read_text()
