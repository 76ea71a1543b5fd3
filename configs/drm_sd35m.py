"""DRM on SD3.5-Medium: the recipe of arXiv 2605.25661.

  python convert/torch_to_flax.py --sd35 stable-diffusion-3.5-medium --out models/sd35m
  python train/reward.py --config configs/drm_sd35m.py

21 of 24 blocks and the output layer, all weights trained, convolutional head,
Bradley-Terry loss; a pair shares the noise level and draws independent noise.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 42
  c.wandb_project = config_dict.placeholder(str)  # a name; needs pip install wandb
  c.workdir = "runs/drm_sd35m"

  c.data = ConfigDict()
  c.data.kind = "parquet"  # or "tfds": FOLDER:SPLIT in train and held_out
  c.data.train = "data/pairs_512_train"
  c.data.held_out = "data/pairs_512_test"
  c.data.prompts = "data/prompts_t5_512"  # embedding cache; "": encode in the run
  c.data.t5_length = 512  # tokens
  c.data.prompt_dropout = 0.0
  c.data.reshuffle = True  # False: the same order every epoch, as the released code
  c.data.shuffle_window = 16  # row groups; None: the whole bucket
  c.data.cache_blocks = 64  # decoded row groups in memory (window x buckets at most)
  c.data.num_threads = 8  # that read and decode, a batch each
  c.data.prefetch = 8  # batches on the host; not fewer than threads
  c.data.device_prefetch = 1  # batches on the devices besides the current one

  c.model = ConfigDict()
  c.model.base = "models/sd35m"
  c.model.init = "base"
  c.model.transformer = "sd35_medium"
  c.model.num_layers = 21
  c.model.has_output = True
  c.model.image_taps = ()
  c.model.text_taps = ()
  c.model.head = ConfigDict(
    dict(
      type="ConvHeadConfig", base_channels=256, num_groups=32, hidden=512, dropout=0.1
    )
  )
  c.model.lora = None
  c.model.logistic = False
  c.model.dtype = "bfloat16"
  c.model.backbone_dtype = "float32"  # master weights: everything is trained
  c.model.trained_dtype = "float32"
  c.model.scan_blocks = True
  c.model.remat = "full"
  c.model.attention_impl = "auto"
  c.scoring = ConfigDict(
    dict(
      type="ScoringConfig",
      u_generated=0.0,
      u_image=0.0,
      table=False,
      add_noise=True,
      offset=0.0,
      scale=1.0,
    )
  )

  c.trainable = (("^backbone/pos_embed$", "freeze"), (".*", "train"))

  c.noise = ConfigDict()
  c.noise.shift = 3.0
  c.noise.lookup = "index"  # u indexes the table
  c.noise.distribution = "logit_normal"
  c.noise.options = ConfigDict(dict(mean=0.0, std=1.0))
  c.noise.shared = False

  c.loss = ConfigDict(dict(name="bradley_terry", margin=0.0))

  c.train = ConfigDict()
  c.train.batch_size = 128  # pairs
  c.train.num_steps = 11_000  # one epoch of 1.4 M pairs
  c.train.learning_rate = 1e-5
  c.train.warmup_steps = 500
  c.train.schedule = "constant"
  c.train.weight_decay = 1e-4
  c.train.clip_norm = 1.0
  c.train.accumulate = 1  # micro-batches per step
  c.train.ema_decay = config_dict.placeholder(float)
  c.train.log_every = 10  # steps
  c.train.checkpoint_every = 1000  # steps
  c.train.keep_checkpoints = 3  # the newest
  c.train.keep_best = 1  # by mean held-out accuracy; saved at every evaluation

  c.eval = ConfigDict()
  c.eval.sigmas = (0.0, 0.25, 0.5, 0.75)
  c.eval.batch_size = 128
  c.eval.every = 1000  # steps

  c.mesh = ConfigDict()
  c.mesh.fsdp = -1  # all devices: 40 GB of training state are split
  c.mesh.tensor = 1
  c.sharding = ((".*", "fsdp"),)

  c.aot = ConfigDict()  # what --aot compiles for
  # None: train.batch_size on all of them.
  c.aot.pairs_per_device = config_dict.placeholder(int)
  c.aot.height = 512  # pixels
  c.aot.width = 512
  c.aot.text_tokens = 77 + c.data.t5_length
  return c
