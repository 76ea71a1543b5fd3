"""Scoring a batch of noisy latents, beside PyTorch in the same run.

  drm          21 blocks with weights of their own, convolutional head
  dina         12 blocks under adapters, Q-Former head, adapters beside their layers
  dina-merged  the same without adapters, as after merging them

PyTorch's side is diffusers' blocks, PEFT's adapters and the heads of
convert/torch_reference.py. A narrow model on a CPU, SD3.5-Medium at 512 and 1024 px on
a GPU (protocol.py; `--cases` and `--torch` split it into shorter commands):

  python benchmarks/scoring.py --out benchmarks/results/scoring_cpu.json
  python benchmarks/scoring.py --full --torch eager compile --out scoring_gpu.json
"""

from collections.abc import Callable
import dataclasses
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import model_sizes
import numpy as np
import protocol
import side_by_side

from lrm_jax import build, flops, weights
from lrm_jax.models import features, mmdit, reward

SCORERS = {"drm": "drm", "dina": "dina", "dina-merged": "cheap"}  # in Sizes.rewards


@dataclasses.dataclass(frozen=True)
class Case:
  """Attributes: scorer, of SCORERS; latent, its side; batch."""

  scorer: str
  latent: int
  batch: int

  @property
  def name(self) -> str:
    return f"{self.scorer}-{8 * self.latent}px-{self.batch}"


def cases(sizes: model_sizes.Sizes) -> list[Case]:
  """A narrow model at one size only, and no large batches."""
  full = sizes == model_sizes.Sizes.full()
  sides = (sizes.latent, 2 * sizes.latent) if full else (sizes.latent,)
  batches = (1, 8, 32) if full else (1, 8)
  return [Case(s, side, b) for side in sides for s in SCORERS for b in batches]


def config_of(sizes: model_sizes.Sizes, case: Case) -> reward.RewardConfig:
  return sizes.rewards[SCORERS[case.scorer]]


def count(sizes: model_sizes.Sizes, case: Case) -> float:
  config = config_of(sizes, case)
  return case.batch * flops.reward(config, case.latent, case.latent, sizes.text_tokens)


def random_inputs(
  sizes: model_sizes.Sizes, latent: int, batch: int, seed: int = 1
) -> tuple[np.ndarray, ...]:
  """x (b H W C), sigma (b,), context (b l d), pooled (b e), all float32."""
  rng, config = np.random.default_rng(seed), sizes.generator
  return (
    rng.standard_normal((batch, latent, latent, config.in_channels), np.float32),
    np.linspace(0.1, 0.9, batch, dtype=np.float32),
    rng.standard_normal((batch, sizes.text_tokens, config.context_dim), np.float32),
    rng.standard_normal((batch, config.pooled_dim), np.float32),
  )


def random_reward(config: reward.RewardConfig, seed: int = 0) -> dict:
  """All parameters, stacked, float32 numpy."""
  _, like = weights.abstract(lambda: build.make_reward(config))
  return side_by_side.random_weights(like, seed)


class Ours(protocol.JaxSide):
  """`RewardModel` under jit."""

  def make(self, case: Case) -> protocol.Program:
    sizes, config = self.sizes, config_of(self.sizes, case)
    dtype = build.dtype(sizes.dtype)
    graphdef, like = weights.abstract(
      lambda: build.make_reward(
        config,
        dtype=dtype,
        param_dtype=dtype,
        trained_dtype=dtype,
        scan_blocks=sizes.scan,
      )
    )
    params = random_reward(config)
    if not sizes.scan:
      params["backbone"] = mmdit.unstack_params(params["backbone"])
    params = build.to_device(build.fit(params, like, name="random weights"))
    x, sigma, context, pooled = random_inputs(sizes, case.latent, case.batch)
    cond = features.Cond(jnp.asarray(context, dtype), jnp.asarray(pooled, dtype))
    score = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    return protocol.Program(score, (params, *jax.device_put((x, sigma, cond))))


class Theirs(protocol.TorchSide):
  """The published modules."""

  def make(self, case: Case) -> Callable[[], dict[str, Any]]:
    torch, dtype = self.torch, self.sizes.dtype
    config = config_of(self.sizes, case)
    model = side_by_side.torch_reward(config, random_reward(config))
    model = model.to(self.device, getattr(torch, dtype)).eval().requires_grad_(False)
    model = self.fast(model)
    x, sigma, context, pooled = random_inputs(self.sizes, case.latent, case.batch)
    x = self.tensor(x.transpose(0, 3, 1, 2), dtype)
    t = self.tensor(1000 * sigma)  # in bfloat16 it would be rounded to multiples of 4
    context, pooled = self.tensor(context, dtype), self.tensor(pooled, dtype)

    @torch.inference_mode()
    def call():
      return {"output": model(x, t, context, pooled)[:, 0]}

    return call


TABLE = protocol.Table(
  description=__doc__,
  narrow=model_sizes.Sizes(),
  full=model_sizes.Sizes.full(),
  cases=cases,
  ours=Ours,
  theirs=Theirs,
  count=count,
)


if __name__ == "__main__":
  sys.exit(protocol.main(TABLE))
