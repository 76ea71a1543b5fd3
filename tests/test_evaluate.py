"""The evaluation command on tiny benchmarks, from files to the table."""

import csv
import functools
import io
import json
import pathlib
import re
from unittest import mock
import zlib

import evaluate
import jax
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrm_jax import benchmark_scores, build, evaluation, scorer, weights
from lrm_jax import folder as folder_lib
from lrm_jax.data import benchmarks, parquet, prompt_cache, score_files
from lrm_jax.models import features, reward
from tests import golden_models, helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent
T5_LENGTH = 16
PROMPTS = ["a cat", "a dog", "a red car"]
SIZE = 32


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
  """The golden DiNa-LRM on the golden SD3.5, made without torch."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "convert")
    import torch_to_flax

    folder = tmp_path_factory.mktemp("models")
    source = helpers.GOLDEN / "dina" / "sd35"
    torch_to_flax.main(["--sd35", str(source), "--out", str(folder / "sd35")])
  model = golden_models.dina()
  leaves = weights.flatten(model.params)
  leaves = {p: a for p, a in leaves.items() if "/lora_" in p or p.startswith("head/")}
  out = folder / "dina"
  out.mkdir()
  scoring = reward.ScoringConfig.dina()
  entry = build.save_reward(out, leaves, model.config, scoring, stacked=True)
  folder_lib.write_config(out, {"base": "../sd35", "components": {"reward": entry}})
  return out


@pytest.fixture(scope="module", autouse=True)
def one_model():
  """Every command of this module shares a model, and with it the compiled programs."""
  load = functools.cache(scorer.Scorer.load)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scorer.Scorer, "load", staticmethod(load))
    yield


def picture(seed: int) -> np.ndarray:
  values = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3))
  return values.astype(np.uint8)


def png(seed: int) -> bytes:
  file = io.BytesIO()
  Image.fromarray(picture(seed)).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """hpdv3.json (pairs), hpdv2.json (lists), genai.parquet (with ties), and images."""
  folder = tmp_path_factory.mktemp("data")
  (folder / "images").mkdir()
  for i in range(8):
    (folder / "images" / f"{i}.png").write_bytes(png(i))
  (folder / "images" / "broken.png").write_bytes(b"x" * 99)
  # 0.png appears for two prompts and in three pairs; one row is bad on one side.
  pairs = [(0, "0", "1"), (1, "2", "3"), (0, "0", "4"), (2, "5", "6"), (1, "0", "3")]
  rows = [
    dict(prompt=PROMPTS[p], path1=f"{a}.png", path2=f"{b}.png") for p, a, b in pairs
  ]
  rows.append(dict(prompt=PROMPTS[2], path1="broken.png", path2="6.png"))
  (folder / "hpdv3.json").write_text(json.dumps(rows))
  lists = [
    (0, ["0", "1", "2", "3"], [0, 1, 1, 2]),
    (1, ["4", "5", "6"], [2, 0, 1]),
    (2, ["7", "gone", "0", "1"], [3, 2, 1, 0]),
  ]
  rows = [
    dict(prompt=PROMPTS[p], image_path=[f"{n}.png" for n in names], rank=ranks)
    for p, names, ranks in lists
  ]
  (folder / "hpdv2.json").write_text(json.dumps(rows))
  votes = ["leftvote", "rightvote", "tievote", "leftvote", "bothbad_vote"]
  rows = [
    dict(
      prompt=PROMPTS[i % 2],
      vote_type=v,
      left_image=png(20 + i),
      right_image=png(30 + i),
    )
    for i, v in enumerate(votes)
  ]
  pq.write_table(pa.Table.from_pylist(rows), folder / "genai.parquet")
  return folder


def run(capsys, *args) -> tuple[str, str]:
  """The command; what it printed on stdout and stderr."""
  evaluate.main([str(a) for a in args])
  return capsys.readouterr()


def command(model_folder, data, out, *args) -> list:
  return [
    *("--model", model_folder, "--out", out, "--t5-length", T5_LENGTH),
    *("--images", data / "images", "--batch-size", 4, *args),
  ]


@pytest.fixture(scope="module")
def evaluated(model_folder, data, tmp_path_factory):
  """One evaluation of all three: folder and printed text."""
  out = tmp_path_factory.mktemp("out") / "eval"
  args = command(model_folder, data, out, "--u", "0.1,0.4", "--ensemble", "0.1,0.4")
  for name, file in dict(hpdv3="hpdv3.json", hpdv2="hpdv2.json").items():
    args += ["--data", f"{name}={name}:{data / file}"]
  args += ["--data", f"genai=genaibench:{data / 'genai.parquet'}", "--calibrate", 3]
  loaded, encoded = [], []
  with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context():
    load = benchmarks._ImageFiles.load
    encode = scorer.Scorer.encode_prompts

    def load_and_note(self, index, which):
      loaded.extend((self[index].prompt, self[index].images[i]) for i in which)
      return load(self, index, which)

    def encode_and_note(self, prompts):
      encoded.extend(prompts)
      return encode(self, prompts)

    patch.setattr(benchmarks._ImageFiles, "load", load_and_note)
    patch.setattr(scorer.Scorer, "encode_prompts", encode_and_note)
    evaluate.main([str(a) for a in args])
  return out, loaded, encoded


def rows_of(out: pathlib.Path) -> dict:
  rows = json.loads((out / "table.json").read_text())
  return {(row["benchmark"], row["level"]): row for row in rows}


# --- the scores ---------------------------------------------------------------------


def test_scores_are_the_scorers(evaluated, model_folder):
  """Against the scorer itself, with the documented noise."""
  table = score_files.read(evaluated[0] / "scores_hpdv3.csv")
  model = scorer.Scorer.load(model_folder, t5_length=T5_LENGTH)
  seeds = [int(name.removesuffix(".png")) for name in table.images]
  pixels = np.stack([picture(seed) for seed in seeds]).astype(np.float32)
  latents = model.encode_images(pixels / 127.5 - 1, batch_size=4)
  options = dict(
    key=jax.random.key(0),
    indices=[zlib.crc32(p.encode()) for p in table.prompts],
    batch_size=4,  # whose programs are compiled already
  )
  cond = model.encode_prompts(table.prompts)
  want = model.score(latents, cond, u=[0.1, 0.4], **options)
  assert helpers.rel_err(table.raw[:2], want) < 1e-5
  want = model.ensemble(latents, cond, [0.1, 0.4], **options)
  assert helpers.rel_err(table.raw[2], want) < 1e-5
  assert helpers.rel_err(table.reported, (table.raw + 10) / 10) < 1e-6

  single, together = table.levels[0], table.levels[2]
  assert single.label == "u=0.1" and single.sigma == pytest.approx(0.1, abs=2e-3)
  assert together == score_files.Level("tokens(u=0.1,0.4)", None, None)


def test_everything_is_loaded_and_encoded_once(evaluated):
  _, loaded, encoded = evaluated
  hpdv3 = [("a cat", "0.png"), ("a dog", "0.png"), ("a red car", "broken.png")]
  for key in hpdv3:
    of_both = 2 if key == ("a cat", "0.png") else 1  # it is in hpdv2, too
    assert loaded.count(key) == of_both, key
  assert sorted(encoded) == sorted(PROMPTS)


def test_rows_are_in_the_files_order(evaluated, data):
  table = score_files.read(evaluated[0] / "scores_hpdv3.csv")
  rows = json.loads((data / "hpdv3.json").read_text())[:5]
  want = [(r["prompt"], r[side]) for r in rows for side in ("path1", "path2")]
  assert list(zip(table.prompts, table.images, strict=True)) == want
  assert table.ranks.tolist() == [0, 1] * 5


@pytest.mark.parametrize("change", [["--batch-size", 8], ["--limit", 3]])
def test_scores_do_not_depend_on_what_else_is_scored(
  evaluated, model_folder, data, tmp_path, change, capsys
):
  args = ["--data", f"x=hpdv3:{data / 'hpdv3.json'}", "--u", 0.4, *change]
  run(capsys, *command(model_folder, data, tmp_path / "out", *args))
  got = score_files.read(tmp_path / "out" / "scores_x.csv")
  want = score_files.read(evaluated[0] / "scores_hpdv3.csv")
  n = len(got.ids)
  assert n == (6 if "--limit" in change else 10)
  assert got.images == want.images[:n]
  assert helpers.rel_err(got.raw[0], want.raw[1, :n]) < 1e-5


def test_noise_is_shared_or_each_images_own(model_folder, data, tmp_path, capsys):
  rows = [dict(prompt="a cat", path1="0.png", path2="copy.png")]
  (tmp_path / "x.json").write_text(json.dumps(rows))
  for name in ("0", "copy"):
    (tmp_path / f"{name}.png").write_bytes(png(0))
  scores = {}
  for name, args in dict(
    shared=[], own=["--noise", "independent"], seed=["--seed", 1]
  ).items():
    out = tmp_path / name
    args = [f"x=hpdv3:{tmp_path / 'x.json'}", "--u", 0.4, *args]
    full = command(model_folder, data, out, "--data", *args)
    full[full.index("--images") + 1] = tmp_path
    run(capsys, *full)
    scores[name] = score_files.read(out / "scores_x.csv").raw[0]
  assert helpers.rel_err(scores["shared"][0], scores["shared"][1]) < 1e-6
  assert abs(scores["own"][0] - scores["own"][1]) > 1e-4
  assert np.all(np.abs(scores["seed"] - scores["shared"]) > 1e-4)


def test_exact_noise_levels_and_mean_ensembles(model_folder, data, tmp_path, capsys):
  out = tmp_path / "out"
  args = ["--sigmas", "0,0.25", "--ensemble", "0,0.25", "--ensemble-mode", "mean"]
  args += ["--data", f"x=hpdv3:{data / 'hpdv3.json'}", "--scores", "parquet"]
  run(capsys, *command(model_folder, data, out, *args, "--limit", 2))
  table = score_files.read(out / "scores_x.parquet")
  assert [(level.label, level.sigma) for level in table.levels] == [
    ("sigma=0", 0.0),
    ("sigma=0.25", 0.25),
    ("mean(sigma=0,0.25)", None),
  ]
  assert helpers.rel_err(table.raw[2], table.raw[:2].mean(axis=0)) < 1e-5


# --- latents ------------------------------------------------------------------------


def test_latents_with_cached_prompts(model_folder, data, tmp_path, capsys):
  model = scorer.Scorer.load(model_folder, t5_length=T5_LENGTH)
  cond = jax.device_get(model.encode_prompts(PROMPTS[:2]))
  settings = dict(t5_length=T5_LENGTH, dtype="float32", encoder="test")
  with prompt_cache.PromptCacheWriter(tmp_path / "prompts", **settings) as cache:
    cache.append(PROMPTS[:2], cond.context, cond.pooled)
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(4, 2, 4, 4, 16)).astype(np.float32)
  records = [
    dict(prompt=PROMPTS[i % 2], chosen=pair[0], rejected=pair[1], preference=p)
    for i, (pair, p) in enumerate(zip(latents, [1, 1, 0.5, 1], strict=True))
  ]
  parquet.write_part(tmp_path / "pairs" / "0.parquet", records, rows_per_group=2)

  def args(out, *more):
    full = command(model_folder, data, tmp_path / out, "--u", 0.4, *more)
    return [*full, "--data", f"x=latents:{tmp_path / 'pairs'}"]

  run(capsys, *args("cached", "--prompt-cache", tmp_path / "prompts"))
  run(capsys, *args("encoded"))
  cached, encoded = (
    score_files.read(tmp_path / out / "scores_x.csv") for out in ("cached", "encoded")
  )
  assert helpers.rel_err(cached.raw, encoded.raw) < 1e-5
  assert (
    cached.prompts == ("a cat",) * 2 + ("a dog",) * 2 + ("a cat",) * 2 + ("a dog",) * 2
  )
  row = rows_of(tmp_path / "cached")["x", "u=0.4"]
  assert (row["num_pairs"], row["num_ties"], row["interval"]) == (3, 1, "wilson")
  one = features.Cond(cond.context[:1], cond.pooled[:1])
  key, index = jax.random.key(0), zlib.crc32(b"pair 2")
  want = model.score(latents[2, :1], one, u=0.4, key=key, indices=[index])
  assert helpers.rel_err(cached.raw[0, 4:5], want) < 1e-5

  # A prompt that the cache lacks, and a cache of another model.
  command_line = command(
    model_folder, data, tmp_path / "more", "--prompt-cache", tmp_path / "prompts"
  )
  with pytest.raises(SystemExit, match="no embedding of 'a red car'"):
    run(capsys, *command_line, "--data", f"x=hpdv3:{data / 'hpdv3.json'}")
  with prompt_cache.PromptCacheWriter(tmp_path / "other", **settings) as cache:
    cache.append(PROMPTS, np.ones((3, 9, 5)), np.ones((3, 4)))
  with pytest.raises(SystemExit, match=r"widths \(5, 4\), the model needs"):
    run(capsys, *args("more", "--force", "--prompt-cache", tmp_path / "other"))


# --- the table ----------------------------------------------------------------------


def by_hand(path: pathlib.Path) -> dict[str, tuple[int, float]]:
  """(pairs, accuracy) per level of a score file, with nothing but loops."""
  lists: dict[tuple[str, str], list] = {}
  with path.open(newline="") as file:
    for row in csv.DictReader(file):
      scored = float(row["rank"]), float(row["raw"])
      lists.setdefault((row["level"], row["id"]), []).append(scored)
  found: dict[str, list[float]] = {}
  for (level, _), images in lists.items():
    for i, (rank, raw) in enumerate(images):
      for other_rank, other_raw in images[i + 1 :]:
        if rank != other_rank:
          agree = (rank < other_rank) == (raw > other_raw)
          found.setdefault(level, []).append(float(agree))
  return {level: (len(hits), sum(hits) / len(hits)) for level, hits in found.items()}


def test_table_follows_from_the_score_files(evaluated):
  out = evaluated[0]
  rows = rows_of(out)
  assert len(rows) == 9
  for name in ("hpdv3", "hpdv2", "genai"):
    for level, (num, acc) in by_hand(out / f"scores_{name}.csv").items():
      row = rows[name, level]
      assert row["num_pairs"] == num and row["acc"] == pytest.approx(acc), row
  with (out / "table.csv").open(newline="") as file:
    (first, *rest) = csv.DictReader(file)
  assert len(rest) == 8 and float(first["acc"]) == rows["hpdv3", "u=0.1"]["acc"]


def test_what_each_row_says(evaluated):
  rows = rows_of(evaluated[0])
  pairs, lists, ties = (rows[name, "u=0.4"] for name in ("hpdv3", "hpdv2", "genai"))
  # 0.png is in two pairs of one prompt, so they are not independent.
  assert pairs["interval"] == "bootstrap" and pairs["tau_b"] is None
  assert (pairs["num_lists"], pairs["bad_images"], pairs["lost_pairs"]) == (5, 1, 1)
  # 6 + 3 + 6 pairs, of which 3 were lost with gone.png; (1, 2) of the first is a tie.
  assert (lists["num_pairs"], lists["num_ties"], lists["lost_pairs"]) == (11, 1, 3)
  for name in ("acc_by_list", "tau_b", "top1", "rank_corr"):
    assert lists[f"{name}_lo"] <= lists[name] <= lists[f"{name}_hi"]
  assert (ties["num_pairs"], ties["num_ties"], ties["interval"]) == (3, 2, "wilson")
  assert ties["tie_credit"] == 0 and ties["tie_fitted"] and ties["tie_acc"] >= 2 / 5
  assert pairs["tie_acc"] is None


def test_bad_images_are_listed(evaluated):
  with (evaluated[0] / "bad_images_hpdv2.csv").open(newline="") as file:
    (bad,) = csv.DictReader(file)
  assert (bad["image"], bad["prompt"], bad["lists"]) == ("gone.png", "a red car", "1")
  assert "does not exist" in bad["reason"]
  assert not (evaluated[0] / "bad_images_genai.csv").exists()


def test_files_and_summary(evaluated):
  image = pytest.importorskip("matplotlib.image")
  out = evaluated[0]
  summary = json.loads((out / evaluation.SUMMARY).read_text())
  assert sorted(path.name for path in out.iterdir()) == summary["files"]
  figures = [name for name in summary["files"] if name.endswith(".png")]
  assert figures == [
    "accuracy_vs_noise.png",
    *(f"{kind}_{n}.png" for kind in ("calibration", "histogram")
      for n in ("genai", "hpdv2", "hpdv3")),
  ]  # fmt: skip
  for name in figures:
    assert image.imread(out / name).std() > 0.01
  assert summary["complete"] and summary["plan"]["mode"] == "tokens"
  assert summary["versions"]["jax"] == jax.__version__
  assert summary["benchmarks"]["hpdv2"]["num_bad_images"] == 1
  found = json.loads((out / "calibration.json").read_text())
  assert found.keys() == {"hpdv3", "hpdv2", "genai"}
  for levels in found.values():
    assert levels.keys() == {"u=0.1", "u=0.4", "tokens(u=0.1,0.4)"}
    for fit in levels.values():
      assert np.isfinite(
        [fit["scale"], fit["after"]["log_loss"], fit["after"]["ece"]]
      ).all()


# --- from scores --------------------------------------------------------------------


def test_tables_again_from_scores(evaluated, tmp_path, capsys):
  source = evaluated[0]
  out, _ = run(
    capsys, "--from-scores", source, "--out", tmp_path / "again", "--calibrate", 3
  )
  again = tmp_path / "again"
  for name in ("table.json", "table.csv", "calibration.json", "scores_hpdv2.csv"):
    assert (again / name).read_text() == (source / name).read_text(), name
  assert {p.name for p in again.iterdir()} == {p.name for p in source.iterdir()}
  header, first, *_ = out.splitlines()
  assert header.split()[:4] == ["benchmark", "level", "lists", "pairs"]
  row = rows_of(source)["hpdv3", "u=0.1"]
  assert f"{100 * row['acc']:.2f}" in first and "bootstrap" in first
  assert "* with the tie threshold" in out and "calibration  level" in out

  # In place, judged otherwise.
  before = (again / "scores_genai.csv").read_text()
  args = ["--interval", "wilson", "--tie-threshold", 1e9]
  out, _ = run(capsys, "--from-scores", again, *args)
  row = rows_of(again)["genai", "u=0.4"]
  assert row["tie_acc"] == 2 / 5 and row["tie_threshold"] == 1e9
  assert rows_of(again)["hpdv3", "u=0.4"]["interval"] == "wilson"
  assert not row["tie_fitted"] and "*" not in out
  assert (again / "scores_genai.csv").read_text() == before


def test_from_scores_errors(evaluated, tmp_path, capsys):
  def bad(match, *args):
    with pytest.raises(SystemExit, match=match):
      run(capsys, *args)

  source = evaluated[0]
  bad("holds no evaluation .*evaluate a model first", "--from-scores", tmp_path)
  bad(
    "--u, --batch-size: --from-scores takes the scores as they are",
    *("--from-scores", source, "--u", 0.4, "--batch-size", 2),
  )
  bad(
    "holds an evaluation", "--from-scores", source, "--out", other_evaluation(tmp_path)
  )
  good = json.loads((source / evaluation.SUMMARY).read_text())
  for change in ("{", "[]", '{"format": "x"}', {"benchmarks": {"x": {}}}):
    text = change if isinstance(change, str) else json.dumps(good | change)
    (tmp_path / evaluation.SUMMARY).write_text(text)
    bad("does not describe an evaluation", "--from-scores", tmp_path)
  (tmp_path / evaluation.SUMMARY).write_text(json.dumps(good))
  bad("scores_hpdv3.csv cannot be read", "--from-scores", tmp_path)


def other_evaluation(tmp_path) -> pathlib.Path:
  folder = tmp_path / "other"
  folder.mkdir()
  values = dict(format=evaluation.FORMAT, version=evaluation.VERSION)
  values |= dict(files=["old.csv"], benchmarks={})
  (folder / evaluation.SUMMARY).write_text(json.dumps(values))
  (folder / "old.csv").write_text("old")
  (folder / "mine.txt").write_text("kept")
  return folder


def test_pairs_of_one_prompt_are_not_calibrated(tmp_path, capsys):
  table = score_files.ScoreTable(
    ids=("a", "a", "b", "b"),
    prompts=("x",) * 4,
    images=tuple("0123"),
    ranks=np.array([0.0, 1, 0, 1]),
    levels=(score_files.Level("u=0", 0.0, 0.0),),
    raw=np.array([[1.0, 0, 3, 2]], np.float32),
    reported=np.array([[1.0, 0, 3, 2]], np.float32),
  )
  entry = dict(format="hpdv3", tie_credit=None, num_bad_images=0, lost_pairs=0)
  how = evaluation.Analysis("auto", 100, 0, None, 5)
  rows, calibration, _ = evaluation.analyse("x", table, entry, how)
  assert rows[0]["acc"] == 1 and rows[0]["interval"] == "wilson"
  assert "fewer than two prompts" in calibration["u=0"]["note"]
  text = evaluation.format_calibration({"x": calibration})
  assert "x, u=0: fewer than two prompts" in text


# --- errors -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "--data is needed"),
    (["--data", "x"], "--data 'x': give NAME=FORMAT:PATH"),
    (["--data", "a/b=hpdv3:x"], "give NAME=FORMAT:PATH"),
    (["--data", "x=csv:y"], "format 'csv' is none of hpdv3, "),
    (["--data", "x=hpdv3:a", "--data", "x=hpdv2:b"], "two benchmarks are called 'x'"),
    (["--data", "x=hpdv3:a", "--images", "again"], "two folders for all benchmarks"),
    (["--data", "x=hpdv3:DATA/gone.json"], "gone.json does not exist"),
    (["--data", "x=hpdv2:DATA/hpdv3.json"], "row 0: lacks the field 'image_path'"),
    (
      ["--data", "x=hpdv3:y", "--u", "0.1,2"],
      r"'0.1,2': give noise levels in \[0, 1\]",
    ),
    (["--data", "x=hpdv3:y", "--ensemble", "0.1,x"], "--ensemble '0.1,x': give noise"),
    (["--data", "x=hpdv3:y", "--sigmas", "0,0.0"], "a level is there twice"),
    (["--data", "x=hpdv3:y", "--limit", "0"], "--limit 0 must be 1 or more"),
    (["--data", "x=hpdv3:y", "--batch-size", "0"], "--batch-size 0 must be 1"),
    (["--data", "x=hpdv3:y", "--calibrate", "1"], "--calibrate 1: two folds"),
    (["--data", "x=hpdv3:y", "--tie-threshold", "-1"], "--tie-threshold -1.0 must"),
    (["--data", "x=hpdv3:y", "--model", "no/where"], "no/where is not a model folder"),
  ],
)
def test_errors_before_any_work(
  model_folder, data, tmp_path, capsys, monkeypatch, args, message
):
  monkeypatch.setattr(scorer.Scorer, "load", None)  # it would be a TypeError
  args = [a.replace("DATA", str(data)) for a in args]
  with pytest.raises(SystemExit, match=f"^error: .*{message}"):
    run(capsys, *command(model_folder, data, tmp_path / "out", *args))


def test_output_folder_errors(model_folder, data, tmp_path, capsys, monkeypatch):
  args = ["--data", f"x=hpdv3:{data / 'hpdv3.json'}", "--limit", 1, "--u", 0.4]
  with monkeypatch.context() as patch:
    patch.setattr(scorer.Scorer, "load", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: .*file"):
      run(capsys, *command(model_folder, data, tmp_path / "file" / "out", *args))
    other = other_evaluation(tmp_path)
    with pytest.raises(SystemExit, match="holds an evaluation: .*--force"):
      run(capsys, *command(model_folder, data, other, *args))
  # With --force the old evaluation's files go, and only those.
  run(capsys, *command(model_folder, data, other, *args, "--force"))
  names = {path.name for path in other.iterdir()}
  assert "old.csv" not in names and {"mine.txt", "scores_x.csv"} <= names


def test_all_images_bad_is_an_error(model_folder, data, tmp_path, capsys):
  args = command(
    model_folder, data, tmp_path / "out", "--data", f"x=hpdv3:{data / 'hpdv3.json'}"
  )
  args[args.index("--images") + 1] = f"x={tmp_path}"
  with pytest.raises(SystemExit, match="no two images .* 9 are bad; .*does not exist"):
    run(capsys, *args)


def test_images_of_impossible_sizes_are_bad_images(
  model_folder, data, tmp_path, capsys
):
  Image.fromarray(picture(0)[:2]).save(tmp_path / "flat.png")
  Image.new("RGB", (SIZE, 2048)).save(tmp_path / "tall.png")
  good = [str(data / "images" / f"{i}.png") for i in (0, 1)]
  rows = [
    dict(prompt="a cat", image_path=["flat.png", *good, "tall.png"], rank=[0, 1, 2, 3])
  ]
  (tmp_path / "x.json").write_text(json.dumps(rows))
  args = ["--data", f"x=hpdv2:{tmp_path / 'x.json'}", "--u", 0.4]
  args = command(model_folder, data, tmp_path / "out", *args)
  args[args.index("--images") + 1] = tmp_path
  out, err = run(capsys, *args)
  with (tmp_path / "out" / "bad_images_x.csv").open(newline="") as file:
    flat, tall = csv.DictReader(file)
  assert "image flat.png: an image of 2x32 pixels" in flat["reason"]
  assert "position table" in tall["reason"]
  row = rows_of(tmp_path / "out")["x", "u=0.4"]
  assert (row["num_pairs"], row["lost_pairs"], row["bad_images"]) == (1, 5, 2)
  assert "2 bad" in err and out.splitlines()[0].split()[4] == "bad"


def test_what_the_model_cannot_take_is_named(model_folder, data, tmp_path, capsys):
  latent = np.zeros((4, 4, 8), np.float32)
  records = [dict(prompt="a cat", chosen=latent, rejected=latent)]
  parquet.write_part(tmp_path / "pairs" / "0.parquet", records, rows_per_group=2)
  args = command(model_folder, data, tmp_path / "out", "--u", 0.4)
  with pytest.raises(
    SystemExit, match="pairs: .*8 channels.*one of the images 0/chosen"
  ):
    run(capsys, *args, "--data", f"x=latents:{tmp_path / 'pairs'}")


def test_a_failed_write_leaves_nothing_half(tmp_path):
  folder = evaluation.Folder(tmp_path / "out")

  def fail(path):
    path.write_text("half")
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    folder.write("table.csv", fail)
  assert list((tmp_path / "out").iterdir()) == [] and folder.files == []


def test_progress(capsys):
  progress = evaluate.Progress("hpdv3", 4)
  progress(1, 2, 0)  # too early to say anything
  progress.close(4, 8, 1)
  text = capsys.readouterr().err
  assert re.fullmatch(r"hpdv3  4/4 lists \[#{20}\]  \S+ images/s  1 bad\n", text)


def test_prompts_are_forgotten_in_time(monkeypatch):
  monkeypatch.setattr(benchmark_scores, "PROMPTS_KEPT", 2)
  encoded = []

  def encode(prompts):
    encoded.append(list(prompts))
    ones = np.ones((len(prompts), 1, 1), np.float32)
    return features.Cond(ones, ones[..., 0])

  model = mock.create_autospec(scorer.Scorer, instance=True)
  model.encode_prompts.side_effect = encode
  prompts = benchmark_scores.Prompts(model)
  prompts.get("a", ["b", "a"])
  prompts.get("b", [])
  prompts.get("c", ["b"])
  prompts.get("a", [])
  assert encoded == [["a", "b"], ["c"], ["a"]]
