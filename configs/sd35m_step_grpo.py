"""Step-GRPO of DRM (arXiv 2605.25661) on SD3.5-Medium.

  python train/align.py --config configs/sd35m_step_grpo.py

At every step k candidates of one state, compared at their own noise level; 24 samples
of a prompt.
"""

from ml_collections import ConfigDict

from lrm_jax import align_recipe


def get_config() -> ConfigDict:
  c = align_recipe.sd35_medium("step_grpo")
  c.train.learning_rate = 1e-4

  c.group = ConfigDict()
  c.group.group_size = 24  # samples of a prompt
  c.group.candidates = 6  # k
  c.group.chunk = 2  # candidates scored at a time; None: all

  c.loss = ConfigDict()
  c.loss.clip_range = 1e-4
  c.loss.max_advantage = 5.0
  c.loss.kl_coef = 0.01
  return c
