"""Scores through the whole production path: model folder, prompts, images, noise."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from lrm_jax import folder as folder_lib
from lrm_jax import score
from lrm_jax.data import buckets
from lrm_jax.data import images as images_lib
from lrm_jax.models import features
from lrm_jax.scorer import Scorer
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPTS = [
  "a girl walking in the street",
  "a photo of a cat",
  "two dogs playing chess, studio light, 35mm",
]
T5_LENGTH = 32
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def convert():
  """convert/torch_to_flax.py's `main`, imported as its command line imports it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "convert")
    import torch_to_flax

    yield torch_to_flax.main


@pytest.fixture(scope="module")
def sd35_folder(tmp_path_factory, convert):
  out = tmp_path_factory.mktemp("models") / "sd35"
  convert(["--sd35", str(helpers.GOLDEN / "dina" / "sd35"), "--out", str(out)])
  return out


@pytest.fixture(scope="module")
def drm_folder(sd35_folder, convert):
  out = sd35_folder.with_name("drm")
  reward = helpers.GOLDEN / "drm" / "model.safetensors"
  convert(["--base", str(sd35_folder), "--reward", str(reward), "--out", str(out)])
  return out


@pytest.fixture(scope="module")
def dina_folder(sd35_folder, convert):
  pytest.importorskip("torch", reason="rm_head.pt is a pickle of torch tensors")
  out = sd35_folder.with_name("dina")
  reward = helpers.GOLDEN / "dina" / "reward"
  convert(["--base", str(sd35_folder), "--reward", str(reward), "--out", str(out)])
  return out


@pytest.fixture(scope="module")
def drm(drm_folder):
  return Scorer.load(drm_folder, t5_length=T5_LENGTH)


@pytest.fixture(scope="module")
def dina(dina_folder):
  return Scorer.load(dina_folder, t5_length=T5_LENGTH)


@pytest.fixture(scope="module")
def want():
  return helpers.golden("dina/expected")


@pytest.fixture(scope="module")
def cond(drm):
  """The three prompts; both reward models share one base."""
  return drm.encode_prompts(PROMPTS)


@pytest.fixture(scope="module")
def latents(want):
  return helpers.nhwc(want["reward/clean_latents"])


def picture(height: int, width: int, seed: int) -> Image.Image:
  values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
  return Image.fromarray(values.astype(np.uint8))


# --- against the golden vectors ----------------------------------------------------


def test_prompt_embeddings(drm, want):
  # Out of order, one twice, and the empty prompt among them.
  cond = drm.encode_prompts([PROMPTS[1], "", PROMPTS[0], PROMPTS[1], PROMPTS[2]])
  rows = [2, 0, 4]
  assert helpers.rel_err(cond.context[jnp.array(rows)], want["prompt_embeds"]) < 1e-4
  assert (
    helpers.rel_err(cond.pooled[jnp.array(rows)], want["pooled_prompt_embeds"]) < 1e-4
  )
  np.testing.assert_array_equal(cond.context[0], cond.context[3])
  assert helpers.rel_err(cond.context[1:2], want["negative_prompt_embeds"]) < 1e-4
  assert helpers.rel_err(cond.pooled[1:2], want["negative_pooled_prompt_embeds"]) < 1e-4


def test_image_latents(drm, want):
  images = helpers.nhwc(want["vae/image"])
  got = drm.encode_images(images)
  assert helpers.rel_err(got, helpers.nhwc(want["vae/latents_scaled"])) < 1e-4
  # A draw deviates from the mean by the posterior's width.
  drawn = drm.encode_images(images, key=KEY)
  std = np.exp(0.5 * helpers.nhwc(want["vae/logvar"])) * 1.5305
  z = (np.asarray(drawn) - np.asarray(got)) / std
  assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
  # Each image has its own draw, whatever is drawn beside it.
  twice = drm.encode_images(images[[0, 0]], key=KEY)
  assert helpers.rel_err(twice[0], drawn[0]) < 1e-5
  assert not np.allclose(twice[1], twice[0])


def test_drm_scores(drm):
  want = helpers.golden("drm/expected")
  x = helpers.nhwc(want["latents"])
  cond = features.Cond(want["encoder_hidden_states"], want["pooled_projections"])
  # Published use: the clean latent at t = 0, for which there is no noise to seed.
  assert helpers.rel_err(drm.score(x, cond), want["score_t0"][:, 0]) < 1e-4
  for key in (k for k in want if k.startswith("score_t")):
    got = drm.score_noisy(x, float(key.removeprefix("score_t")) / 1000, cond)
    assert helpers.rel_err(got, want[key][:, 0]) < 1e-4, key
    np.testing.assert_array_equal(drm.report(got), got)


def test_dina_scores(dina, want, latents, cond):
  noise = helpers.nhwc(want["reward/noise"])
  us = [float(u) for u in want["reward/u"]]
  got = dina.score(latents, cond, u=us, noise=noise)
  assert got.shape == (len(us), 3) and got.dtype == np.float32
  compared = 0
  for key in (k for k in want if k.startswith("reward/score_u")):
    row = us.index(np.float32(key.removeprefix("reward/score_u")))
    assert helpers.rel_err(got[row], want[key][:, 0]) < 1e-4, key
    compared += 1
  assert compared == len(us)
  # The published level for generated latents, and for images.
  generated = dina.score(latents, cond, noise=noise)
  assert helpers.rel_err(generated, want["reward/score_u0.4"][:, 0]) < 1e-4
  image = dina.score(latents, cond, noise=noise, generated=False)
  assert helpers.rel_err(image, want["reward/score_u0.1"][:, 0]) < 1e-4
  np.testing.assert_allclose(dina.report(image), (image + 10) / 10, rtol=1e-6)


def test_dina_ensemble(dina, want, latents, cond):
  noise = helpers.nhwc(want["reward/noise"])
  us = [float(u) for u in want["reward/ensemble_u"]]
  got = dina.ensemble(latents, cond, us, noise=noise)
  assert helpers.rel_err(got, want["reward/ensemble_score"][:, 0]) < 1e-4
  mean = dina.ensemble(latents, cond, us, noise=noise, mode="mean")
  levels = dina.score(latents, cond, u=us, noise=noise)
  np.testing.assert_allclose(mean, levels.mean(axis=0), rtol=1e-5)


def test_where_the_noise_comes_from(dina, latents, cond):
  """The documented draw, in `score` and in `ensemble`."""
  us = [0.2, 0.5, 0.2]

  def draw(u, nth, index):
    key = jax.random.fold_in(jax.random.fold_in(KEY, np.float32(u).view("uint32")), nth)
    return jax.random.normal(jax.random.fold_in(key, index), latents.shape[1:])

  levels = [(0.2, 0), (0.5, 0), (0.2, 1)]
  noise = np.stack([[draw(u, nth, i) for i in range(3)] for u, nth in levels])
  for call in (lambda **kw: dina.score(latents, cond, u=us, **kw),
               lambda **kw: dina.ensemble(latents, cond, us, **kw)):  # fmt: skip
    assert helpers.rel_err(call(key=KEY), call(noise=noise)) < 1e-5


# --- noise, batches, compilation ---------------------------------------------------


def test_noise_belongs_to_key_index_and_level(drm, latents, cond):
  first = drm.score(latents, cond, u=0.5, key=KEY)
  np.testing.assert_array_equal(first, drm.score(latents, cond, u=0.5, key=KEY))
  other = drm.score(latents, cond, u=0.5, key=jax.random.key(6))
  assert np.all(first != other)

  # Neither the other levels nor their order matter; a repeated level is drawn anew.
  several = drm.score(latents, cond, u=[0.2, 0.5, 0.5], key=KEY)
  np.testing.assert_array_equal(several[1], first)
  assert np.all(several[2] != several[1])

  # One prompt for all; equal latents differ by their index only.
  same = np.repeat(latents[:1], 3, axis=0)
  one = jax.tree.map(lambda a: a[:1], cond)
  scores = drm.score(same, one, u=0.5, key=KEY)
  assert len(set(scores.tolist())) == 3
  assert helpers.rel_err(scores[:1], first[:1]) < 1e-5
  shared = drm.score(same, one, u=0.5, key=KEY, indices=[1, 1, 1])
  np.testing.assert_allclose(shared, scores[1], rtol=1e-5)


def test_scores_do_not_depend_on_the_batch(drm, latents, cond):
  many = np.concatenate([latents, latents[::-1], latents[:1]])
  conds = jax.tree.map(lambda a: np.concatenate([a, a[::-1], a[:1]]), cond)
  whole = drm.score(many, conds, u=[0.1, 0.5], key=KEY, batch_size=4)
  single = drm.score(many, conds, u=[0.1, 0.5], key=KEY, batch_size=1)
  assert helpers.rel_err(single, whole) < 1e-5


def test_nothing_is_compiled_twice(drm_folder, latents, cond):
  scorer = Scorer.load(drm_folder, t5_length=T5_LENGTH)
  scorer.score(latents, cond, u=0.5, key=KEY)
  drawn = scorer._noised_jit._cache_size()  # shared by all scorers
  scorer.score(latents, cond, u=[0.25, 0.75], key=jax.random.key(8))
  scorer.score_noisy(latents, 0.3, cond)
  # Seven samples in batches of four, the last one padded.
  many = np.concatenate([latents, latents, latents[:1]])
  scorer.score(many, jax.tree.map(lambda a: a[:1], cond), batch_size=4, u=0.1, key=KEY)
  assert scorer._score_jit._cache_size() == 1
  assert scorer._noised_jit._cache_size() == drawn


def test_bfloat16(drm_folder, drm, latents, cond):
  """Other numerics of the same scores, float32 to the outside."""
  exact = drm.score(latents, cond, u=0.5, key=KEY)
  scorer = Scorer.load(drm_folder, dtype="bfloat16", t5_length=T5_LENGTH)
  rough = scorer.score(latents, cond, u=0.5, key=KEY)
  assert rough.dtype == np.float32
  assert 0 < helpers.rel_err(rough, exact) < 0.1


def test_unrolled_blocks(drm_folder, drm, latents, cond):
  scorer = Scorer.load(drm_folder, scan_blocks=False, t5_length=T5_LENGTH)
  assert helpers.rel_err(scorer.score(latents, cond), drm.score(latents, cond)) < 1e-5


def test_freed_parts_are_read_again(drm):
  before = drm.encode_prompts(PROMPTS)
  drm.free("text", "vae")
  assert drm._text_part is None and drm._vae_part is None
  np.testing.assert_array_equal(drm.encode_prompts(PROMPTS).pooled, before.pooled)
  with pytest.raises(ValueError, match="'reward'.*'text' or 'vae'"):
    drm.free("reward")


# --- incomplete folders ------------------------------------------------------------


def without(folder, out, *names):
  """A copy of a folder's config.json that lacks some components of its base."""
  base = out / "base"
  base.mkdir(parents=True)
  config = folder_lib.read_config(folder)
  source = (folder / config["base"]).resolve()
  for path in source.iterdir():
    if path.name not in {*names, "config.json"}:
      (base / path.name).symlink_to(path)
  held = folder_lib.read_config(source)
  held["components"] = {k: v for k, v in held["components"].items() if k not in names}
  (base / "config.json").write_text(json.dumps(held))
  (out / "reward").symlink_to(folder / "reward")
  (out / "config.json").write_text(json.dumps({**config, "base": str(base)}))
  return out


def test_without_t5_its_tokens_are_zeros(drm_folder, cond, tmp_path):
  folder = without(drm_folder, tmp_path / "no_t5", "t5")
  got = Scorer.load(folder, t5_length=T5_LENGTH).encode_prompts(PROMPTS)
  assert got.context.shape == cond.context.shape
  assert helpers.rel_err(got.context[:, :77], cond.context[:, :77]) < 1e-5
  np.testing.assert_array_equal(got.context[:, 77:], 0)
  assert helpers.rel_err(got.pooled, cond.pooled) < 1e-5


def test_folders_that_lack_something(sd35_folder, drm_folder, tmp_path, latents, cond):
  with pytest.raises(folder_lib.FolderError, match="not a model folder"):
    Scorer.load(tmp_path / "nowhere")
  with pytest.raises(folder_lib.FolderError, match="scoring needs 'reward'"):
    Scorer.load(sd35_folder)
  folder = without(drm_folder, tmp_path / "bare", "vae", "clip_g")
  scorer = Scorer.load(folder, t5_length=T5_LENGTH)
  with pytest.raises(folder_lib.FolderError, match="encoding prompts needs 'clip_g'"):
    scorer.encode_prompts(["a cat"])
  with pytest.raises(folder_lib.FolderError, match="encoding images needs 'vae'"):
    scorer.encode_images([picture(32, 32, 0)])
  with pytest.raises(folder_lib.FolderError, match="encoding images needs 'vae'"):
    scorer.score_images([picture(32, 32, 0)], "a cat", key=KEY)
  assert scorer.score(latents, cond).shape == (3,)  # which needs neither


# --- bad arguments -----------------------------------------------------------------


def test_bad_arguments(drm, drm_folder, latents, cond):
  def bad(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
      call(*args, **kwargs)

  load, score_ = Scorer.load, drm.score
  bad("dtype='float16'", load, drm_folder, dtype="float16")
  bad("'fast'", load, drm_folder, attention_impl="fast")
  bad("t5_length=513", load, drm_folder, t5_length=513)

  for u in (-0.1, 1.1, float("nan"), [0.1, 2.0], []):
    bad("must be a noise level", score_, latents, cond, u=u, key=KEY)
  bad(r"u=\[0.5\].*pass key", score_, latents, cond, u=0.5)
  bad("not both", score_, latents, cond, u=0.5, key=KEY, noise=latents)
  bad(r"shape \(3, 24, 16, 16\)", score_, latents.transpose(0, 2, 1, 3), cond, u=0.5,
      noise=latents)  # fmt: skip
  nchw = helpers.nchw(latents)
  bad(r"\(0, 2, 3, 1\)", score_, nchw, cond)
  bad("have 8 channels, the model needs", score_, latents[..., :8], cond)
  bad("multiples of 2", score_, latents[:, :15], cond)
  bad("must be .batch, height", score_, latents[0], cond)
  one = jax.tree.map(lambda a: a[:1], cond)
  bad("exceeds the position table", score_, np.zeros((1, 64, 64, 16)), one)
  broken = latents.copy()
  broken[1, 0, 0, 0] = np.nan
  bad(r"latents\[1\] holds NaN", score_, broken, cond)
  two = jax.tree.map(lambda a: a[:2], cond)
  bad("2 prompts for 3 latents", score_, latents, two)
  narrow = features.Cond(cond.context[..., :32], cond.pooled)
  bad("the model needs .b, l, 64.", score_, latents, narrow)
  bad("3 non-negative integers", score_, latents, cond, indices=[0, -1, 2])
  bad("batch_size=0", score_, latents, cond, batch_size=0)
  bad("sigma=1.5", drm.score_noisy, latents, 1.5, cond)
  bad("sigma=", drm.score_noisy, latents, np.zeros(2), cond)
  bad("'median'", drm.ensemble, latents, cond, [0.1], key=KEY, mode="median")
  bad("ConvHead: use mode 'mean'", drm.ensemble, latents, cond, [0.1], key=KEY)
  bad("is empty", drm.encode_prompts, [])
  bad("sequence of strings", drm.encode_prompts, "a cat", error=TypeError)

  encode = drm.encode_images
  mixed = [picture(32, 48, 0), picture(32, 32, 1)]
  bad("32x32, 32x48", encode, mixed)
  bad("is empty", encode, [])
  bad("uint8", encode, np.zeros((1, 32, 32, 3), np.uint8))
  bad(r"\[0, 255\]", encode, np.float32([0, 255]).repeat(1536).reshape(1, 32, 32, 3))
  bad("must be .b, height, width, 3.", encode, np.zeros((1, 3, 32, 32), np.float32))

  images = drm.score_images
  bad("2 prompts for 3 images", images, [*mixed, mixed[0]], PROMPTS[:2], key=KEY)
  bad("nothing to score", images, [], "a cat", key=KEY)
  bad("too narrow", images, [picture(3, 90, 0)], "a cat", key=KEY)
  bad("ConvHead", images, mixed, "a cat", ensemble="tokens", key=KEY)


def test_a_score_that_is_not_finite(drm, latents, cond):
  with pytest.raises(FloatingPointError, match="sample 1 is nan"):
    context = np.array(cond.context)
    context[1] = np.nan
    drm.score(latents, features.Cond(context, cond.pooled))


# --- images ------------------------------------------------------------------------


def test_open_image(tmp_path):
  # Rotated by EXIF, transparent, grey, palette.
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned
  picture(20, 30, 0).save(tmp_path / "turned.jpg", exif=exif)
  assert images_lib.open_image(tmp_path / "turned.jpg").size == (20, 30)
  clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
  assert images_lib.open_image(clear).getpixel((0, 0)) == (255, 255, 255)
  assert images_lib.open_image(Image.new("L", (8, 8), 7)).getpixel((0, 0)) == (7, 7, 7)
  array = images_lib.to_array(Image.new("RGB", (1, 1), (0, 255, 51)))
  np.testing.assert_allclose(array, [[[-1, 1, -0.6]]], atol=1e-6)

  with pytest.raises(images_lib.ImageError, match="'I;16'"):
    images_lib.open_image(Image.fromarray(np.zeros((4, 4), np.uint16)))
  with pytest.raises(images_lib.ImageError, match="gone.png does not exist"):
    images_lib.open_image(tmp_path / "gone.png")
  with pytest.raises(images_lib.ImageError, match="cannot be read"):
    images_lib.open_image(tmp_path)


def test_damaged_files_are_image_errors(tmp_path):
  rng = np.random.default_rng(0)
  for kind in ("png", "jpg", "webp", "gif"):
    good = tmp_path / f"good.{kind}"
    picture(16, 16, 0).save(good)
    data = good.read_bytes()
    for n in range(40):
      broken = bytearray(data[: rng.integers(0, len(data))])
      for _ in range(n % 4):
        if broken:
          broken[rng.integers(0, len(broken))] ^= int(rng.integers(1, 256))
      path = tmp_path / f"broken.{kind}"
      path.write_bytes(broken)
      try:
        images_lib.open_image(path)  # some damage is harmless
      except images_lib.ImageError as e:
        assert "broken" in str(e)


def test_images_of_mixed_sizes(drm):
  sizes = [(32, 48), (32, 32), (33, 50), (32, 32), (32, 48)]
  images = [picture(*size, seed) for seed, size in enumerate(sizes)]
  prompts = [*PROMPTS, PROMPTS[0], ""]
  kw = dict(us=[0.0, 0.5], resize=False, key=KEY, batch_size=4)
  got = drm.score_images(images, prompts, ensemble="mean", **kw)
  assert got.raw.shape == (2, 5)
  np.testing.assert_array_equal(got.image, range(5))
  np.testing.assert_array_equal(got.size[2], (32, 48))
  np.testing.assert_allclose(got.ensemble_raw, got.raw.mean(axis=0), rtol=1e-5)

  # The same through the lower interface, size by size.
  images[2] = images[2].crop((1, 0, 49, 32))
  cond = drm.encode_prompts(prompts)
  for of_size in ([0, 2, 4], [1, 3]):
    latents = drm.encode_images([images[i] for i in of_size])
    rows = features.Cond(
      cond.context[np.array(of_size)], cond.pooled[np.array(of_size)]
    )
    one = drm.score(latents, rows, u=[0.0, 0.5], key=KEY, indices=of_size)
    assert helpers.rel_err(one, got.raw[:, of_size]) < 1e-4, of_size

  every = drm.score_images([images[0], images[4]], PROMPTS, all_pairs=True, **kw)
  assert list(zip(every.prompt, every.image, strict=True)) == [
    (p, i) for p in range(3) for i in range(2)
  ]
  assert helpers.rel_err(every.raw[:, 0], got.raw[:, 0]) < 1e-4


def test_images_go_to_buckets(drm, monkeypatch):
  seen = []

  def encode(images, **_):
    seen.append(images.shape)
    return np.zeros((len(images), 16, 16, 16), np.float32)

  monkeypatch.setattr(drm, "encode_images", encode)
  monkeypatch.setattr(drm, "_score_rows", lambda data, us, *_: np.zeros((1, data.num)))
  # The published sizes exceed this small model's position table.
  monkeypatch.setattr(buckets, "BUCKETS", ((80, 80),))
  images = [picture(90, 90, 0), picture(40, 91, 1), picture(70, 70, 2)]
  got = drm.score_images(images, PROMPTS, key=KEY)
  # Height and width multiples of 4, a patch of this small model's pixels.
  assert [s[1:3] for s in seen] == [(80, 80), (40, 88)]
  assert got.size.tolist() == [[80, 80], [40, 88], [80, 80]]


def test_an_image_larger_than_the_position_table(drm):
  with pytest.raises(images_lib.ImageError, match="256x256.*ends at 96"):
    drm.score_images([picture(300, 300, 0)], PROMPTS[:1], key=KEY)


# --- the command line --------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  for name, height, width in (("a", 32, 48), ("b", 33, 48), ("c", 32, 51)):
    picture(height, width, ord(name)).save(folder / f"{name}.png")
  (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
  return folder


def command(folder, *args):
  return [
    *("--model", str(folder), "--no-resize", "--t5-length", str(T5_LENGTH)),
    *map(str, args),
  ]


def test_json_output(drm, drm_folder, files, capsys):
  names = [str(files / f"{n}.png") for n in "abc"]
  args = ["--prompt", "a cat", "--image", *names, "--u", 0, 0.5, "--ensemble", "mean"]
  assert score.main(command(drm_folder, *args, "--json", "--seed", 5)) == 0
  out, err = capsys.readouterr()
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["image"] for row in rows] == names
  assert {row["prompt"] for row in rows} == {"a cat"}
  assert {(row["height"], row["width"]) for row in rows} == {(32, 48)}
  assert [level["u"] for level in rows[0]["scores"]] == [0.0, 0.5]
  assert sorted(row["rank"] for row in rows) == [1, 2, 3]
  best = max(rows, key=lambda row: row["ensemble"]["raw"])
  assert best["rank"] == 1 and best["ensemble"]["mode"] == "mean"
  assert "scored 3 of 3" in err

  want = drm.score_images(names, "a cat", us=[0.0, 0.5], resize=False, key=KEY)
  got = np.array([[level["raw"] for level in row["scores"]] for row in rows])
  assert helpers.rel_err(got.T, want.raw) < 1e-5


def test_table_output(drm_folder, files, capsys):
  prompts = ["a cat " * 12, "a dog", ""]
  args = ["--prompt", *prompts, "--image", *(files / f"{n}.png" for n in "abc")]
  assert score.main(command(drm_folder, *args)) == 0
  header, *lines = capsys.readouterr().out.splitlines()
  assert header.split() == ["image", "prompt", "raw", "u=0", "score", "u=0"]
  assert len(lines) == 3 and "..." in lines[0] and "a dog" in lines[1]
  assert score.main(command(drm_folder, *args, "--all-pairs", "--batch-size", 4)) == 0
  header, *lines = capsys.readouterr().out.splitlines()
  assert header.split()[-1] == "rank" and len(lines) == 9
  assert sorted(line.split()[-1] for line in lines) == list("111222333")


@pytest.mark.parametrize(
  ("images", "extra", "message"),
  [
    (["a.png", "gone.png"], [], "gone.png does not exist"),
    (["a.png", "broken.png"], [], "broken.png cannot be read"),
    (["a.png"], ["--u", "1.5"], "u=.*noise level"),
    (["a.png"], ["--ensemble"], "ConvHead: use mode 'mean'"),
    (["a.png"], ["--batch-size", "0"], "--batch-size 0"),
    (["a.png"], ["--t5-length", "900"], "t5_length=900"),
    (["a.png", "b.png", "c.png"], ["--prompt", "x", "y"], "2 prompts for 3 images"),
    (["a.png"], ["--model", "no/where"], "no/where is not a model folder"),
  ],
)
def test_command_line_errors(drm_folder, files, capsys, images, extra, message):
  args = ["--prompt", "a cat", "--image", *(files / name for name in images), *extra]
  assert score.main(command(drm_folder, *args)) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert re.search(f"^error: .*{message}", err, re.MULTILINE), err


def test_exit_code_of_the_process(files):
  done = subprocess.run(
    [sys.executable, "-m", "lrm_jax.score", "--model", "x", "--prompt", "a", "--image"]
    + [str(files / "broken.png")],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: image ") and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", ["scoring.md", "python.md"])
def test_the_example_in_the_documentation(
  page, dina_folder, tmp_path, monkeypatch, capsys
):
  (tmp_path / "models").mkdir()
  (tmp_path / "models" / "dina").symlink_to(dina_folder)
  for name in "ab":
    picture(32, 80, ord(name)).save(tmp_path / f"{name}.png")
  monkeypatch.chdir(tmp_path)
  text = (ROOT / "docs" / page).read_text()
  (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  exec(compile(example, page, "exec"), {})
  assert capsys.readouterr().out
  shutil.rmtree(tmp_path / "models")
