"""FLOP formulas against torch's counts of the published models."""

import pytest

from lrm_jax import flops
from lrm_jax.models import conv_head, mmdit, qformer_head, reward

MEDIUM = mmdit.MMDiTConfig.sd35_medium()
LARGE = mmdit.MMDiTConfig.sd35_large()


def kept(num):
  return MEDIUM.truncate(num, has_output=False)


# (config, image side in pixels, text tokens, TFLOP of one sample)
FORWARD = [
  (kept(12), 512, 205, 1.2593),
  (kept(12), 512, 333, 1.3723),
  (kept(12), 512, 589, 1.6055),
  (kept(12), 1024, 205, 6.4552),
  (kept(12), 1024, 333, 6.6262),
  (kept(12), 1024, 589, 6.9754),
  (kept(21), 512, 333, 2.1920),
  (kept(21), 1024, 333, 10.1488),
  (MEDIUM, 512, 205, 2.2237),
  (MEDIUM, 512, 333, 2.4426),
  (MEDIUM, 1024, 589, 11.9339),
  (LARGE, 512, 333, 7.9778),
  (LARGE, 1024, 205, 30.0287),
]


@pytest.mark.parametrize("config, pixels, length, tera", FORWARD)
def test_transformer(config, pixels, length, tera):
  n = flops.image_tokens(config, pixels // 8, pixels // 8)
  assert round(flops.mmdit(config, n, length) / 1e12, 4) == tera


@pytest.mark.parametrize(
  "pixels, length, giga", [(512, 205, 36.215), (512, 333, 38.937), (1024, 333, 133.318)]
)
def test_qformer_head(pixels, length, giga):
  config = qformer_head.QFormerHeadConfig()
  n = flops.image_tokens(MEDIUM, pixels // 8, pixels // 8)
  assert round(flops.qformer_head(config, n, length) / 1e9, 3) == giga


def test_score_of_dina_is_the_sum_of_its_parts():
  config = reward.RewardConfig.dina_sd35m_12layers()
  parts = (
    flops.mmdit(config.backbone, 1024, 333),
    flops.qformer_head(config.head, 1024, 333),
    # 12 blocks of 8 image and 4 text projections, rank 64.
    12 * (8 * 1024 + 4 * 333) * 2 * 2 * 1536 * 64,
  )
  assert flops.reward(config, 64, 64, 333) == sum(parts)


def count_with_torch(module, *args) -> int:
  """On the meta device: the CPU's attention kernel is not counted."""
  from torch.utils import flop_counter

  module, args = module.to("meta"), [a.to("meta") for a in args]
  with flop_counter.FlopCounterMode(display=False) as counter:
    module(*args)
  return counter.get_total_flops()


@pytest.mark.parametrize("dual", [(), (0, 2)])
def test_small_transformer_against_torch(dual):
  torch = pytest.importorskip("torch")
  from tests import torch_models

  theirs = torch_models.make_transformer(layers=3, dual=dual)
  config = mmdit.MMDiTConfig.from_diffusers(theirs.config)
  args = torch.zeros(1, 16, 6, 10), torch.zeros(1, 7, 32), torch.zeros(1, 28)
  found = count_with_torch(theirs, *args, torch.zeros(1))
  assert flops.mmdit(config, 15, 7) == found


@pytest.mark.parametrize("width, lora_rank", [(-1, 0), (32, 3)])
def test_small_dina_against_torch(width, lora_rank):
  torch = pytest.importorskip("torch")
  from lrm_jax.models import lora
  from tests import torch_models

  release = torch_models.DinaConfig(width=width, lora_rank=lora_rank)
  transformer = torch_models.make_transformer()
  full = mmdit.MMDiTConfig.from_diffusers(transformer.config)
  theirs = torch_models.DinaReward(transformer, release)
  config = reward.RewardConfig(
    full.truncate(2, has_output=False, image_taps=(1, 2), text_taps=(1, 2)),
    qformer_head.QFormerHeadConfig(
      token_dim=16,
      width=16 if width == -1 else width,
      num_image_taps=2,
      num_text_taps=2,
    ),
    lora.LoRAConfig(lora_rank, 8) if lora_rank else None,
  )
  args = torch.zeros(1, 16, 6, 10), torch.zeros(1), torch.zeros(1, 7, 32)
  found = count_with_torch(theirs, *args, torch.zeros(1, 28))
  assert flops.reward(config, 6, 10, 7) == found


def test_small_drm_against_torch():
  torch = pytest.importorskip("torch")
  from tests import torch_models

  transformer = torch_models.make_transformer()
  full = mmdit.MMDiTConfig.from_diffusers(transformer.config)
  theirs = torch_models.DrmReward(transformer, skip_last_blocks=1, num_groups=8)
  config = reward.RewardConfig(
    full.truncate(2, has_output=True),
    conv_head.ConvHeadConfig(base_channels=32, num_groups=8),
  )
  args = torch.zeros(1, 16, 6, 10), torch.zeros(1), torch.zeros(1, 7, 32)
  found = count_with_torch(theirs, *args, torch.zeros(1, 28))
  assert flops.reward(config, 6, 10, 7) == found


@pytest.mark.parametrize(
  ("pixels", "length", "frozen", "trained"),
  # TFLOP of forward and backward: frozen (2 linear + 3 attention), all trained.
  [(512, 333, 2.96, 4.12), (1024, 333, 15.93, 19.88)],
)
def test_training_costs_two_to_three_forward_passes(pixels, length, frozen, trained):
  config = reward.RewardConfig.dina_sd35m_12layers()
  side = pixels // 8
  n = flops.image_tokens(config.backbone, side, side)
  head = 3 * flops.qformer_head(config.head, n, length)
  for train_backbone, tera in ((False, frozen), (True, trained)):
    total = flops.reward_training(
      config, side, side, length, train_backbone=train_backbone
    )
    assert (total - head) / 1e12 == pytest.approx(tera, abs=0.01)


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H200", 990e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("cpu", None),
  ],
)
def test_peaks_by_device_kind(kind, peak):
  assert flops.peak(kind) == peak
