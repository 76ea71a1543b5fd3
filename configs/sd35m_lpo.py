"""LPO (arXiv 2502.01051) on SD3.5-Medium: step-level preference optimisation.

  python train/align.py --config configs/sd35m_lpo.py

At every step the best and the worst of k = 4 candidates, where their scores differ by
more than a threshold that grows with the noise level.
"""

from ml_collections import ConfigDict, config_dict

from lrm_jax import align_recipe


def get_config() -> ConfigDict:
  c = align_recipe.sd35_medium("lpo")
  c.train.prompts = 96
  c.train.learning_rate = 1e-4

  c.group = ConfigDict()
  c.group.group_size = 1
  c.group.candidates = 4  # k
  c.group.chunk = config_dict.placeholder(int)

  c.loss = ConfigDict()
  c.loss.threshold = (0.35, 0.5)  # at sigma 0 and 1, of the softmax gap
  c.loss.beta = 500.0
  c.loss.ratio_clip = 0.1
  return c
