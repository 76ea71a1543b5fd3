"""Prompts into a cache, with the golden encoders."""

import json
import shutil

import ml_dtypes
import numpy as np
from PIL import Image
import precompute_latents
import precompute_prompts
import pytest
import torch_to_flax

from lrm_jax import encoders
from lrm_jax import folder as folder_lib
from lrm_jax.data import parquet, prompt_cache
from tests import helpers

PROMPTS = [
  "a girl walking in the street",
  "a photo of a cat",
  "two dogs playing chess, studio light, 35mm",
]
LENGTH = ("--t5-length", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  out = tmp_path_factory.mktemp("models") / "text"
  source = ["--sd35", str(helpers.GOLDEN / "dina" / "sd35")]
  torch_to_flax.main([*source, "--only", "vae,clip_l,clip_g,t5", "--out", str(out)])
  return out


def run(model, out, *more):
  args = ["--model", model, "--out", out, *LENGTH, "--batch-size", 1, *more]
  precompute_prompts.main([str(arg) for arg in args])
  return prompt_cache.PromptCache(out)


def pairs(prompts):
  return [dict(prompt=p, path1=f"{p}1", path2=f"{p}2") for p in prompts]


def test_golden_embeddings_from_all_sources(model, tmp_path, capsys):
  (tmp_path / "a.json").write_text(json.dumps([*pairs(PROMPTS[:1]), {}]))
  (tmp_path / "a.txt").write_text(f"{PROMPTS[1]}\n\n  \n{PROMPTS[0]}\n")
  record = dict.fromkeys(("chosen", "rejected"), np.zeros((2, 2, 4), np.float32))
  records = [record | dict(prompt=prompt) for prompt in PROMPTS[1:]]
  parquet.write_part(tmp_path / "set" / "a.parquet", records, rows_per_group=1)
  sources = ["--json", tmp_path / "a.json", "--text", tmp_path / "a.txt"]
  sources += ["--parquet", tmp_path / "set", "--skip-bad"]
  cache = run(model, tmp_path / "cache", *sources, "--dtype", "float32")
  assert cache.prompts == ("", PROMPTS[0], *PROMPTS[1:])
  assert "added 4 prompts" in capsys.readouterr().out

  want = helpers.golden("dina/expected")
  context, pooled = (
    np.stack(a) for a in zip(*map(cache.__getitem__, PROMPTS), strict=True)
  )
  assert helpers.rel_err(context, want["prompt_embeds"]) < 1e-4
  assert helpers.rel_err(pooled, want["pooled_prompt_embeds"]) < 1e-4
  assert helpers.rel_err(cache[""][0][None], want["negative_prompt_embeds"]) < 1e-4

  # Nothing is left to do, and other encoders are told apart.
  run(model, tmp_path / "cache", *sources, "--dtype", "float32")
  assert "added 0 prompts" in capsys.readouterr().out
  with pytest.raises(SystemExit, match="encoder 'sha256:.*', not 'sha256:"):
    run(model, tmp_path / "cache")


def test_hosts_share_the_prompts_of_a_dataset(model, tmp_path, capsys):
  """Through precompute_latents.py, which encodes images and prompts in one go."""
  prompts = [f"number {i}" for i in range(20)] + ["many words " * 60] * 2
  for i, name in enumerate(("1.png", "2.png")):
    Image.fromarray(np.full((32, 32, 3), 99 * i, np.uint8)).save(tmp_path / name)
  rows = [dict(prompt=p, path1="1.png", path2="2.png") for p in prompts]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  args = ["--model", model, "--json", tmp_path / "a.json", "--images", tmp_path]
  args += ["--out", tmp_path / "out", "--prompts", tmp_path / "cache", *LENGTH]
  args += ["--size", "32x32", "--rows-per-part", 16, "--host-count", 2]
  for host in ("1", "0"):
    args += ["--host-index", host]
    precompute_latents.main([str(arg) for arg in args])
  err = capsys.readouterr().err
  assert "prompts: 11 of 11 are to be encoded" in err
  for name in ("clip_l", "clip_g", "t5"):
    assert err.count(f"warning: {name} keeps") == 1, name
  cache = prompt_cache.PromptCache(tmp_path / "cache")
  assert len(cache) == 22
  cache.require(["", *prompts])
  assert cache.dtype == ml_dtypes.bfloat16 and cache.context_shape == (77 + 32, 64)
  names = sorted(path.name for path in (tmp_path / "cache").glob("prompts-*"))
  assert names == [f"prompts-000{host}-000000.safetensors" for host in range(2)]
  assert len(parquet.ParquetPairs(tmp_path / "out")) == 22


def test_fingerprints(model, tmp_path):
  def fingerprint(folder=model, dtype="float32"):
    encoder = encoders.TextEncoder(folder, t5_length=8, context_dim=64, dtype=dtype)
    return encoder.fingerprint()

  first = fingerprint()
  assert first == fingerprint() != fingerprint(dtype="bfloat16")
  # A tokenizer that differs makes other embeddings.
  (tmp_path / "copy").mkdir()
  for path in model.iterdir():
    (tmp_path / "copy" / path.name).symlink_to(path)
  (tmp_path / "copy" / "tokenizer").unlink()
  shutil.copytree(model / "tokenizer", tmp_path / "copy" / "tokenizer")
  assert fingerprint(tmp_path / "copy") == first
  (tmp_path / "copy" / "tokenizer" / "added_tokens.json").write_text("{}")
  assert fingerprint(tmp_path / "copy") != first


def test_unusable_input(model, tmp_path):
  def refused(match, *args):
    with pytest.raises(SystemExit, match=f"error: .*{match}"):
      run(model, tmp_path / "cache", *args)

  refused("no such folder", "--parquet", tmp_path / "nowhere")
  refused("a.txt cannot be read", "--text", tmp_path / "a.txt")
  refused("a.json does not exist", "--json", tmp_path / "a.json")
  refused("--host-index 1 must lie in 0..0", "--host-index", 1)
  refused("--batch-size 0", "--batch-size", 0)
  (tmp_path / "bad.parquet").write_bytes(b"PAR1")
  refused("bad.parquet", "--parquet", tmp_path)
  with pytest.raises(folder_lib.FolderError, match="so the width .* is not known"):
    folder_lib.write_config(tmp_path, {"components": {}})
    precompute_prompts.context_dim(tmp_path)
  assert not (tmp_path / "cache").exists()
