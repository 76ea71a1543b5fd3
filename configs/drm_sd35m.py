"""DRM on SD3.5-Medium: the recipe of arXiv 2605.25661.

  python convert/torch_to_flax.py --sd35 stable-diffusion-3.5-medium --out models/sd35m
  python train/reward.py --config configs/drm_sd35m.py

21 of 24 blocks and the output layer, all weights trained, convolutional head,
Bradley-Terry loss; a pair shares the noise level and draws independent noise.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 42
  c.workdir = "runs/drm_sd35m"

  c.data = ConfigDict()
  c.data.kind = "folders"
  c.data.train = "data/drm_train"  # confidence >= 0.95, 512 px, T5 length 512
  c.data.held_out = "data/drm_test"
  c.data.prompt_dropout = 0.0

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
  c.model.remat = True
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
  c.train.ema_decay = None
  c.train.log_every = 10  # steps
  c.train.checkpoint_every = 1000  # steps
  c.train.keep_checkpoints = 3

  c.eval = ConfigDict()
  c.eval.sigmas = (0.0, 0.25, 0.5, 0.75)
  c.eval.batch_size = 128
  c.eval.every = 1000  # steps

  c.mesh = ConfigDict()
  c.mesh.fsdp = -1  # all devices: 40 GB of training state are split
  c.sharding = ((".*", "fsdp"),)
  return c
