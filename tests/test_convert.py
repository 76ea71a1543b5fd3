"""Conversion there and back: the same bits, and the same scores in between."""

import json
import pathlib
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import safetensors.torch
import torch

from lrm_jax import build
from lrm_jax import folder as folder_lib
from tests import conversion, helpers, torch_models
from tests.conversion import DINA, DRM, FILES, SD35

ADAPTER = "checkpoint/backbone_lora/adapter_model.safetensors"
HEAD = "checkpoint/rm_head.pt"


# --- the goldens --------------------------------------------------------------------


def test_golden_dina_round_trip(golden_folders, tmp_path):
  conversion.to_torch(golden_folders.dina, "dina", tmp_path / "dina")
  for name in (ADAPTER, HEAD):
    conversion.assert_same_tensors(tmp_path / "dina" / name, DINA / name)
  config = "config.json"
  want = json.loads((DINA / config).read_text())
  assert json.loads((tmp_path / "dina" / config).read_text()) == want


@pytest.mark.parametrize("out", ["a.safetensors", "b.pt", "folder"])
def test_golden_drm_round_trip(golden_folders, tmp_path, out):
  conversion.to_torch(golden_folders.drm, "drm", tmp_path / out)
  path = tmp_path / out if "." in out else tmp_path / out / "model.safetensors"
  conversion.assert_same_tensors(path, DRM)
  want = json.loads((DRM.with_name("head.json")).read_text())
  assert json.loads((path.with_name("head.json")).read_text()) == want


def test_golden_pipeline_round_trip(golden_folders, tmp_path):
  out = tmp_path / "sd35"
  conversion.to_torch(golden_folders.dina, "diffusers", out)
  for name, file in FILES.items():
    conversion.assert_same_tensors(out / name / file, SD35 / name / file)
    want = json.loads((SD35 / name / "config.json").read_text())
    got = json.loads((out / name / "config.json").read_text())
    for key in ("sample_size", "bos_token_id"):  # without effect in these classes
      got.pop(key, None)
    assert got == {k: want[k] for k in got}, name
  want = json.loads((SD35 / "model_index.json").read_text())
  want.pop("_diffusers_version")
  assert json.loads((out / "model_index.json").read_text()) == want

  pipes = [
    diffusers.StableDiffusion3Pipeline.from_pretrained(path) for path in (out, SD35)
  ]
  kwargs = dict(max_sequence_length=8, do_classifier_free_guidance=False)
  embeds = [p.encode_prompt("a cat", None, None, **kwargs)[::2] for p in pipes]
  for a, b in zip(*embeds, strict=True):
    torch.testing.assert_close(a, b)


def golden_inputs(e, u: float):
  i = int(np.abs(e["reward/u"] - u).argmin())
  sigma = e["reward/sigma_of_u"][i]
  x = (1 - sigma) * e["reward/clean_latents"] + sigma * e["reward/noise"]
  return x, np.full(len(x), 1000 * sigma), e["prompt_embeds"], e["pooled_prompt_embeds"]


def test_golden_dina_scores(golden_folders):
  e = helpers.golden("dina/expected")
  levels = {u: conversion.as_ours(*golden_inputs(e, u)) for u in (0.0, 0.1, 0.4, 1.0)}
  score = conversion.scorer(golden_folders.dina)
  for u, args in levels.items():
    assert helpers.rel_err(score(args), e[f"reward/score_u{u}"][:, 0]) < 1e-4
  args = [conversion.as_ours(*golden_inputs(e, u)) for u in e["reward/ensemble_u"]]
  xs, sigmas = (np.stack([a[i] for a in args]) for i in (0, 1))
  score = conversion.scorer(golden_folders.dina, "ensemble")((xs, sigmas, args[0][2]))
  assert helpers.rel_err(score, e["reward/ensemble_score"][:, 0]) < 1e-4
  _, scoring = build.load_reward(golden_folders.dina)
  assert (scoring.u_generated, scoring.offset, scoring.scale) == (0.4, 10, 10)


def test_golden_drm_scores(golden_folders):
  e = helpers.golden("drm/expected")
  score = conversion.scorer(golden_folders.drm)
  for t in ("0", "250", "751.5", "1000"):
    args = e["latents"], np.full(3, float(t)), e["encoder_hidden_states"]
    args = conversion.as_ours(*args, e["pooled_projections"])
    assert helpers.rel_err(score(args), e[f"score_t{t}"][:, 0]) < 1e-4


# --- other sizes and choices of layers ----------------------------------------------

SIZES = dict(layers=4, heads=2, head_dim=12, dual=(0, 2), joint_dim=28)
SIZES |= dict(clip_widths=(8, 12), clip_projections=(8, 12))
DIMS = dict(context_dim=28, pooled_dim=20)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
  """(pipeline folder, model folder) with a gap in the dual layers, without T5."""
  root = tmp_path_factory.mktemp("small")
  sd35 = torch_models.make_sd35_folder(root / "sd35", seed=7, **SIZES)
  shutil.rmtree(sd35 / "text_encoder_3")
  index = json.loads((sd35 / "model_index.json").read_text())
  index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
  (sd35 / "model_index.json").write_text(json.dumps(index))
  conversion.to_flax(root / "flax", "--sd35", sd35)
  return sd35, root / "flax"


def load_transformer(sd35):
  return diffusers.SD3Transformer2DModel.from_pretrained(sd35 / "transformer").eval()


def test_without_t5(small, tmp_path):
  sd35, model = small
  assert not folder_lib.has(model, "t5")
  assert not (model / "tokenizer_3").exists()
  conversion.to_torch(model, "diffusers", tmp_path / "out")
  for name, file in list(FILES.items())[:4]:
    conversion.assert_same_tensors(tmp_path / "out" / name / file, sd35 / name / file)
  pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
    tmp_path / "out", text_encoder_3=None, tokenizer_3=None
  )
  assert pipe.encode_prompt("a cat", None, None)[0].shape[-1] == 28


DINA_VARIANTS = {
  # No tap reads the last block's text: its adapters are left out.
  "no_text_of_last": dict(num_blocks=2, image_taps=(1, 2), text_taps=(1,)),
  "embeddings": dict(num_blocks=3, image_taps=(0, 1, 3), text_taps=(0, 3)),
  "frozen": dict(num_blocks=2, lora_rank=0, text_taps=(2,)),
  "width": dict(num_blocks=3, width=16, num_heads=4, num_queries=3, lora_rank=3),
  "all_blocks": dict(num_blocks=4, use_proj_in=True, logistic_eta=(0.5, 0.3)),
}


@pytest.mark.parametrize("name", DINA_VARIANTS)
@torch.no_grad()
def test_dina_variants(small, tmp_path, name):
  sd35, base = small
  config = torch_models.DinaConfig(**DINA_VARIANTS[name])
  model = torch_models.DinaReward(load_transformer(sd35), config, seed=3)
  release = torch_models.write_dina_release(tmp_path / "release", model)
  path = release / "config.json"
  settings = json.loads(path.read_text())
  if config.logistic_eta is not None:
    settings["model"]["logistic_eta"] = list(config.logistic_eta)
    path.write_text(json.dumps(settings))
  conversion.to_flax(tmp_path / "flax", "--base", base, "--reward", release)

  args = conversion.inputs(**DIMS)
  want = model(*args)[:, 0]
  score = conversion.scorer(tmp_path / "flax")(conversion.as_ours(*args))
  assert helpers.rel_err(score, want) < 5e-5

  back = tmp_path / "back"
  conversion.to_torch(tmp_path / "flax", "dina", back)
  conversion.assert_same_tensors(back / HEAD, release / HEAD)
  exported = json.loads((back / "config.json").read_text())
  if config.logistic_eta is not None:
    eta = exported["model"].pop("logistic_eta")
    np.testing.assert_allclose(eta, settings["model"].pop("logistic_eta"), rtol=1e-6)
  assert exported == settings
  if config.lora_rank:
    conversion.assert_same_tensors(back / ADAPTER, release / ADAPTER)
  else:
    assert not (back / ADAPTER).parent.exists()
  again = torch_models.read_dina_release(back, load_transformer(sd35))  # real PEFT
  np.testing.assert_allclose(again(*args)[:, 0], want, rtol=1e-6)


def test_dina_config_is_written_where_none_is_kept(small, tmp_path):
  """As for a reward that was trained here: no `release`, no `adapter` in its entry."""
  sd35, base = small
  config = torch_models.DinaConfig(**DINA_VARIANTS["no_text_of_last"])
  model = torch_models.DinaReward(load_transformer(sd35), config, seed=3)
  release = torch_models.write_dina_release(tmp_path / "release", model)
  conversion.to_flax(tmp_path / "flax", "--base", base, "--reward", release)
  path = tmp_path / "flax" / "config.json"
  values = json.loads(path.read_text())
  del values["components"]["reward"]["release"]
  del values["components"]["reward"]["adapter"]
  path.write_text(json.dumps(values))
  conversion.to_torch(tmp_path / "flax", "dina", tmp_path / "back")
  conversion.assert_same_tensors(tmp_path / "back" / ADAPTER, release / ADAPTER)
  again = torch_models.read_dina_release(tmp_path / "back", load_transformer(sd35))
  args = conversion.inputs(**DIMS)
  with torch.no_grad():
    assert torch.equal(again(*args), model(*args))
  conversion.to_flax(tmp_path / "again", "--base", base, "--reward", tmp_path / "back")


@pytest.mark.parametrize("suffix, unused", [(".pt", True), (".safetensors", False)])
@torch.no_grad()
def test_drm_variants(small, tmp_path, suffix, unused):
  sd35, base = small
  model = torch_models.DrmReward(
    torch_models.make_transformer(
      seed=9, layers=4, head_dim=12, dual=(0, 2), joint_dim=28, pooled_dim=20
    ),
    skip_last_blocks=1,
    base_channels=16,
    num_groups=8,
    seed=4,
  )
  path = torch_models.write_drm(tmp_path / f"drm{suffix}", model)
  if not unused:  # the last block is in the release, but nothing reads it
    kept = conversion.tensors(path)
    kept = {k: v for k, v in kept.items() if "transformer_blocks.3." not in k}
    safetensors.torch.save_file(kept, path)
  args = ["--base", base, "--reward", path, "--drm-skip-last", 1]
  (tmp_path / "head.json").write_text('{"num_groups": 8}')
  printed = conversion.to_flax(tmp_path / "flax", *args, "--verify")
  assert "reward" in printed and "ok" in printed
  args = conversion.inputs(**DIMS)
  score = conversion.scorer(tmp_path / "flax")(conversion.as_ours(*args))
  assert helpers.rel_err(score, model(*args)[:, 0]) < 5e-5
  out = tmp_path / "out" / f"drm{suffix}"
  conversion.to_torch(tmp_path / "flax", "drm", out)
  conversion.assert_same_tensors(out, path)
  head = json.loads(out.with_name("head.json").read_text())
  assert head == {"skip_last_blocks": 1, "base_channels": 16, "num_groups": 8}


# --- dtypes, shards, variants -------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shards(tmp_path, dtype):
  sd35 = torch_models.make_sd35_folder(
    tmp_path / "sd35", dtype=getattr(torch, dtype), max_shard_size="40KB", layers=2
  )
  out = tmp_path / "flax"
  conversion.to_flax(out, "--sd35", sd35)
  for name in ("transformer", "vae", "clip_l", "clip_g", "t5"):
    found = {str(leaf.dtype) for leaf in conversion.leaves(out, name).values()}
    assert found == {dtype}, name
  conversion.to_torch(out, "diffusers", tmp_path / "out")
  for name, file in FILES.items():
    index = sd35 / name / f"{file}.index.json"
    want = index if index.exists() else sd35 / name / file
    conversion.assert_same_tensors(tmp_path / "out" / name / file, want)
  assert (sd35 / "transformer" / f"{FILES['transformer']}.index.json").exists()
  config = json.loads((tmp_path / "out" / "text_encoder_3" / "config.json").read_text())
  assert config["dtype"] == dtype


def test_dtype_option(tmp_path):
  out = tmp_path / "flax"
  args = ["--sd35", SD35, "--only", "transformer,vae", "--dtype", "bfloat16"]
  conversion.to_flax(out, *args)
  kernel = conversion.leaves(out, "transformer")["out/kernel"]
  want = conversion.tensors(SD35 / "transformer" / FILES["transformer"])
  want = want["proj_out.weight"].to(torch.bfloat16).float().numpy().T
  np.testing.assert_array_equal(kernel.astype(np.float32), want)
  dtypes = {leaf.dtype for leaf in conversion.leaves(out, "vae").values()}
  assert dtypes == {np.dtype(np.float32)}


def test_precision_variant_where_nothing_else_is(small, tmp_path):
  sd35, model = small
  folder = shutil.copytree(sd35, tmp_path / "sd35")
  transformer = load_transformer(sd35)
  (folder / "transformer" / FILES["transformer"]).unlink()
  transformer.save_pretrained(
    folder / "transformer", variant="fp16", max_shard_size="60KB"
  )
  conversion.to_flax(
    tmp_path / "flax", "--sd35", folder, "--only", "transformer", "--verify"
  )
  got = conversion.leaves(tmp_path / "flax", "transformer")
  for path, leaf in conversion.leaves(model, "transformer").items():
    np.testing.assert_array_equal(got[path], leaf)


# --- Stability's single file --------------------------------------------------------


@pytest.fixture(scope="module")
def encoders():
  """Text encoders in the single file's keys; CLIP heads are 64 wide there."""
  models = {
    "clip_l": torch_models.make_clip(
      seed=1, width=64, projection=64, heads=1, eos_token_id=2
    ),
    "clip_g": torch_models.make_clip(
      seed=2, width=128, projection=96, heads=2, act="gelu", eos_token_id=2
    ),
    "t5xxl": torch_models.make_t5(seed=3, width=192),
  }
  models["t5xxl"].config.relative_attention_max_distance = 128
  state = {
    f"text_encoders.{name}.transformer.{key}": value
    for name, model in models.items()
    for key, value in model.state_dict().items()
  }
  state = {k: v.clone() for k, v in state.items()}  # T5's table is there twice
  state["text_encoders.clip_l.logit_scale"] = torch.zeros(())
  return state


def write_single_file(path, encoders, dtype=torch.float32):
  transformer = torch_models.make_transformer(
    seed=5, layers=3, dual=(0, 2), joint_dim=192, pooled_dim=160
  )
  vae = torch_models.make_vae(seed=6, channels=(4, 8, 8), layers=2)
  state = torch_models.to_stability_layout(transformer.state_dict(), vae.state_dict())
  state |= encoders
  safetensors.torch.save_file({k: v.to(dtype) for k, v in state.items()}, path)
  return transformer, vae


def test_single_file_with_encoders(encoders, tmp_path):
  path = tmp_path / "sd3.5_incl_clips.safetensors"
  transformer, vae = write_single_file(path, encoders)
  args = ["--sd35", path, "--vae-norm-groups", 4, "--tokenizers", SD35]
  printed = conversion.to_flax(tmp_path / "flax", *args, "--verify")
  assert printed.count(" ok") == 5
  # The same parameters as through diffusers' layout, which the goldens vouch for.
  conversion.to_torch(tmp_path / "flax", "diffusers", tmp_path / "out")
  for name, model in (("transformer", transformer), ("vae", vae)):
    got = conversion.tensors(tmp_path / "out" / name / FILES[name])
    want = model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
  pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
  assert pipe.encode_prompt("a cat", None, None)[0].shape[-1] == 192


def test_single_file_without_projection(encoders, tmp_path):
  path = tmp_path / "sd35.safetensors"
  key = "text_encoders.clip_l.transformer.text_projection.weight"
  write_single_file(path, {k: v for k, v in encoders.items() if k != key})
  args = ["--sd35", path, "--vae-norm-groups", 4, "--tokenizers", SD35]
  printed = conversion.to_flax(tmp_path / "flax", *args, "--only", "clip_l", "--verify")
  assert printed.count(" ok") == 1
  assert "projection/kernel" not in conversion.leaves(tmp_path / "flax", "clip_l")


def test_single_file_without_encoders(tmp_path):
  path = tmp_path / "sd3.5.safetensors"
  write_single_file(path, {}, torch.bfloat16)
  conversion.to_flax(tmp_path / "flax", "--sd35", path, "--vae-norm-groups", 4)
  config = folder_lib.read_config(tmp_path / "flax")["components"]
  assert sorted(config) == ["scheduler", "transformer", "vae"]
  assert config["transformer"]["config"]["dual_layers"] == [0, 2]
  assert config["transformer"]["dtypes"] == ["bfloat16"]
