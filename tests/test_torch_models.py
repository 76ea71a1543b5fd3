"""The oracle itself: held against the goldens, and its files against diffusers."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
from diffusers.loaders import single_file_utils
import numpy as np
import safetensors.torch
import torch
import transformers

from tests import torch_models

GOLDEN = torch_models.GOLDEN


def rel(a, b):
  return float((a - b).norm() / b.norm())


def load_transformer():
  folder = GOLDEN / "dina" / "sd35" / "transformer"
  return diffusers.SD3Transformer2DModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def dina():
  model = torch_models.read_dina_release(GOLDEN / "dina" / "reward", load_transformer())
  return model, safetensors.torch.load_file(GOLDEN / "dina" / "expected.safetensors")


def dina_inputs(e, u):
  i = int((e["reward/u"] - u).abs().argmin())
  sigma, t = e["reward/sigma_of_u"][i], e["reward/timestep_of_u"][i]
  x = (1 - sigma) * e["reward/clean_latents"] + sigma * e["reward/noise"]
  return x, t.expand(len(x))


@pytest.mark.parametrize("u", [0.0, 0.1, 0.4, 0.9, 1.0])
@torch.no_grad()
def test_dina_scores(dina, u):
  model, e = dina
  cond = e["prompt_embeds"], e["pooled_prompt_embeds"]
  assert rel(model(*dina_inputs(e, u), *cond), e[f"reward/score_u{u}"]) < 2e-5


@torch.no_grad()
def test_dina_features(dina):
  model, e = dina
  cond = e["prompt_embeds"], e["pooled_prompt_embeds"]
  temb, image, text = model.features(*dina_inputs(e, 0.4), *cond)
  assert rel(temb, e["reward/temb_u0.4"]) < 1e-5
  for j in range(3):
    assert rel(image[j], e[f"reward/visual_{j}_u0.4"]) < 1e-5
    assert rel(text[j], e[f"reward/text_{j}_u0.4"]) < 1e-5


@torch.no_grad()
def test_dina_ensemble(dina):
  model, e = dina
  levels = [dina_inputs(e, float(u)) for u in e["reward/ensemble_u"]]
  x, t = zip(*levels, strict=True)
  score = model.ensemble(x, t, e["prompt_embeds"], e["pooled_prompt_embeds"])
  assert rel(score, e["reward/ensemble_score"]) < 2e-5


def test_dina_gradients(dina):
  model, e = dina
  cond = e["prompt_embeds"], e["pooled_prompt_embeds"]
  sigma = e["train/sigma"].view(-1, 1, 1, 1)
  noisy = [
    (1 - sigma) * e[f"train/{name}"] + sigma * e["train/noise"]
    for name in ("chosen", "reject")
  ]
  chosen, reject = (model(x, e["train/timesteps"], *cond) for x in noisy)
  assert rel(chosen.detach(), e["train/score_chosen"]) < 2e-5
  assert rel(reject.detach(), e["train/score_reject"]) < 2e-5
  var = 2 * e["train/sigma"][:, None] ** 2 + 0.05
  p = torch.special.ndtr((chosen - reject) / torch.sqrt(2 * var + 1e-6))
  loss = (1 - torch.sqrt(p + 1e-6)).mean()
  assert rel(loss.detach()[None], e["train/loss"]) < 1e-4
  model.zero_grad()
  loss.backward()

  expected = safetensors.torch.load_file(GOLDEN / "dina" / "expected_grads.safetensors")
  found = {
    name.replace("base_model.model.", "").replace(".default", ""): p.grad
    for name, p in model.named_parameters()
    if p.requires_grad
  }
  assert set(expected) == set(found)
  # Together: single gradients may be rounding noise (a bias that softmax ignores).
  keys = sorted(expected)
  flat = [torch.cat([g[k].flatten() for k in keys]) for g in (found, expected)]
  assert rel(*flat) < 1e-4
  for key in (
    "reward_head.query_tokens",
    "reward_head.attn1.gate_text.2.weight",
    "backbone.transformer_blocks.0.attn2.to_v.lora_A.weight",
    "backbone.transformer_blocks.3.attn.to_out.0.lora_B.weight",
  ):
    assert rel(found[key], expected[key]) < 1e-4, key


@pytest.fixture(scope="module")
def drm():
  model = torch_models.DrmReward(
    load_transformer(), skip_last_blocks=2, base_channels=32, num_groups=32
  )
  model.load_state_dict(
    safetensors.torch.load_file(GOLDEN / "drm" / "model.safetensors")
  )
  return model, safetensors.torch.load_file(GOLDEN / "drm" / "expected.safetensors")


@pytest.mark.parametrize("t", ["0", "250", "751.5", "1000"])
@torch.no_grad()
def test_drm_scores(drm, t):
  model, e = drm
  cond = e["encoder_hidden_states"], e["pooled_projections"]
  args = e["latents"], torch.full((3,), float(t)), *cond
  assert rel(model(*args), e[f"score_t{t}"]) < 2e-5
  if t == "250":
    assert rel(model.features(*args), e["features_t250"]) < 1e-5


def test_drm_gradients(drm):
  model, e = drm
  cond = e["encoder_hidden_states"], e["pooled_projections"]
  sigma = e["sigma"].view(-1, 1, 1, 1)
  win, lose = (
    model((1 - sigma) * e[s] + sigma * e[f"noise_{s}"], 1000 * e["sigma"], *cond)
    for s in ("win", "lose")
  )
  loss = -torch.nn.functional.logsigmoid(win - lose).mean()
  assert rel(loss.detach()[None], e["bt_loss"]) < 2e-5
  model.zero_grad()
  loss.backward()
  expected = safetensors.torch.load_file(GOLDEN / "drm" / "expected_grads.safetensors")
  found = {k: p.grad for k, p in model.named_parameters() if k in expected}
  assert set(found) == set(expected)
  flat = [torch.cat([g[k].flatten() for k in expected]) for g in (found, expected)]
  assert rel(*flat) < 1e-4


@pytest.mark.parametrize(
  "config",
  [
    torch_models.DinaConfig(),
    torch_models.DinaConfig(width=32, num_queries=3, num_heads=4, lora_rank=3),
    torch_models.DinaConfig(use_proj_in=True, image_taps=(0, 2), text_taps=(1,)),
    torch_models.DinaConfig(lora_rank=0),
  ],
  ids=["plain", "width", "proj_in", "no_lora"],
)
@torch.no_grad()
def test_dina_release_round_trip(tmp_path, config):
  model = torch_models.DinaReward(torch_models.make_transformer(), config, seed=1)
  folder = torch_models.write_dina_release(tmp_path / "release", model)
  again = torch_models.read_dina_release(folder, torch_models.make_transformer())
  g = torch.Generator().manual_seed(0)
  args = (
    torch.randn(2, 16, 4, 6, generator=g),
    torch.tensor([100.0, 900.0]),
    torch.randn(2, 5, 32, generator=g),
    torch.randn(2, 28, generator=g),
  )
  score = model(*args)
  assert score.shape == (2, 1) and torch.equal(score, again(*args))
  assert abs(float(score[0] - score[1])) > 1e-3  # the input matters

  if config.lora_rank:
    lora = safetensors.torch.load_file(
      folder / "checkpoint" / "backbone_lora" / "adapter_model.safetensors"
    )
    text_of_last = [k for k in lora if "blocks.1.attn.add_q" in k]
    assert bool(text_of_last) == (2 in config.text_taps)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_drm_file_round_trip(tmp_path, suffix):
  model = torch_models.DrmReward(
    torch_models.make_transformer(), skip_last_blocks=1, num_groups=8
  )
  path = torch_models.write_drm(tmp_path / f"drm{suffix}", model)
  if suffix == ".pt":
    state = torch.load(path, weights_only=True)
  else:
    state = safetensors.torch.load_file(path)
  assert any(k.startswith("transformer.transformer_blocks.2.") for k in state)
  for key, value in model.state_dict().items():
    assert torch.equal(value, state[key])
  with pytest.raises(ValueError, match="should end in"):
    torch_models.write_drm(tmp_path / "drm.bin", model)


@torch.no_grad()
def test_drm_without_skipping_is_the_transformer():
  """features of all blocks = the velocity that diffusers computes."""
  transformer = torch_models.make_transformer(seed=2)
  model = torch_models.DrmReward(transformer, skip_last_blocks=0)
  g = torch.Generator().manual_seed(0)
  x, t = torch.randn(2, 16, 6, 4, generator=g), torch.tensor([10.0, 700.0])
  context, pooled = (torch.randn(2, *s, generator=g) for s in ((5, 32), (28,)))
  v = transformer(x, context, pooled, t).sample
  assert rel(model.features(x, t, context, pooled), v) < 1e-5


@pytest.mark.parametrize("max_shard_size", [None, "40KB"])
@torch.no_grad()
def test_pipeline_folder_loads(tmp_path, max_shard_size):
  folder = torch_models.make_sd35_folder(
    tmp_path / "sd35", seed=3, max_shard_size=max_shard_size
  )
  index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
  assert index.exists() == (max_shard_size is not None)
  pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
  pipe.set_progress_bar_config(disable=True)
  for name, model in pipe.components.items():
    if isinstance(model, torch.nn.Module):
      assert all(p.dtype == torch.float32 for p in model.parameters()), name
  images = [
    pipe(
      prompt,
      height=16,
      width=24,
      num_inference_steps=2,
      max_sequence_length=8,
      generator=torch.Generator().manual_seed(0),
      output_type="np",
    ).images
    for prompt in ("a photo of a cat", "two dogs")
  ]
  assert images[0].shape == (1, 16, 24, 3)
  # Random weights that let the prompt through to the pixels.
  assert np.abs(images[0] - images[1]).mean() > 1e-4


def test_pipeline_folder_dtype(tmp_path):
  folder = torch_models.make_sd35_folder(tmp_path / "sd35", dtype=torch.bfloat16)
  for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
    for file in (folder / name).glob("*.safetensors"):
      tensors = safetensors.torch.load_file(file)
      assert {t.dtype for t in tensors.values()} == {torch.bfloat16}, name
  with pytest.raises(ValueError, match="do not fit joint_dim=8"):
    torch_models.make_sd35_folder(tmp_path / "other", joint_dim=8)


def test_random_clip_keeps_its_legacy_end_token(tmp_path):
  folder = torch_models.make_sd35_folder(tmp_path / "sd35")
  configs = [
    transformers.CLIPTextConfig.from_pretrained(folder / name)
    for name in ("text_encoder", "text_encoder_2")
  ]
  assert [c.eos_token_id for c in configs] == [2, 545]


def test_stability_layout_is_what_diffusers_inverts():
  transformer = torch_models.make_transformer(seed=5, layers=4, dual=(0, 2))
  vae = torch_models.make_vae(seed=6, channels=(4, 8, 8), layers=2)
  single = torch_models.to_stability_layout(transformer.state_dict(), vae.state_dict())
  assert "model.diffusion_model.joint_blocks.2.x_block.attn2.qkv.weight" in single
  assert "model.diffusion_model.joint_blocks.1.x_block.attn2.qkv.weight" not in single
  assert "first_stage_model.decoder.up.2.block.0.conv1.weight" in single

  back = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
    {k: v for k, v in single.items() if k.startswith("model.diffusion_model.")}
  )
  want = transformer.state_dict()
  assert set(back) == set(want)
  assert all(torch.equal(back[k], want[k]) for k in want)

  back = single_file_utils.convert_ldm_vae_checkpoint(single, vae.config)
  want = vae.state_dict()
  assert set(back) == set(want)
  assert all(torch.equal(back[k], want[k]) for k in want)
