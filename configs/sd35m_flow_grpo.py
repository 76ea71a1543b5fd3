"""Flow-GRPO (arXiv 2505.05470) on SD3.5-Medium, with a latent reward.

  python train/align.py --config configs/sd35m_flow_grpo.py
  python train/align.py --config configs/sd35m_flow_grpo.py:fast

"fast" is Flow-GRPO-Fast: two steps drawn at random are stochastic and trained on, the
others are the ODE's.
"""

from ml_collections import ConfigDict

from lrm_jax import align_recipe


def get_config(steps: str = "all") -> ConfigDict:
  if steps not in ("all", "fast"):
    raise ValueError(f"configs/sd35m_flow_grpo.py:{steps}: use all or fast")
  c = align_recipe.sd35_medium("flow_grpo")

  c.group = ConfigDict()
  c.group.group_size = 24  # samples of a prompt, which are compared
  c.group.global_std = False  # advantages in units of all rewards' std

  c.loss = ConfigDict()
  c.loss.clip_range = 1e-4
  c.loss.max_advantage = 5.0
  c.loss.kl_coef = 0.04
  if steps == "fast":
    c.workdir = "runs/sd35m_flow_grpo_fast"
    c.rollout.sde_window_size = 2
    c.rollout.sde_window_range = (0, 5)  # the noisy half
    c.loss.clip_range = 1e-5
  return c
