"""Aligns the quickstart's digit generator, on a CPU; after `make quickstart`.

  python train/align.py --config configs/quickstart_align.py             # Step-GRPO
  python train/align.py --config configs/quickstart_align.py:flow_grpo   # or lpo, refl

All of them, three seeds, compared at equal evaluations:

  python train/compare_align.py --config configs/quickstart_align.py
"""

from ml_collections import ConfigDict, config_dict


def get_config(method: str = "step_grpo") -> ConfigDict:
  if method not in ("step_grpo", "flow_grpo", "lpo", "refl"):
    raise ValueError(
      f"configs/quickstart_align.py:{method}: use step_grpo, flow_grpo, lpo or refl"
    )
  c = ConfigDict()
  c.seed = 0
  c.wandb_project = config_dict.placeholder(str)
  c.workdir = f"runs/quickstart/align/{method}"
  c.method = method

  c.prompts = ConfigDict()
  c.prompts.train = "configs/quickstart_prompts.txt"  # all 40 of digits.PROMPTS
  c.prompts.eval = "configs/quickstart_prompts.txt"
  c.prompts.cache = "runs/quickstart/pairs/prompts"
  c.prompts.t5_length = 0  # the toy embeddings have none

  c.model = ConfigDict()
  c.model.generator = "runs/quickstart/generator/model"
  c.model.dtype = "float32"
  c.model.scan_blocks = True
  c.model.remat = "none"
  c.model.attention_impl = "auto"
  c.decoder = "digits"

  c.lora = ConfigDict(dict(rank=8, alpha=16, targets="joint_attention"))

  c.rewards = ConfigDict(
    dict(reward=dict(folder="runs/quickstart/reward/model", weight=1.0))
  )
  # The oracle never saw a reward, and no reward saw it.
  c.pixel_rewards = ConfigDict(
    dict(oracle=dict(function="lrm_jax.data.digits:oracle_probability", weight=0.0))
  )
  c.golden = ConfigDict()
  c.golden.metric = "pixel/oracle"
  # A whole curve is what the comparison is about.
  c.golden.patience = config_dict.placeholder(int)
  c.golden.min_delta = 0.0

  c.rollout = ConfigDict()
  c.rollout.height = 64  # pixels of an image whose latent is 8x8
  c.rollout.width = 64
  c.rollout.num_steps = 10
  c.rollout.shift = 1.0
  c.rollout.sampler = "sde"
  c.rollout.noise_level = 0.7
  c.rollout.guidance_scale = 1.0  # none: leaves headroom
  c.rollout.sde_window_size = config_dict.placeholder(int)
  c.rollout.sde_window_range = config_dict.placeholder(tuple)

  c.group = ConfigDict()
  c.group.group_size = 8
  if method in ("step_grpo", "lpo"):
    c.group.candidates = 4
    c.group.chunk = config_dict.placeholder(int)

  c.loss = ConfigDict()
  if method in ("step_grpo", "flow_grpo"):
    c.loss.clip_range = 1e-3
    c.loss.max_advantage = 5.0
    c.loss.kl_coef = 0.1
  elif method == "lpo":
    c.loss.threshold = (0.35, 0.5)  # at sigma 0 and 1, of the softmax gap
    c.loss.beta = 500.0
    c.loss.ratio_clip = 0.1
  else:
    c.loss.window = (7, 10)  # the step with gradients is one of these
    c.loss.target = 2.0

  c.real = ConfigDict()  # of ReFL
  c.real.weight = 0.0

  c.train = ConfigDict()
  c.train.num_iterations = 40
  c.train.prompts = 40  # per iteration: each one once
  c.train.inner_epochs = 1
  c.train.rollout_parts = 1
  c.train.minibatches = 1
  c.train.micro_batches = 1
  c.train.timestep_fraction = 0.99  # not the last step
  c.train.learning_rate = 3e-3
  c.train.warmup_steps = 0
  c.train.schedule = "constant"
  c.train.weight_decay = 0.0
  c.train.clip_norm = 1.0
  c.train.ema_decay = config_dict.placeholder(float)
  c.train.log_every = 1  # iterations
  c.train.checkpoint_every = 20
  c.train.keep_checkpoints = 1
  c.train.keep_best = 1  # by the oracle

  c.eval = ConfigDict()
  c.eval.every = 4  # iterations
  c.eval.seed = 0
  c.eval.prompts = 40  # at a time
  c.eval.num = 5  # samples of each
  c.eval.num_steps = 10
  c.eval.sampler = "sde"
  c.eval.guidance_scale = 1.0
  c.eval.images = 40  # prompts whose images are kept
  c.eval.decode_batch = 200

  c.mesh = ConfigDict()
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.sharding = ((".*", "replicate"),)
  c.compare = comparison()  # train/compare_align.py only
  return c


def comparison() -> ConfigDict:
  """The runs of train/compare_align.py; the same from each method's recipe."""
  c = ConfigDict()
  c.workdir = "runs/quickstart/align"
  # Does `fast` reach the final reward of `slow` with 1 / claim of its evaluations?
  c.fast = "step_grpo"
  c.slow = "flow_grpo"
  c.claim = 2.5  # DRM's
  # Evaluations whose mean is a run's final value. They have the same noise, so that
  # curves are smooth.
  c.tail = 1
  c.drifts = (0.25, 0.5, 1.0)  # of the way to the Frechet distance that both reach
  c.images = 3  # samples of a prompt in before_after.png
  c.split_seed = 0  # of the digits, as configs/quickstart.py has it

  def run(method, label, seeds, *, iterations, evaluate_every, **train):
    """`settings` are what differs from this file's recipe of the method."""
    train |= dict(num_iterations=iterations, keep_best=0)
    settings = dict(train=train, eval=dict(every=evaluate_every))
    return dict(method=method, label=label, seeds=seeds, settings=settings)

  three = (0, 1, 2)
  # 16 iterations of 40 x 8 samples at 70 passes, and 24 at 46.7, are as many.
  step = dict(iterations=16, evaluate_every=2)
  flow = dict(iterations=24, evaluate_every=3)
  c.runs = ConfigDict(
    dict(
      step_grpo=run("step_grpo", "Step-GRPO", three, **step, learning_rate=1e-3),
      flow_grpo=run("flow_grpo", "Flow-GRPO", three, **flow, learning_rate=1e-3),
      lpo=run("lpo", "LPO", (0,), **step, learning_rate=1e-3),
      # Single samples, as many as the others have; soon far from any digit.
      refl=run(
        "refl",
        "ReFL",
        (0,),
        iterations=30,
        evaluate_every=3,
        learning_rate=5e-4,
        prompts=320,
      ),
    )
  )
  return c
