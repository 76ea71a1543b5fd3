"""A small MMDiT generator of real handwritten digits, by flow matching, on a CPU.

  python train/generator.py --config configs/quickstart_generator.py

About 0.6 M parameters; minutes on two cores. Deliberately left imperfect: the reward
model that is trained next needs samples of different quality.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0
  c.workdir = "runs/quickstart/generator"

  c.data = ConfigDict()
  c.data.channels = 4  # the image is repeated: more signal per noise level
  c.data.split_seed = 0
  c.data.context_dim = 32  # of the fixed random word vectors
  c.data.pooled_dim = 32
  c.data.prompt_dropout = 0.1  # for classifier-free guidance

  c.model = ConfigDict()
  c.model.num_layers = 6
  c.model.num_heads = 4
  c.model.head_dim = 16
  c.model.dual_layers = (0, 1, 2)  # as SD3.5-Medium: image-only attention first
  c.model.pos_embed_size = 4  # 8x8 latent, patch 2

  c.noise = ConfigDict()
  c.noise.shift = 1.0  # a latent this small needs no shifted schedule
  c.noise.distribution = "logit_normal"
  c.noise.mean = 0.0
  c.noise.std = 1.0

  c.train = ConfigDict()
  c.train.batch_size = 128
  c.train.num_steps = 800
  c.train.learning_rate = 1e-3
  c.train.warmup_steps = 50
  c.train.schedule = "cosine"
  c.train.weight_decay = 0.01
  c.train.clip_norm = 1.0
  c.train.log_every = 25  # steps; one jitted call each

  c.samples = ConfigDict()  # what the reward model's pairs are made of
  c.samples.early_step = 200  # of num_steps: the generator's bad old days
  c.samples.num_train = 2000
  c.samples.num_held_out = 800
  c.samples.num_steps = 10  # Euler steps
  c.samples.guidance_scale = 1.0
  c.samples.guided_scale = 2.0  # for the picture only

  c.mesh = ConfigDict()
  c.mesh.fsdp = 1
  return c
