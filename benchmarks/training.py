"""A training step of a reward model, beside PyTorch in the same run.

  lora  DiNa-LRM: adapters and Q-Former head on 12 frozen blocks, Thurstone loss, one
        noise per pair
  full  DRM: all of 21 blocks and the convolutional head, Bradley-Terry, two noises

Ours is the program of train/reward.py. PyTorch's is a plain loop with the same pairs,
noise levels and noise: both sides of a pair in one batch, clipping, AdamW (fused on a
GPU), autocast to the sizes' dtype where that is not float32. Compared are the first
step's loss and gradient norm.

  python benchmarks/training.py --out benchmarks/results/training_cpu.json
  python benchmarks/training.py --full --torch eager blocks --out training_gpu.json
"""

from collections.abc import Callable
import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import model_sizes
import numpy as np
import optax
import protocol
import scoring
import side_by_side

from lrm_jax import build, flops, losses, optim, preference, train_state, weights
from lrm_jax.models import conv_head, mmdit, reward

LEARNING_RATE, WEIGHT_DECAY, CLIP = 5e-5, 0.01, 1.0
SIGMA = (0.1, 0.9)  # of the pairs, evenly


@dataclasses.dataclass(frozen=True)
class Case:
  """Attributes: kind, `lora` or `full`; pairs of a step; remat, scan: of our side."""

  kind: str
  pairs: int
  remat: str
  scan: bool

  @property
  def name(self) -> str:
    return f"{self.kind}-{self.pairs}-{self.remat}" + ("-scan" if self.scan else "")

  @property
  def shared_noise(self) -> bool:
    return self.kind == "lora"


def cases(sizes: model_sizes.Sizes) -> list[Case]:
  """16 pairs are DiNa-LRM's 32 images; a narrow model has fewer.

  Of a full fine-tune PyTorch has no room for more than 4 without checkpoints.
  """
  if sizes == model_sizes.Sizes.full():
    hows = [("none", False), ("attention", False), ("attention", True)]
    lora = [Case("lora", pairs, *how) for pairs in (8, 16) for how in hows]
    full = [Case("full", 4, "none", False), Case("full", 4, "attention", False)]
    return [*lora, *full, Case("full", 16, "attention", False)]
  scans = (True, False)
  return [*(Case("lora", 2, "none", s) for s in scans), Case("full", 2, "none", True)]


def config_of(sizes: model_sizes.Sizes, case: Case) -> reward.RewardConfig:
  """Without dropout, whose draws differ."""
  config = sizes.rewards["dina" if case.kind == "lora" else "drm"]
  if isinstance(config.head, conv_head.ConvHeadConfig):
    return dataclasses.replace(
      config, head=dataclasses.replace(config.head, dropout=0.0)
    )
  return config


def count(sizes: model_sizes.Sizes, case: Case) -> float:
  side = sizes.latent
  return (
    2
    * case.pairs
    * flops.reward_training(
      config_of(sizes, case),
      side,
      side,
      sizes.text_tokens,
      train_backbone=case.kind == "full",
    )
  )


def make_batch(sizes: model_sizes.Sizes, case: Case) -> dict[str, np.ndarray]:
  """Random pairs, as train/reward.py's batches."""
  chosen, _, context, pooled = scoring.random_inputs(sizes, sizes.latent, case.pairs)
  rejected, *_ = scoring.random_inputs(sizes, sizes.latent, case.pairs, seed=2)
  return {
    "chosen": chosen,
    "rejected": rejected,
    "context": context,
    "pooled": pooled,
    "preference": np.ones(case.pairs, np.float32),
  }


def sigmas(case: Case) -> np.ndarray:
  return np.linspace(*SIGMA, case.pairs, dtype=np.float32)


def first_noise(case: Case, latent: tuple[int, ...]) -> np.ndarray:
  """What our first step draws: (b 1 h w c), or (b 2 h w c)."""
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)
  shape = (case.pairs, 1 if case.shared_noise else 2, *latent)
  return np.asarray(jax.random.normal(keys[1], shape))


class Ours(protocol.JaxSide):
  """`preference.make_train_step`, the state donated."""

  def make(self, case: Case) -> protocol.Program:
    sizes, config = self.sizes, config_of(self.sizes, case)
    dtype = build.dtype(sizes.dtype)
    graphdef, like = weights.abstract(
      lambda: build.make_reward(
        config,
        dtype=dtype,
        # What is trained is float32.
        param_dtype=dtype if case.kind == "lora" else jnp.float32,
        scan_blocks=case.scan,
        remat=case.remat,
      )
    )
    params = scoring.random_reward(config)
    if not case.scan:
      backbone = mmdit.unstack_params(params["backbone"])
      params = {**params, "backbone": backbone}
    params = build.to_device(build.fit(params, like, name="random weights"))
    frozen = (("^backbone/(?!.*/lora_)", "freeze"), (".*", "train"))
    table = frozen if case.kind == "lora" else (("pos_embed$", "freeze"), frozen[1])
    trained, frozen = optim.partition(params, table)
    schedule = optax.constant_schedule(LEARNING_RATE)
    tx = optim.make_tx(schedule, weight_decay=WEIGHT_DECAY, clip_norm=CLIP)
    sigma = jnp.asarray(sigmas(case))
    step = preference.make_train_step(
      graphdef,
      tx,
      sigma_fn=lambda key, b: sigma,
      loss_fn=losses.thurstone if case.kind == "lora" else losses.bradley_terry,
      learning_rate=schedule,
      shared_noise=case.shared_noise,
      ema_decay=None,
    )
    create = functools.partial(train_state.create, tx=tx, use_ema=False)
    state = jax.jit(create)(trained)
    batch = make_batch(sizes, case)
    for name in ("context", "pooled"):
      batch[name] = jnp.asarray(batch[name], dtype)
    args = state, frozen, jax.device_put(batch), jax.random.key(0)
    return protocol.Program(jax.jit(step, donate_argnums=0), args, carries=True)

  def outputs(self, case: Case, result: Any) -> dict[str, Any]:
    return {name: result[f"train/{name}"] for name in ("loss", "grad_norm")}


class Theirs(protocol.TorchSide):
  """A plain training loop."""

  def make(self, case: Case) -> Callable[[], dict[str, Any]]:
    torch, sizes, config = self.torch, self.sizes, config_of(self.sizes, case)
    dtype = getattr(torch, sizes.dtype)
    params = scoring.random_reward(config)
    model = side_by_side.torch_reward(config, params, self.device)
    model = model.to(self.device).eval()  # no dropout
    for name, p in model.named_parameters():
      is_trained = case.kind == "full" or "lora_" in name or "reward_head" in name
      p.requires_grad_(is_trained)
      if not is_trained:
        p.data = p.data.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
      trained,
      lr=LEARNING_RATE,
      weight_decay=WEIGHT_DECAY,
      fused=self.device == "cuda",
    )
    model = self.fast(model)
    batch = make_batch(sizes, case)
    x0 = np.stack([batch["chosen"], batch["rejected"]], axis=1)
    eps, sigma = first_noise(case, x0.shape[2:]), sigmas(case)
    s = sigma[:, None, None, None, None]
    x = ((1 - s) * x0 + s * eps).reshape(-1, *x0.shape[2:]).transpose(0, 3, 1, 2)
    twice = lambda a, dtype=None: self.tensor(np.repeat(a, 2, axis=0), dtype)  # noqa: E731
    inputs = (
      self.tensor(x, sizes.dtype),
      twice(1000 * sigma),
      twice(batch["context"], sizes.dtype),
      twice(batch["pooled"], sizes.dtype),
    )
    sigma = self.tensor(sigma)
    lower = torch.autocast(
      self.device, dtype=torch.bfloat16, enabled=dtype != torch.float32
    )

    def call():
      with lower:
        scores = model(*inputs)[:, 0].float().view(-1, 2)
      gap = scores[:, 0] - scores[:, 1]
      if case.kind == "lora":
        var = 2 * sigma**2 + 0.05
        p = torch.special.ndtr(gap / torch.sqrt(2 * var + 1e-6))
        loss = (1 - torch.sqrt(p + 1e-6)).mean()
      else:
        loss = -torch.nn.functional.logsigmoid(gap).mean()
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
      optimizer.step()
      return {"loss": loss, "grad_norm": norm}

    return call


TABLE = protocol.Table(
  description=__doc__,
  narrow=model_sizes.Sizes(),
  full=model_sizes.Sizes.full(),
  cases=cases,
  ours=Ours,
  theirs=Theirs,
  count=count,
  together=False,
)


if __name__ == "__main__":
  sys.exit(protocol.main(TABLE))
