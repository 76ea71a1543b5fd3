"""Broken checkpoints: one clear error, and nothing left behind."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import safetensors.torch
import torch
import torch_to_flax

from lrm_jax import folder as folder_lib
from lrm_jax.keymaps import engine
from tests import conversion, torch_models
from tests.conversion import DINA, DRM, FILES

TRANSFORMER = f"transformer/{FILES['transformer']}"
ADAPTER_FILES = "checkpoint/backbone_lora"


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> pathlib.Path:
  """A pipeline folder and a DiNa release on it; tests break copies of them."""
  root = tmp_path_factory.mktemp("intact")
  torch_models.make_sd35_folder(root / "sd35", layers=2, max_shard_size="60KB")
  torch_models.make_sd35_folder(root / "plain", layers=2)
  model = torch_models.DinaReward(
    torch_models.make_transformer(layers=2), torch_models.DinaConfig()
  )
  torch_models.write_dina_release(root / "dina", model)
  return root


@pytest.fixture(scope="module")
def base(intact) -> pathlib.Path:
  conversion.to_flax(
    intact / "base", "--sd35", intact / "plain", "--only", "transformer"
  )
  return intact / "base"


def fails(capsys, out: pathlib.Path, *args, to=conversion.to_flax) -> str:
  """The one error message of a run that must fail, and leave nothing behind."""
  before = sorted(out.parent.iterdir())
  with pytest.raises(SystemExit) as caught:
    to(out, *args)
  assert caught.value.code not in (None, 0)
  assert not isinstance(caught.value.code, int)  # a message: Python exits with 1
  assert sorted(out.parent.iterdir()) == before, "left something behind"
  assert "Traceback" not in capsys.readouterr().err
  message = str(caught.value.code)
  assert message.startswith("error: ")
  return message


def edit_tensors(path: pathlib.Path, change) -> None:
  state = safetensors.torch.load_file(path)
  change(state)
  safetensors.torch.save_file(state, path)


def edit_json(path: pathlib.Path, change) -> None:
  values = json.loads(path.read_text())
  change(values)
  path.write_text(json.dumps(values))


# --- generator folders --------------------------------------------------------------


def delete_key(folder):
  edit_tensors(folder / TRANSFORMER, lambda s: s.pop("proj_out.bias"))


def rename_key(folder):
  def change(s):
    s["transformer_blocks.1.attn.to_x.bias"] = s.pop(
      "transformer_blocks.1.attn.to_q.bias"
    )

  edit_tensors(folder / TRANSFORMER, change)


def reshape(folder):
  def change(s):
    s["context_embedder.weight"] = s["context_embedder.weight"].T.contiguous()

  edit_tensors(folder / TRANSFORMER, change)


def truncate(folder):
  path = folder / TRANSFORMER
  path.write_bytes(path.read_bytes()[:-100])


def not_a_number(folder):
  def change(s):
    s["context_embedder.bias"][3] = float("nan")

  edit_tensors(folder / TRANSFORMER, change)


def fp8(folder):
  def change(s):
    s["proj_out.weight"] = s["proj_out.weight"].to(torch.float8_e4m3fn)

  edit_tensors(folder / TRANSFORMER, change)


def not_separable(folder):
  def change(s):
    s["pos_embed.pos_embed"][0, 5, 3] += 1

  edit_tensors(folder / TRANSFORMER, change)


def config_field(folder):
  edit_json(folder / "transformer/config.json", lambda c: c.pop("num_layers"))


def config_value(folder):
  edit_json(folder / "transformer/config.json", lambda c: c.update(num_layers="two"))


def config_is_no_json(folder):
  (folder / "vae/config.json").write_text("{")


def qk_norm(folder):
  edit_json(folder / "transformer/config.json", lambda c: c.update(qk_norm=None))


def pipeline_class(folder):
  edit_json(folder / "model_index.json", lambda c: c.update(_class_name="FluxPipeline"))


def no_weights(folder):
  (folder / "vae" / FILES["vae"]).unlink()


GENERATOR = {
  delete_key: ("missing key proj_out.bias", TRANSFORMER),
  rename_key: (
    "unexpected key transformer_blocks.1.attn.to_x.bias",
    "missing key transformer_blocks.1.attn.to_q.bias",
  ),
  reshape: ("context_embedder.weight has shape (32, 16)", "needs (16, 32)"),
  truncate: (TRANSFORMER, "not a whole safetensors file"),
  not_a_number: ("context_embedder.bias holds NaN", TRANSFORMER),
  fp8: ("proj_out.weight has dtype F8_E4M3", "supported are"),
  not_separable: ("pos_embed.pos_embed", "is not a 2-D sincos table"),
  config_field: ("transformer/config.json", "lacks num_layers"),
  config_value: ("transformer/config.json",),
  config_is_no_json: ("vae/config.json is not valid JSON",),
  qk_norm: ("transformer/config.json", "qk_norm=None"),
  pipeline_class: ("FluxPipeline", "not a StableDiffusion3Pipeline"),
  no_weights: ("vae holds no diffusion_pytorch_model.safetensors",),
}


@pytest.mark.parametrize("breaks", GENERATOR, ids=lambda f: f.__name__)
def test_broken_generator(intact, tmp_path, capsys, breaks):
  folder = shutil.copytree(intact / "plain", tmp_path / "sd35")
  breaks(folder)
  message = fails(capsys, tmp_path / "out", "--sd35", folder)
  assert all(part in message for part in GENERATOR[breaks]), message


def delete_shard(folder):
  sorted(folder.glob("*.safetensors"))[1].unlink()


def index_names_too_much(folder):
  def change(index):
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))

  edit_json(next(folder.glob("*.index.json")), change)


def index_names_too_little(folder):
  edit_json(
    next(folder.glob("*.index.json")), lambda i: i["weight_map"].pop("proj_out.bias")
  )


SHARDS = {
  delete_shard: ("names files that do not exist", "-00002-of-"),
  index_names_too_much: ("ghost.weight is in the index", "in no shard"),
  index_names_too_little: ("proj_out.bias is in a shard but not in the index",),
}


@pytest.mark.parametrize("breaks", SHARDS, ids=lambda f: f.__name__)
def test_broken_shards(intact, tmp_path, capsys, breaks):
  folder = shutil.copytree(intact / "sd35", tmp_path / "sd35")
  breaks(folder / "transformer")
  message = fails(capsys, tmp_path / "out", "--sd35", folder)
  assert all(part in message for part in SHARDS[breaks]), message


def test_missing_and_unknown_inputs(intact, base, tmp_path, capsys):
  out = tmp_path / "out"
  assert "model_index.json" in fails(capsys, out, "--sd35", tmp_path)
  assert "no.safetensors" in fails(capsys, out, "--sd35", tmp_path / "no.safetensors")
  message = fails(capsys, out, "--sd35", intact / "plain", "--only", "transfomer")
  assert "transfomer" in message and "'vae'" in message
  message = fails(
    capsys,
    out,
    "--sd35",
    intact / "plain",
    "--only",
    "vae",
    "--reward",
    intact / "dina",
  )
  assert "leaves out the transformer" in message
  assert "--base needs --reward" in fails(capsys, out, "--base", base)
  args = ["--base", tmp_path, "--reward", DINA]
  assert "is not a model folder" in fails(capsys, out, *args)
  stray = {"lora.weight": torch.zeros(2)}
  safetensors.torch.save_file(stray, tmp_path / "x.safetensors")
  message = fails(capsys, out, "--sd35", tmp_path / "x.safetensors")
  assert "unexpected key lora.weight" in message


def test_broken_single_file(tmp_path, capsys):
  state = torch_models.to_stability_layout(
    torch_models.make_transformer(layers=2).state_dict()
  )
  path, out = tmp_path / "sd35.safetensors", tmp_path / "out"

  def run(change):
    broken = dict(state)
    change(broken)
    safetensors.torch.save_file(broken, path)
    return fails(capsys, out, "--sd35", path)

  p = "model.diffusion_model."
  message = run(lambda s: s.pop(f"{p}pos_embed"))
  assert f"missing key {p}pos_embed" in message
  message = run(lambda s: s.update({f"{p}x_embedder.proj.weight": torch.zeros(4, 2)}))
  assert "x_embedder.proj.weight has shape (4, 2)" in message
  message = run(lambda s: s.pop(f"{p}joint_blocks.1.x_block.attn2.qkv.bias"))
  assert "missing key" in message and "joint_blocks.1.x_block.attn2.qkv.bias" in message


def test_values_beyond_the_dtype(intact, tmp_path, capsys):
  folder = shutil.copytree(intact / "plain", tmp_path / "sd35")
  edit_tensors(folder / TRANSFORMER, lambda s: s["proj_out.bias"].fill_(1e6))
  args = ["--sd35", folder, "--only", "transformer", "--dtype", "float16"]
  message = fails(capsys, tmp_path / "out", *args)
  assert "proj_out.bias" in message and "float16's range" in message


# --- reward models ------------------------------------------------------------------


class Malicious:
  """Unpickling it creates a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def malicious(folder):
  state = {"head": Malicious(folder / "executed")}
  torch.save(state, folder / "checkpoint/rm_head.pt")


def malicious_legacy(folder):
  torch.save(
    [Malicious(folder / "executed")],
    folder / "checkpoint/rm_head.pt",
    _use_new_zipfile_serialization=False,
  )


def empty_pickle(folder):
  (folder / "checkpoint/rm_head.pt").write_bytes(b"")


def no_state_dict(folder):
  torch.save(torch.zeros(3), folder / "checkpoint/rm_head.pt")


def head_key(folder):
  path = folder / "checkpoint/rm_head.pt"
  state = torch.load(path)
  del state["attn1.to_q.weight"]
  torch.save(state, path)


def release_field(folder):
  edit_json(folder / "config.json", lambda c: c["model"].pop("visual_head_idx"))


def release_taps(folder):
  edit_json(folder / "config.json", lambda c: c["model"].update(visual_head_idx=[1, 9]))


def release_unknown(folder):
  edit_json(folder / "config.json", lambda c: c["model"]["reward_head"].update(moe=2))


def adapter(**values):
  def change(folder):
    edit_json(
      folder / ADAPTER_FILES / "adapter_config.json", lambda c: c.update(values)
    )

  change.__name__ = next(iter(values))
  return change


def adapter_key(folder):
  edit_tensors(
    folder / ADAPTER_FILES / "adapter_model.safetensors",
    lambda s: s.pop("base_model.model.transformer_blocks.0.attn2.to_v.lora_A.weight"),
  )


REWARD = {
  malicious: ("rm_head.pt cannot be read as a file of tensors only",),
  malicious_legacy: ("rm_head.pt cannot be read as a file of tensors only",),
  empty_pickle: ("rm_head.pt cannot be read",),
  no_state_dict: ("rm_head.pt does not hold a state dict",),
  head_key: ("missing key attn1.to_q.weight", "rm_head.pt"),
  release_field: ("config.json lacks 'visual_head_idx'",),
  release_taps: ("image_taps=(1, 9)", "num_layers=2"),
  release_unknown: ("unknown reward_head settings {'moe': 2}",),
  adapter(use_dora=True): ("adapter_config.json sets {'use_dora': True}",),
  adapter(bias="all"): ("adapter_config.json sets {'bias': 'all'}",),
  adapter(target_modules="all-linear"): ("must be lists of names",),
  adapter(r=3): ("lora_A.weight has shape", "problem(s)"),
  adapter_key: ("missing key base_model.model.transformer_blocks.0.attn2.to_v.lora_A",),
}


@pytest.mark.parametrize("breaks", REWARD, ids=lambda f: f.__name__)
def test_broken_reward(intact, base, tmp_path, capsys, breaks):
  folder = shutil.copytree(intact / "dina", tmp_path / "dina")
  breaks(folder)
  message = fails(capsys, tmp_path / "out", "--base", base, "--reward", folder)
  assert all(part in message for part in REWARD[breaks]), message
  assert not (folder / "executed").exists()


def test_drm_on_another_base(base, tmp_path, capsys):
  args = ["--base", base, "--reward", DRM, "--drm-skip-last", 1]
  message = fails(capsys, tmp_path / "out", *args)
  assert "model.safetensors" in message
  assert "transformer.context_embedder.weight has shape (32, 64)" in message
  lone = shutil.copyfile(DRM, tmp_path / "drm.safetensors")  # without its head.json
  message = fails(capsys, tmp_path / "out", "--base", base, "--reward", lone)
  assert "pass --drm-skip-last" in message


def test_legacy_pickles_of_tensors_are_read(intact, base, tmp_path):
  folder = shutil.copytree(intact / "dina", tmp_path / "dina")
  path = folder / "checkpoint/rm_head.pt"
  torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
  conversion.to_flax(tmp_path / "out", "--base", base, "--reward", folder)


# --- the output folder --------------------------------------------------------------


def test_existing_output(intact, base, tmp_path, capsys):
  out = tmp_path / "out"
  out.mkdir()
  (out / "precious").write_text("kept")
  args = ["--base", base, "--reward", intact / "dina"]
  assert "exists: choose another name or pass --force" in fails(capsys, out, *args)
  broken = shutil.copytree(intact / "dina", tmp_path / "dina")
  head_key(broken)
  fails(capsys, out, "--base", base, "--reward", broken, "--force")
  assert (out / "precious").read_text() == "kept"
  conversion.to_flax(out, *args, "--force")
  assert not (out / "precious").exists() and (out / "config.json").exists()
  assert {p.name for p in tmp_path.iterdir()} == {"out", "dina"}


def test_output_that_would_replace_its_source(intact, base, tmp_path, capsys):
  args = ["--base", base, "--reward", intact / "dina", "--force"]
  for out in (base, intact / "dina", intact):
    message = fails(capsys, out, *args)
    assert "would replace its own source" in message
  assert (base / "transformer").is_dir() and (intact / "dina" / "config.json").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, engine.ConversionError, OSError])
@pytest.mark.parametrize("force", [False, True])
def test_interruption(intact, base, tmp_path, capsys, monkeypatch, stop, force):
  """Half of the components written, then this."""
  out = tmp_path / "out"
  if force:
    out.mkdir()
    (out / "precious").write_text("kept")

  def save(path, leaves):
    path.mkdir()
    (path / "half").write_text("written")
    raise stop("stopped in the middle")

  monkeypatch.setattr(folder_lib, "save_params", save)
  args = ["--base", base, "--reward", intact / "dina", *["--force"][: int(force)]]
  if stop is KeyboardInterrupt:
    with pytest.raises(SystemExit) as caught:
      conversion.to_flax(out, *args)
    assert caught.value.code == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err
  else:
    assert "stopped in the middle" in fails(capsys, out, *args)
  assert [p.name for p in tmp_path.iterdir()] == ["out"][: int(force)]
  if force:
    assert [p.name for p in out.iterdir()] == ["precious"]


# --- the way back -------------------------------------------------------------------


def to_torch(out, *args):
  return conversion.to_torch(args[0], args[1], out, *args[2:])


def test_export_errors(intact, base, golden_folders, tmp_path, capsys):
  def export(out, *args):
    return fails(capsys, tmp_path / out, *args, to=to_torch)

  assert "is not a model folder" in export("a", tmp_path, "dina")
  assert "holds no component 'reward'" in export("a", base, "dina")
  assert "holds no component 'lora'" in export("a.safetensors", base, "lora")
  assert "holds no component 'vae'" in export("a", base, "diffusers")
  message = export("a", golden_folders.drm, "dina")
  assert "try --format drm" in message
  message = export("a.pt", golden_folders.dina, "drm")
  assert "try --format dina" in message
  assert "drm.zip" in export("drm.zip", golden_folders.drm, "drm")
  assert "one .safetensors" in export("lora.pt", golden_folders.dina, "lora")

  (tmp_path / "old").mkdir()
  assert "pass --force" in export("old", golden_folders.dina, "dina")
  (tmp_path / "head.json").write_text("{}")
  assert "head.json exists" in export("drm.pt", golden_folders.drm, "drm")
  to_torch(tmp_path / "drm.pt", golden_folders.drm, "drm", "--force")
  assert json.loads((tmp_path / "head.json").read_text())["skip_last_blocks"] == 2


def test_incomplete_model_folder(base, tmp_path, capsys):
  folder = shutil.copytree(base, tmp_path / "base")
  shutil.rmtree(folder / "transformer")
  edit_json(folder / "config.json", lambda c: c["components"].update(lora={}))
  args = ["--base", folder, "--reward", DRM, "--drm-skip-last", 1]
  fails(capsys, tmp_path / "out", *args)
  edit_json(folder / "config.json", lambda c: c.update(version=99))
  message = fails(capsys, tmp_path / "out.safetensors", folder, "lora", to=to_torch)
  assert "99" in message and "convert the checkpoint again" in message


def test_export_refuses_what_the_format_leaves_out(intact, base, tmp_path, capsys):
  """A trained adapter where the release has none would be lost in silence."""
  out = tmp_path / "flax"
  conversion.to_flax(out, "--base", base, "--reward", intact / "dina")
  edit_json(
    out / "config.json",
    lambda c: c["components"]["reward"]["adapter"].update(
      exclude_modules=["transformer_blocks.1.attn.add_q_proj"]
    ),
  )
  message = fails(capsys, tmp_path / "back", out, "dina", to=to_torch)
  assert "transformer_blocks.1.attn.add_q_proj" in message
  assert "not in this layout" in message


def test_nan_in_bfloat16():
  """bfloat16 has its own test for NaN (ml_dtypes' is slow)."""
  import torch_files

  array = np.ones(5, ml_dtypes.bfloat16)
  assert torch_files._is_finite(array)
  for bad in (np.nan, np.inf, -np.inf):
    array[2] = bad
    assert not torch_files._is_finite(array)


def test_termination_cleans_up(intact, base, tmp_path, monkeypatch):
  """SIGTERM, e.g. from a scheduler, ends like an error."""
  import os
  import signal

  monkeypatch.setattr(
    torch_to_flax, "convert", lambda *args: os.kill(os.getpid(), signal.SIGTERM)
  )
  with pytest.raises(SystemExit) as caught:
    args = ["--base", base, "--reward", intact / "dina"]
    conversion.to_flax(tmp_path / "out", *args)
  assert caught.value.code == 128 + signal.SIGTERM
  assert not list(tmp_path.iterdir())
