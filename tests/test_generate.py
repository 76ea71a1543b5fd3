"""The command line that makes images: what it writes, continues, and refuses."""

import io
import json
import re
import runpy
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from lrm_jax import explore, generate, pipeline, sheets
from tests import generating

LONG = "a photo of a cat " + "and a dog " * 40
PROMPTS = ["ein Hühnchen, 漢字", LONG.strip()]
PER_PROMPT = 2
SETTINGS = pipeline.Settings(
  num_steps=3,
  guidance_scale=3.0,
  height=32,
  width=48,
  explore=explore.Explore(candidates=3),
)
ARGS = ["--t5-length", "16", "--steps", "3", "--height", "32", "--width", "48"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return generating.Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loaded():
  """Pipelines by what they were loaded with: loading and compiling takes seconds."""
  return {}


@pytest.fixture(autouse=True)
def load_once(loaded, monkeypatch):
  load = pipeline.Pipeline.load

  def cached(folder, **kw):
    key = repr((folder, kw))
    if key not in loaded:
      loaded[key] = load(folder, **kw)
    return loaded[key]

  monkeypatch.setattr(pipeline.Pipeline, "load", cached)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
  path.write_text("\n\n".join(PROMPTS) + "\r\n   \n", encoding="utf-8-sig")
  return path


def command(folders, out, *args, reward=("head",)) -> list[str]:
  given = ["--model", folders.sd35, "--out", out, *ARGS, *args]
  if reward:
    given += ["--reward", *(getattr(folders, name) for name in reward)]
  return [str(arg) for arg in given]


def lines(out) -> list[dict]:
  content = (out / "scores.jsonl").read_text(encoding="utf-8")
  return [json.loads(line) for line in content.splitlines()]


def files(out) -> dict[str, bytes]:
  return {
    str(path.relative_to(out)): path.read_bytes()
    for path in sorted(out.rglob("*"))
    if path.is_file()
  }


@pytest.fixture
def whole(folders, prompts_file, tmp_path):
  """Arguments of a run of four images that are steered by a reward."""

  def args(out=tmp_path / "out", *more):
    return command(
      folders,
      out,
      *("--prompts-file", prompts_file, "--images-per-prompt", PER_PROMPT),
      *("--candidates", 3, "--guidance", 3, "--seed", 7, "--save-latents", *more),
    )

  return args


def test_what_is_written(folders, loaded, whole, tmp_path, capfd):
  assert generate.main(whole()) == 0
  out = tmp_path / "out"
  stdout, stderr = capfd.readouterr()
  assert f"wrote 4 image(s) to {out}" in stdout and "head: mean" in stdout
  # Each encoder's warning is one line that says what is lost.
  warned = re.findall(
    r"warning: (clip_l|clip_g|t5) keeps \d+ of .* lost is '.*'", stderr
  )
  assert warned == ["clip_l", "clip_g", "t5"] and "Warning" not in stderr
  assert "head shares prefix" in stderr and "3/3" in stderr

  names = [f"{i:05d}" for i in range(4)]
  assert set(files(out)) == {
    *("run.json", "scores.jsonl", "contact_sheet.png"),
    *(f"images/{name}.png" for name in names),
    *(f"latents/{name}.npy" for name in names),
  }
  run = json.loads((out / "run.json").read_text())
  assert run["extra"]["prompts"] == PROMPTS
  assert run["config"]["settings"]["explore"]["candidates"] == 3
  assert run["config"]["settings"]["sampler"] == "sde"

  # What is said of the images is what the pipeline makes of their seeds, alone.
  (pipe,) = loaded.values()
  for i, line in enumerate(lines(out)):
    assert (line["index"], line["image"]) == (i, f"images/{names[i]}.png")
    assert line["prompt"] == PROMPTS[i // PER_PROMPT] and line["seed"] == 7 + i
    with Image.open(out / line["image"]) as image:
      text, pixels = image.text, np.asarray(image)
    assert pixels.shape == (32, 48, 3)
    assert text["prompt"] == line["prompt"] and text["seed"] == str(7 + i)
    assert (text["steps"], text["guidance"], text["sampler"]) == ("3", "3.0", "sde")
    assert text["model"] == str(folders.sd35) and text["negative_prompt"] == ""
    assert json.loads(text["rewards"]) == {"head": str(folders.head)}
    assert json.loads(text["scores"]) == line["scores"]
    assert json.loads(text["versions"])["jax"] == jax.__version__
    assert text["settings"] == line["settings"] == run["extra"]["settings"]
    assert [s["step"] for s in line["steering"]] == [0, 1, 2]
    assert line["steering"][-1]["sigma"] == 0
    assert line["bad"] == {"candidates": 0, "steps": 0} and line["best_of"] is None
    if i < PER_PROMPT:
      made = pipe.generate([line["prompt"]], SETTINGS, seed=line["seed"])
      assert np.abs(pixels.astype(int) - made.images[0]).max() <= 1
      latents = np.load(out / "latents" / f"{names[i]}.npy")
      np.testing.assert_allclose(latents, made.latents[0], rtol=1e-3, atol=1e-3)
      score = line["scores"]["head"]
      np.testing.assert_allclose(score["raw"], made.raw["head"][0], rtol=1e-3)
      np.testing.assert_allclose(score["reported"], made.reported["head"][0], rtol=1e-3)
  with Image.open(out / "contact_sheet.png") as sheet:
    width = sheets.LABEL_WIDTH + 2 * (sheets.THUMBNAIL + sheets.MARGIN)
    assert sheet.width == width and sheet.getextrema()[0][0] < 50


def test_a_killed_run_continues(whole, tmp_path, capfd, monkeypatch):
  """The same files in the end, whatever of them a killed run lacks."""
  out = tmp_path / "out"
  assert generate.main(whole()) == 0
  want = files(out)
  text = (out / "scores.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
  # One image without a file, one without its latents, the last line half written.
  (out / "images" / "00001.png").unlink()
  (out / "latents" / "00002.npy").unlink()
  (out / "contact_sheet.png").unlink()
  (out / "scores.jsonl").write_text("".join(text)[:-40], encoding="utf-8")
  capfd.readouterr()
  assert generate.main(whole()) == 0
  stdout, stderr = capfd.readouterr()
  assert "wrote 3 image(s)" in stdout and "1 of 4 image(s) are there" in stderr
  got = files(out)
  assert got.keys() == want.keys()
  for name in ("run.json", "images/00000.png"):
    assert got[name] == want[name]
  for i in range(4):
    assert_same_image(got, want, f"images/{i:05d}.png")
  assert [line["index"] for line in lines(out)] == [0, 1, 2, 3]

  # An image of other settings under an expected name is not taken for ours.
  Image.new("RGB", (48, 32)).save(out / "images" / "00003.png")
  assert generate.main(whole()) == 0
  assert "wrote 1 image(s)" in capfd.readouterr().out
  assert_same_image(files(out), want, "images/00003.png")

  # With nothing left to make, nothing is loaded.
  monkeypatch.delattr(pipeline.Pipeline, "load")
  (out / "contact_sheet.png").unlink()
  assert generate.main(whole()) == 0
  assert (out / "contact_sheet.png").exists()


def assert_same_image(got, want, name):
  """Pixels within a grey level."""
  a, b = (np.asarray(Image.open(io.BytesIO(f[name]))).astype(int) for f in (got, want))
  assert np.abs(a - b).max() <= 1, name


def test_another_run_s_folder(whole, tmp_path, capfd):
  out = tmp_path / "out"
  assert generate.main(whole()) == 0
  (out / "mine.txt").write_text("kept")
  before = files(out)
  assert generate.main(whole(out, "--guidance", "4", "--negative-prompt", "x")) == 2
  error = capfd.readouterr().err
  assert (
    "holds a run with other settings; choose another --out, or pass --force" in error
  )
  assert "settings.guidance_scale: 3.0 then, 4.0 now" in error
  assert "settings.negative_prompt:  then, x now" in error
  assert files(out) == before
  assert generate.main(whole(out, "--guidance", "4", "--force")) == 0
  after = files(out)
  assert after.keys() == before.keys() and after["mine.txt"] == b"kept"
  changed = {name for name in after if after[name] != before[name]}
  assert changed == set(after) - {"mine.txt"}

  with (out / "scores.jsonl").open("a") as file:
    file.write("{}\n")
  assert generate.main(whole(out, "--guidance", "4")) == 2
  assert "scores.jsonl: line 5 is damaged" in capfd.readouterr().err


def test_best_of_and_no_reward(folders, tmp_path, capfd):
  args = command(
    folders, tmp_path / "b", "--prompt", "a", "--best-of", 2, "--guidance", 3
  )
  assert generate.main(args) == 0
  (line,) = lines(tmp_path / "b")
  assert line["steering"] == [] and len(line["best_of"]["scores"]) == 2
  best = max(line["best_of"]["scores"])
  assert line["best_of"]["scores"].index(best) == line["best_of"]["chosen"]
  np.testing.assert_allclose(best, line["scores"]["head"]["raw"], rtol=1e-6)

  args = command(folders, tmp_path / "n", "--prompt", "", "--guidance", 1, reward=())
  assert generate.main(args) == 0
  (line,) = lines(tmp_path / "n")
  assert (line["prompt"], line["scores"]) == ("", {})
  with Image.open(tmp_path / "n" / line["image"]) as image:
    assert image.text["sampler"] == "euler"  # the default where nothing explores


def test_scores_that_are_no_numbers(folders, loaded, tmp_path, capfd, monkeypatch):
  """The image is written, its scores are null, and somebody is told."""

  def hopeless(cond, x, sigma):
    return jnp.where(sigma == 0, jnp.nan, jnp.where(x[:, 0, 0, 0] > 0, 1, jnp.nan))

  load = pipeline.Pipeline.load
  monkeypatch.setattr(
    pipeline.Pipeline,
    "load",
    lambda folder, **kw: load(
      folder, **kw | {"weights": None, "reward_fn": hopeless, "rewards": {}}
    ),
  )
  args = command(folders, tmp_path / "out", "--prompt", "a", "b", "--candidates", 2)
  assert generate.main([*args, "--guidance", "3"]) == 0
  _, stderr = capfd.readouterr()
  for line in lines(tmp_path / "out"):
    assert line["scores"] == {"reward_fn": {"raw": None, "reported": None}}
    bad = line["bad"]
    assert bad["candidates"] >= 2 and bad["steps"] >= 1
    assert line["steering"][-1]["score"] is None
    said = f"{bad['candidates']} candidate(s) in {bad['steps']} step(s)"
    (warning,) = (w for w in stderr.splitlines() if f"{line['image']}: " in w)
    assert "its score by reward_fn is not finite" in warning and said in warning
    assert (tmp_path / "out" / line["image"]).exists()


# --- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "no prompts: pass --prompt or --prompts-file"),
    (["--prompts-file", "BLANK"], "holds no prompts: every line is blank"),
    (["--prompts-file", "LATIN"], r"not valid UTF-8 \(byte 1\)"),
    (["--prompts-file", "gone.txt"], "prompts file gone.txt cannot be read: No such"),
    (["--prompt", "a\udce4"], "not valid UTF-8"),
    (["--prompt", "a", "--images-per-prompt", "0"], "--images-per-prompt 0 must be"),
    (["--prompt", "a", "--reward", "x/y", "x/y"], "--reward x/y is given twice"),
    (["--prompt", "a", "--reward-weights", "1", "2"], r"gives 2 number\(s\) for 1"),
    (["--prompt", "a", "--reward-weights", "nan"], "weight nan of the reward"),
    (["--prompt", "a", "--reward", "no/where"], "no/where is not a model folder"),
    (["--prompt", "a", "--model", "no/where"], "no/where is not a model folder"),
    (["--prompt", "a", "--candidates", "0"], "candidates=0 must be >= 1"),
    (["--prompt", "a", "--candidates", "4", "--chunk", "3"], "chunk=3 must divide"),
    (["--prompt", "a", "--sampler", "euler", "--beam", "2"], "need a sampler that"),
    (["--prompt", "a", "--height", "30"], "height=30 must be a positive multiple"),
    (["--prompt", "a", "--sde-window", "0:4"], "has no effect on the sampler 'euler'"),
    (
      ["--prompt", "a", "--candidates", "2", "--explore-window", "0:4"],
      "exploring window 0:4 is outside the schedule of 3 steps",
    ),
    (["--prompt", "a", "--t5-length", "600"], "t5_length=600 is not in"),
    (["--prompt", "a", "--batch-size", "3"], "batch_size=3 .* number of devices, 8"),
    (["--prompt", "a", "--seed", "-1"], "seeds -1..-1 are not in"),
    (["--prompt", "a", "--out", "FILE"], "writing .*file failed: File exists"),
    (["--prompt", "a", "--out", "FILE/out"], "writing .*out failed: Not a directory"),
    (["--prompt", "a", "--out", "FULL"], "is not empty and holds no run.json"),
  ],
)
def test_errors(folders, tmp_path, monkeypatch, capfd, args, message):
  """One line, before any weights are read or anything is written."""
  monkeypatch.delattr(pipeline.Pipeline, "load")
  (tmp_path / "blank.txt").write_text("\n  \n")
  (tmp_path / "latin.txt").write_bytes("fünf".encode("latin-1"))
  (tmp_path / "file").write_text("")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "other.txt").write_text("")
  places = {
    "BLANK": tmp_path / "blank.txt",
    "LATIN": tmp_path / "latin.txt",
    "FILE": tmp_path / "file",
    "FILE/out": tmp_path / "file" / "out",
    "FULL": tmp_path / "full",
  }
  args = [places.get(arg, arg) for arg in args]
  reward = () if "--reward" in args else ("head",)
  assert generate.main(command(folders, tmp_path / "out", *args, reward=reward)) == 2
  stdout, stderr = capfd.readouterr()
  assert stdout == ""
  assert re.search(f"^error: .*{message}", stderr, re.MULTILINE), stderr
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("window", ["3", "a:b", ":2"])
def test_windows_that_are_none(window, capsys):
  with pytest.raises(SystemExit) as e:
    generate.main(["--model", "m", "--out", "o", "--sde-window", window])
  assert e.value.code == 2
  assert "is not of the form A:B" in capsys.readouterr().err


def test_a_full_disk_is_one_error(folders, tmp_path, capfd):
  """A folder where the file is to be drafted stands in for it."""
  out = tmp_path / "out"
  (out / "images" / ".00000.png.partial").mkdir(parents=True)
  args = command(folders, out, "--prompt", "a", "--guidance", 3, "--candidates", 3)
  assert generate.main([*args, "--force"]) == 2
  error = capfd.readouterr().err.splitlines()[-1]
  assert error.startswith(f"error: writing {out}/images/00000.png failed: ")
  # What the next run finds is no image.
  (out / "images" / ".00000.png.partial").rmdir()
  assert generate.main(args) == 0
  assert len(lines(out)) == 1


def test_exit_code_of_the_process(tmp_path, monkeypatch, capsys):
  args = ["generate", "--model", "x", "--out", str(tmp_path / "out")]
  monkeypatch.setattr(sys, "argv", args)
  with pytest.raises(SystemExit) as e, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the module is imported already
    runpy.run_module("lrm_jax.generate", run_name="__main__")
  assert e.value.code == 2
  out, err = capsys.readouterr()
  assert (out, err) == ("", "error: no prompts: pass --prompt or --prompts-file\n")


# --- pieces ------------------------------------------------------------------------


def test_names_of_rewards():
  names = generate.name_rewards(["a/dina/", "b/drm", "c/drm", "d/generator"])
  assert names == {
    "dina": "a/dina/",
    "b/drm": "b/drm",
    "c/drm": "c/drm",
    "d/generator": "d/generator",
  }


def test_contact_sheets_of_many_images(tmp_path):
  """Lines of at most eight images, sheets of at most 24 lines."""
  Image.new("RGB", (20, 40), "blue").save(tmp_path / "a.png")
  line = {"image": "a.png", "prompt": "x " * 500, "seed": 3, "scores": {}}
  scored = line | {
    "scores": {"a": {"reported": 0.5}, "b": {"reported": None}},
  }
  rows = [[line] * 10, *([[scored] * 2] * 30)]
  first, second = generate.contact_sheets(tmp_path, rows)
  assert first.width == second.width and first.height > second.height
  assert generate._caption(scored) == "0.500 / not finite"
  assert generate._caption(line) == "seed 3"
  step = (first.width - sheets.LABEL_WIDTH) // 8
  top = sheets.MARGIN
  blue = [
    first.getpixel((sheets.LABEL_WIDTH + x * step + 5, top + 5)) for x in range(8)
  ]
  assert blue == [(0, 0, 255)] * 8
