"""A reward model on noisy digits: pairs from real digits, Thurstone loss, on a CPU.

  python train/generator.py --config configs/quickstart_generator.py   # first, once
  python train/reward.py --config configs/quickstart.py

The baseline from random initialisation is the same file with one word changed; a head
on a backbone that stays the generator's own, with another:

  python train/reward.py --config configs/quickstart.py:random
  python train/reward.py --config configs/quickstart.py:frozen

What a reward buys when it steers the generator, and what that costs:

  python train/sample.py --config configs/quickstart.py
"""

from ml_collections import ConfigDict, config_dict


def get_config(init: str = "base") -> ConfigDict:
  """`init`: "base" starts from the pretrained generator, "random" from nothing.

  "frozen" starts from the generator and trains the head only, so that the first four
  blocks of reward and generator are the same.
  """
  c = ConfigDict()
  c.seed = 0
  c.wandb_project = config_dict.placeholder(str)
  c.workdir = {
    "base": "runs/quickstart/reward",
    "random": "runs/quickstart/reward_random",
    "frozen": "runs/quickstart/reward_frozen",
  }[init]

  c.data = ConfigDict()
  c.data.kind = "digits"  # written as parquet parts once, then read as any other
  c.data.train = "runs/quickstart/pairs/train"
  c.data.held_out = "runs/quickstart/pairs/held_out"
  c.data.prompts = "runs/quickstart/pairs/prompts"
  c.data.t5_length = 0  # the toy embeddings have none
  c.data.samples = "runs/quickstart/generator/samples.npz"
  c.data.split_seed = 0
  c.data.channels = 4
  c.data.context_dim = 32
  c.data.pooled_dim = 32
  c.data.num_train = 12_000  # pairs, four kinds in equal parts
  c.data.num_held_out = 2_000
  c.data.prompt_dropout = 0.0
  c.data.reshuffle = True
  c.data.shuffle_window = 4  # row groups
  c.data.cache_blocks = 8  # decoded row groups in memory
  c.data.num_threads = 2  # that read and decode, a batch each
  c.data.prefetch = 4  # batches on the host; not fewer than threads
  c.data.device_prefetch = 1  # batches on the devices besides the current one

  c.model = ConfigDict()
  c.model.base = "runs/quickstart/generator/model"
  c.model.init = "random" if init == "random" else "base"
  c.model.transformer = ""  # any; read from the base folder
  c.model.num_layers = 4  # of the generator's 6 blocks
  c.model.has_output = False
  c.model.image_taps = (2, 4)
  c.model.text_taps = (2, 4)
  c.model.head = ConfigDict(
    dict(type="QFormerHeadConfig", width=64, num_queries=4, num_heads=4, dropout=0.0)
  )
  c.model.lora = None
  c.model.logistic = False
  c.model.dtype = "float32"
  c.model.backbone_dtype = "float32"
  c.model.trained_dtype = "float32"
  c.model.scan_blocks = True
  c.model.remat = "none"
  c.model.attention_impl = "auto"
  c.scoring = ConfigDict(
    dict(
      type="ScoringConfig",
      # Where held-out accuracy is best: frozen blocks see little in clean latents.
      u_generated=0.4 if init == "frozen" else 0.1,
      u_image=0.4 if init == "frozen" else 0.1,
      table=False,
      add_noise=True,
      offset=0.0,
      scale=1.0,
    )
  )

  frozen = "^backbone/" if init == "frozen" else "^backbone/pos_embed$"
  c.trainable = ((frozen, "freeze"), (".*", "train"))

  c.noise = ConfigDict()
  c.noise.shift = 1.0
  c.noise.lookup = "nearest"
  c.noise.distribution = "uniform"
  c.noise.options = ConfigDict()
  c.noise.shared = False  # each of a pair's latents draws its own noise

  c.loss = ConfigDict(dict(name="thurstone", noise_scale=2.0, base_var=0.05))

  c.train = ConfigDict()
  c.train.batch_size = 64  # pairs
  c.train.num_steps = 300
  c.train.learning_rate = 1e-3
  c.train.warmup_steps = 20
  c.train.schedule = "constant"
  c.train.weight_decay = 0.01
  c.train.clip_norm = 1.0
  c.train.accumulate = 1  # micro-batches per step
  c.train.ema_decay = config_dict.placeholder(float)
  c.train.log_every = 10  # steps
  c.train.checkpoint_every = 100  # steps
  c.train.keep_checkpoints = 2  # the newest
  c.train.keep_best = 1  # by mean held-out accuracy; saved at every evaluation

  c.eval = ConfigDict()
  c.eval.sigmas = (0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9)
  c.eval.batch_size = 200
  c.eval.every = 100  # steps

  c.mesh = ConfigDict()
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.sharding = ((".*", "replicate"),)

  c.aot = ConfigDict()  # what --aot compiles for
  # None: train.batch_size on all of them.
  c.aot.pairs_per_device = config_dict.placeholder(int)
  c.aot.height = 64  # pixels of an image whose latent is 8x8
  c.aot.width = 64
  c.aot.text_tokens = 6

  c.sample = ConfigDict()  # train/sample.py only
  c.sample.workdir = {
    "base": "runs/quickstart/sample",
    "random": "runs/quickstart/sample_random",
    "frozen": "runs/quickstart/sample_frozen",
  }[init]
  # Beside this config's reward: one whose blocks are the generator's, for cheap mode.
  c.sample.head_only = "runs/quickstart/reward_frozen/model"
  c.sample.seeds = (0, 1, 2)
  c.sample.num = 200  # samples per seed, digits and templates in turn
  c.sample.num_steps = 10
  c.sample.noise_level = 0.7
  c.sample.guidance_scales = (1.0, 2.0)  # further tables are at the first
  c.sample.candidates = (2, 4, 6)  # k; 1, the plain sampler, is always there
  c.sample.best_of = 6  # independent samples: best of 1, 2, ... of them
  c.sample.sweep_candidates = (6,)  # k of the windows
  # Explore only in steps that arrive at these noise levels, or ...
  c.sample.windows = ((0.45, 1.0), (0.65, 1.0), (0.35, 0.65), (0.0, 0.45), (0.0, 0.35))
  c.sample.fractions = (0.3, 0.45, 0.6, 0.8)  # ... in this part, from the noisy end
  c.sample.cheap_candidates = (3, 4, 6)  # k of the head-only reward, in both modes
  c.sample.noise_levels = (0.3, 1.0)  # besides noise_level
  c.sample.noise_candidates = 4  # k there, beside 1
  c.sample.temperature = 0.2  # of softmax selection, in units of the reward
  c.sample.beam = 2  # states kept of beam * max(candidates)
  return c
