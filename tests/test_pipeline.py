"""From image files to a trained reward model, in the real layouts, at a tiny size."""

import json

import jax
import numpy as np
from PIL import Image
import precompute_latents
import pytest
import torch_to_flax

from lrm_jax import build, folder, scorer
from lrm_jax.data import parquet, tfds_pairs
from tests import helpers, runs

import reward as train_reward  # isort: skip  (tests.runs puts train/ on the path)

ONE = jax.devices()[:1]
PROMPTS = ("a photo of a cat", "a dog")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A converted SD3.5 folder, and 12 pairs of images with latents and embeddings."""
  root = tmp_path_factory.mktemp("pipeline")
  torch_to_flax.main(
    ["--sd35", str(helpers.GOLDEN / "dina" / "sd35"), "--out", str(root / "base")]
  )
  rng = np.random.default_rng(0)
  rows = []
  for i in range(12):
    names = [f"{i}_{side}.png" for side in "ab"]
    for name, shade in zip(names, (180, 60), strict=True):
      noise = rng.integers(0, 60, (70, 70, 3)) + shade
      Image.fromarray(noise.astype(np.uint8)).save(root / name)
    rows.append(dict(prompt=PROMPTS[i % 2], path1=names[0], path2=names[1]))
  (root / "pairs.json").write_text(json.dumps(rows))
  common = ["--model", root / "base", "--json", root / "pairs.json"]
  common += ["--images", root, "--size", "64x64"]
  for extra in (
    ["--out", root / "parquet", "--prompts", root / "prompts", "--t5-length", 16]
    + ["--prompts-dtype", "float32"],
    ["--out", root / "tfds", "--format", "tfds", "--split", "train"],
  ):
    precompute_latents.main([str(arg) for arg in (*common, *extra)])
  return root


def config_for(prepared, workdir):
  c = runs.config_of("sd35m")
  c.workdir = str(workdir)
  c.model.base = str(prepared / "base")
  full = build.config_from_dict(
    folder.find(prepared / "base", "transformer")[1]["config"]
  )
  c.model.transformer = ""
  c.model.num_layers = 2
  c.model.image_taps = c.model.text_taps = (1, 2)
  c.model.head.update(width=full.width, num_heads=2)
  c.model.lora.update(rank=2, alpha=4.0)
  c.model.dtype = c.model.backbone_dtype = "float32"
  c.data.train = c.data.held_out = str(prepared / "parquet")
  c.data.prompts = str(prepared / "prompts")
  c.data.t5_length = 16
  c.data.shuffle_window = None  # else the order depends on the storage
  c.data.num_threads = c.data.prefetch = 2
  c.train.batch_size = c.eval.batch_size = 4
  c.train.num_steps = 3
  c.train.log_every = 1
  c.train.learning_rate = 1e-3
  c.eval.sigmas = (0.2,)
  return c


@pytest.mark.slow
def test_embeddings_from_the_cache_and_from_the_encoders_train_alike(
  prepared, tmp_path
):
  """And latents from parquet and from ArrayRecord, and the result scores images."""
  config = config_for(prepared, tmp_path / "cached")
  assert train_reward.train(config, ONE)

  config = config_for(prepared, tmp_path / "encoded")
  config.data.prompts = ""
  config.data.kind = "tfds"
  config.data.train = config.data.held_out = f"{prepared / 'tfds'}:train"
  assert train_reward.train(config, ONE)
  cached, encoded = (runs.metrics(tmp_path / n) for n in ("cached", "encoded"))
  for a, b in zip(cached, encoded, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-4, err_msg=name)
  assert len(tfds_pairs.TfdsPairs(prepared / "tfds", "train")) == 12

  model = scorer.Scorer.load(tmp_path / "cached" / "model", t5_length=16)
  pair = parquet.ParquetPairs(prepared / "parquet")[0]
  score = model.score(
    np.stack([pair["chosen"], pair["rejected"]]),
    model.encode_prompts([pair["prompt"]] * 2),
    u=0.4,
    key=jax.random.key(0),
  )
  assert score[0] > score[1]


def test_another_prompt_length_than_the_caches_is_refused(prepared, tmp_path):
  config = config_for(prepared, tmp_path)
  config.data.t5_length = 128
  with pytest.raises(ValueError, match="data.t5_length=128.*were made with 16"):
    train_reward.train(config, ONE)
