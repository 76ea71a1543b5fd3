"""ReFL with DiNa-LRM's latent reward (arXiv 2602.11146) on SD3.5-Medium.

  python train/align.py --config configs/sd35m_refl.py
  python train/align.py --config configs/sd35m_refl.py:real

The reward's gradient through one of the last ten of 40 steps; no decoder in the loop.
"real" adds the flow-matching loss on real latents, against reward hacking.
"""

from ml_collections import ConfigDict

from lrm_jax import align_recipe


def get_config(data: str = "none") -> ConfigDict:
  if data not in ("none", "real"):
    raise ValueError(f"configs/sd35m_refl.py:{data}: use none or real")
  c = align_recipe.sd35_medium("refl")
  c.rewards = ConfigDict(dict(dina=dict(folder="models/dina_sd35m", weight=1.0)))
  c.aot.rewards = ConfigDict(dict(dina="dina_sd35m_12layers"))
  c.rollout.num_steps = 40
  c.train.prompts = 32
  c.train.minibatches = 1
  c.train.micro_batches = 1
  c.train.learning_rate = 1e-4

  c.loss = ConfigDict()
  c.loss.window = (30, 40)  # the step with gradients is one of these
  c.loss.target = 2.0  # loss = target - reported reward

  c.real = ConfigDict()  # pairs, of which the preferred latents are read
  c.real.weight = 0.0  # of the flow-matching loss
  c.real.kind = "parquet"  # or "tfds"
  c.real.train = "data/hpdv3_train_512"
  c.real.held_out = "data/hpdv3_test_512"
  c.real.prompts = "data/prompts_t5_128"
  c.real.batch_size = 32
  c.real.cache_blocks = 64  # decoded row groups in memory
  if data == "real":
    c.workdir = "runs/sd35m_refl_real"
    c.real.weight = 0.5
  return c
