"""--verify finds what is wrong, and diffusers reads the adapters that we export."""

import json
import re

from flax import nnx
import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import safetensors
import torch
import torch_to_flax

from lrm_jax import build, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import lora, mmdit
from tests import conversion, helpers
from tests.conversion import DINA, SD35

NAMES = ["transformer", "vae", "clip_l", "clip_g", "t5", "reward"]


def test_goldens_pass(golden_folders):
  assert golden_folders.dina.is_dir()  # converted with --verify
  lines = golden_folders.verified.splitlines()[:-1]
  found = [re.fullmatch(r"(\w+) +(\S+)  1e-03  ok", line) for line in lines]
  assert [m[1] for m in found] == NAMES
  assert all(float(m[2]) < 1e-4 for m in found)


def test_reward_on_base(golden_folders, tmp_path):
  args = ["--base", golden_folders.dina, "--reward", DINA, "--verify"]
  printed = conversion.to_flax(tmp_path / "out", *args)
  assert re.match(r"reward +\S+  1e-03  ok\n", printed)


@pytest.mark.parametrize(
  "path, change",
  [
    ("out_modulation/bias", lambda a: np.concatenate(np.split(a, 2)[::-1])),
    ("pos_embed", lambda a: np.roll(a, 1, axis=1)),
    ("out/bias", lambda a: np.full_like(a, np.nan)),
  ],
)
def test_a_wrong_parameter_is_found(tmp_path, monkeypatch, capsys, path, change):
  save = folder_lib.save_params

  def save_wrong(folder, leaves):
    save(folder, {**leaves, path: change(leaves[path])})

  monkeypatch.setattr(folder_lib, "save_params", save_wrong)
  args = ["--sd35", SD35, "--only", "transformer", "--out", tmp_path / "out"]
  with pytest.raises(SystemExit) as caught:
    torch_to_flax.main([str(a) for a in [*args, "--verify"]])
  assert "verification failed: transformer (" in str(caught.value.code)
  assert re.match(r"transformer +\S+  1e-03  FAILED", capsys.readouterr().out)
  assert not list(tmp_path.iterdir())


# --- a generator's adapters ---------------------------------------------------------

LORAS = {
  "joint": lora.LoRAConfig(rank=3, alpha=12, targets=lora.JOINT_ATTENTION),
  "without_last_text": lora.LoRAConfig(rank=2, alpha=2, last_context=False),
}


@pytest.mark.parametrize("name", LORAS)
@torch.no_grad()
def test_generator_adapters_in_diffusers(golden_folders, tmp_path, name):
  config = LORAS[name]
  base = build.load_transformer(golden_folders.dina)

  def make():
    model = mmdit.MMDiT(base.config, rngs=nnx.Rngs(0))
    lora.add_adapters(model, config, rngs=nnx.Rngs(0))
    return model

  graphdef, like = weights.abstract(make)
  rng = np.random.default_rng(0)
  params = {}
  for path, leaf in weights.flatten(like).items():
    params[path] = 0.3 * rng.standard_normal(leaf.shape, np.float32)
    if not config.last_context and path.startswith("blocks/2/attn/context_"):
      params[path][:] = 0  # what stays zero in training
  params |= weights.flatten(base.params)
  params = weights.unflatten(params)

  with folder_lib.write_atomically(tmp_path / "model", force=False) as out:
    entry = build.save_lora(out, params, config)
    folder_lib.write_config(
      out, {"components": {"lora": entry}, "base": str(golden_folders.dina)}
    )
  file = tmp_path / "lora.safetensors"
  conversion.to_torch(tmp_path / "model", "lora", file)

  pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(SD35)
  x, t, context, pooled = conversion.inputs(context_dim=64, pooled_dim=64)
  without = pipe.transformer(x, context, pooled, t).sample
  pipe.load_lora_weights(file)
  (loaded,) = pipe.transformer.peft_config.values()
  assert (loaded.r, loaded.lora_alpha) == (config.rank, config.alpha)
  velocity = pipe.transformer(x, context, pooled, t).sample
  x, sigma, cond = conversion.as_ours(x, t, context, pooled)
  run = jax.jit(lambda p, *args: nnx.merge(graphdef, p)(*args)[0])
  ours = helpers.nchw(run(params, x, 1000 * sigma, cond))
  assert helpers.rel_err(ours, velocity) < 5e-5
  assert helpers.rel_err(without, velocity) > 1e-2  # the adapters matter

  keys = conversion.tensors(file).keys()
  assert any("attn2" in k for k in keys) == (name != "joint")
  assert any("blocks.5.attn.add_q_proj" in k for k in keys) == config.last_context
  with safetensors.safe_open(file, "np") as f:
    metadata = json.loads(f.metadata()["lora_adapter_metadata"])
  assert metadata["transformer.lora_alpha"] == config.alpha


def test_save_lora_needs_adapters(golden_folders, tmp_path):
  base = build.load_transformer(golden_folders.dina)
  with pytest.raises(ValueError, match="hold no lora_a"):
    build.save_lora(tmp_path, base.params, LORAS["joint"])
