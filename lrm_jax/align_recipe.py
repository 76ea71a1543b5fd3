"""What the configs of alignment on SD3.5-Medium have in common."""

from ml_collections import ConfigDict, config_dict

# The reward that is optimised; configs name others beside it.
REWARD = "drm"


def sd35_medium(method: str) -> ConfigDict:
  """All keys but those of `group` and `loss`, which belong to a method.

  Flow-GRPO's settings for SD3.5-Medium at 512 pixels (arXiv 2505.05470), which DRM and
  DiNa-LRM took over.
  """
  c = ConfigDict()
  c.seed = 42
  c.wandb_project = config_dict.placeholder(str)  # a name; needs pip install wandb
  c.workdir = f"runs/sd35m_{method}"
  c.method = method  # step_grpo, flow_grpo, lpo or refl

  c.prompts = ConfigDict()
  c.prompts.train = "data/prompts/train.txt"  # one a line
  c.prompts.eval = "data/prompts/test.txt"
  c.prompts.cache = ""  # embedding cache; "": encode in the run
  c.prompts.t5_length = 128  # tokens

  c.model = ConfigDict()
  c.model.generator = "models/sd35m"
  c.model.dtype = "bfloat16"  # frozen weights and compute; adapters are float32
  # None: unrolled on a GPU, else scanned.
  c.model.scan_blocks = config_dict.placeholder(bool)
  c.model.remat = "attention"  # what gradients recompute: none, attention, full
  c.model.attention_impl = "auto"
  c.decoder = "vae"

  c.lora = ConfigDict(dict(rank=32, alpha=64, targets="joint_attention"))

  # folder, and the weight of its advantage; 0: only reported.
  c.rewards = ConfigDict({REWARD: dict(folder="models/drm_sd35m", weight=1.0)})
  # function "package.module:name" of (images (b H W 3) uint8, prompts) -> (b,), weight.
  # With weight 0 it is asked at evaluations only, else in every iteration.
  c.pixel_rewards = ConfigDict()

  # Held out: never optimised, tells when the others are being exploited.
  c.golden = ConfigDict()
  # "reward/NAME" or "pixel/NAME"; None watches the first reward.
  c.golden.metric = config_dict.placeholder(str)
  # Evaluations without a rise after which to stop; None: never.
  c.golden.patience = config_dict.placeholder(int)
  c.golden.min_delta = 0.0

  c.rollout = ConfigDict()
  c.rollout.height = 512  # pixels
  c.rollout.width = 512
  c.rollout.num_steps = 10
  c.rollout.shift = 3.0
  c.rollout.sampler = "sde"  # or "cps"
  c.rollout.noise_level = 0.7
  c.rollout.guidance_scale = 4.5  # in training, too
  # Steps, drawn from the range; None: all of it.
  c.rollout.sde_window_size = config_dict.placeholder(int)
  # (start, stop); None: all steps.
  c.rollout.sde_window_range = config_dict.placeholder(tuple)

  c.train = ConfigDict()
  c.train.num_iterations = 2000
  c.train.prompts = 48  # per iteration
  c.train.inner_epochs = 1  # passes over an iteration's samples
  c.train.rollout_parts = 1  # of the samples, rolled out one after another
  c.train.minibatches = 2  # optimizer steps per pass
  c.train.micro_batches = 4  # whose gradients are added up for one of them
  c.train.timestep_fraction = 0.99  # of the steps, from the noisy end: not the last one
  c.train.learning_rate = 3e-4
  c.train.warmup_steps = 0
  c.train.schedule = "constant"
  c.train.weight_decay = 1e-4
  c.train.clip_norm = 1.0
  # Upstream 0.9 every 8 updates, which is this per update.
  c.train.ema_decay = 0.9 ** (1 / 8)
  c.train.log_every = 1  # iterations
  c.train.checkpoint_every = 20
  c.train.keep_checkpoints = 2  # the newest
  c.train.keep_best = 1  # by the golden metric, or the first reward

  c.eval = ConfigDict()
  c.eval.every = 20  # iterations
  c.eval.seed = 0
  c.eval.prompts = 8  # at a time
  c.eval.num = 4  # samples of each
  c.eval.num_steps = 40
  c.eval.sampler = "euler"
  c.eval.guidance_scale = 4.5
  c.eval.images = 8  # prompts whose images are kept
  c.eval.decode_batch = 4  # images per device

  c.mesh = ConfigDict()
  c.mesh.fsdp = 1  # frozen weights are 4.5 GB: copied everywhere
  c.mesh.tensor = 1
  c.sharding = ((".*", "replicate"),)

  c.aot = ConfigDict()  # what --aot compiles for
  c.aot.generator = "sd35_medium"
  c.aot.rewards = ConfigDict({REWARD: "drm_2b"})
  # Instead of train.prompts, on each device; None: train.prompts.
  c.aot.prompts_per_device = config_dict.placeholder(int)
  return c
