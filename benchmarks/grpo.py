"""An iteration of Step-GRPO and of Flow-GRPO, beside PyTorch in the same run.

Samples of a prompt are rolled out with guidance, scored by DRM's reward, and learnt
from in one optimizer step: Step-GRPO compares k candidates of every state, Flow-GRPO
the finished samples. Ours are the programs of lrm_jax.alignment. PyTorch's side is a
plain loop over diffusers' transformer with PEFT's adapters, which draws the same noise:
the reference of the KL divergence switches the adapters off, gradients are added up
step by step. Compared are the mean reward, the KL divergence and the gradient norm of
the first iteration. FLOPs are `alignment.passes` of the generator.

  python benchmarks/grpo.py --out benchmarks/results/grpo_cpu.json
  python benchmarks/grpo.py --full --torch eager blocks --rounds 2 --calls 1
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
import side_by_side

from lrm_jax import (
  alignment,
  build,
  denoiser,
  explore,
  flops,
  flow,
  optim,
  policy,
  sample,
  scorer,
  train_state,
  weights,
)
from lrm_jax.keymaps import lora as lora_keys
from lrm_jax.models import features, lora, mmdit

GUIDANCE, SHIFT, KL, CLIP_RANGE, RATE = 4.5, 3.0, 0.04, 1e-4, 1e-4
REWARD = "drm"
# Finished samples are looked at clean, as DRM is published.
LEVEL = scorer.Level(np.float32(0).view(np.uint32), np.float32(0), False)


@dataclasses.dataclass(frozen=True)
class Case:
  """Attributes: method; candidates, 1 for flow_grpo; samples of one prompt."""

  method: str
  candidates: int
  group: int
  prompts: int

  @property
  def name(self) -> str:
    k = f"-k{self.candidates}" if self.method == "step_grpo" else ""
    return f"{self.method}{k}-{self.prompts}x{self.group}"


def cases(sizes: model_sizes.Sizes) -> list[Case]:
  full = sizes == full_sizes()
  group, prompts = (8, 1) if full else (4, 1)
  ks = (4, 6) if full else (4,)
  found = [Case("step_grpo", k, group, prompts) for k in ks]
  return [*found, Case("flow_grpo", 1, group, prompts)]


def full_sizes() -> model_sizes.Sizes:
  """Flow-GRPO's: 10 steps, 128 tokens of T5."""
  return dataclasses.replace(model_sizes.Sizes.full(), steps=10, text_tokens=205)


def narrow_sizes() -> model_sizes.Sizes:
  return dataclasses.replace(model_sizes.Sizes(), steps=3, heads=4, text_tokens=32)


def make_recipe(case: Case) -> alignment.Recipe:
  options = {"candidates": case.candidates} if case.method == "step_grpo" else {}
  return alignment.Recipe(
    method=case.method,
    weights={REWARD: 1.0},
    group_size=case.group,
    guidance_scale=GUIDANCE,
    kl_coef=KL,
    clip_range=CLIP_RANGE,
    **options,
  )


def make_steps(sizes: model_sizes.Sizes) -> tuple[sample.Schedule, np.ndarray]:
  """(schedule, steps that are trained on: all but the last)."""
  trained = sizes.steps - 1
  sigmas = flow.sampling_sigmas(sizes.steps, SHIFT)
  return sample.make_schedule(sigmas, explore_window=(0, trained)), np.arange(trained)


def make_policy(sizes: model_sizes.Sizes, remat: str = "none") -> policy.Policy:
  model = denoiser.abstract(
    sizes.generator,
    {REWARD: sizes.rewards[REWARD]},
    dtype=sizes.dtype,
    scan_blocks=sizes.scan,
  )
  adapters = lora.LoRAConfig(
    lora_rank(sizes), 2 * lora_rank(sizes), lora.JOINT_ATTENTION
  )
  return policy.make(model, adapters, remat=remat)


def lora_rank(sizes: model_sizes.Sizes) -> int:
  """32 at full width."""
  return max(2, sizes.generator.width // 48)


def random_adapters(made: policy.Policy) -> dict[str, np.ndarray]:
  """Weak ones that do something: a fresh adapter's second matrix is zero."""
  nested = side_by_side.random_weights(weights.unflatten(made.like), seed=5)
  return {p: np.float32(0.2) * a for p, a in weights.flatten(nested).items()}


def make_prompts(sizes: model_sizes.Sizes, case: Case) -> alignment.Prompts:
  """Random, and a random empty one; float32 numpy."""
  rng, config = np.random.default_rng(3), sizes.generator

  def draw(num):
    return features.Cond(
      rng.standard_normal((num, sizes.text_tokens, config.context_dim), np.float32),
      rng.standard_normal((num, config.pooled_dim), np.float32),
    )

  return alignment.Prompts(draw(case.prompts), draw(1))


def passes(sizes: model_sizes.Sizes, case: Case) -> float:
  """Of an iteration, in forward passes of the generator."""
  schedule, steps = make_steps(sizes)
  found = alignment.passes(
    make_policy(sizes),
    make_recipe(case),
    schedule,
    num_trained=len(steps),
    inner_epochs=1,
    guidance_scale=GUIDANCE,
  )
  return case.prompts * case.group * sum(found.values())


def count(sizes: model_sizes.Sizes, case: Case) -> float:
  config, side = sizes.generator, sizes.latent
  n = flops.image_tokens(config, side, side)
  return passes(sizes, case) * flops.mmdit(config, n, sizes.text_tokens)


class Ours(protocol.JaxSide):
  """`collect` and `update` as one program, the state donated."""

  def make(self, case: Case) -> protocol.Program:
    sizes = self.sizes
    latent = (sizes.latent, sizes.latent, sizes.generator.in_channels)
    # As configs/sd35m_step_grpo.py has it.
    made = make_policy(sizes, "attention" if sizes.dtype == "bfloat16" else "none")
    like, ours = made.denoiser.params, model_sizes.make_weights(sizes)
    generator, drm = ours["generator"], ours[REWARD]
    if not sizes.scan:
      generator = mmdit.unstack_params(generator)
      drm = {**drm, "backbone": mmdit.unstack_params(drm["backbone"])}
    own = build.fit(drm, like["rewards"][REWARD], name="random weights")
    prefix = build.fit(generator, like["prefix"], name="random weights")
    params = build.to_device({"prefix": prefix, "rewards": {REWARD: own}})
    tx = optim.make_tx(optax.constant_schedule(RATE), weight_decay=1e-4, clip_norm=1.0)
    collect = alignment.make_collect(made, make_recipe(case), {REWARD: LEVEL}, latent)
    update = alignment.make_update(made, make_recipe(case), tx, ema_decay=None)
    create = functools.partial(train_state.create, tx=tx, use_ema=False)
    state = jax.jit(create)(jax.device_put(random_adapters(made)))
    schedule, steps = make_steps(sizes)
    dtype = build.dtype(sizes.dtype)
    prompts = jax.tree.map(lambda a: jnp.asarray(a, dtype), make_prompts(sizes, case))

    @functools.partial(jax.jit, donate_argnums=0)
    def iteration(state, params, prompts, schedule, steps, key):
      collected, seen = collect(params, state.params, prompts, schedule, key)
      state, learnt = update(state, params, collected, steps)
      return state, seen | learnt

    args = (state, params, prompts, *jax.device_put((schedule, steps)))
    return protocol.Program(iteration, (*args, jax.random.key(0)), carries=True)

  def outputs(self, case: Case, result: Any) -> dict[str, Any]:
    names = {"reward": f"reward/{REWARD}", "grad_norm": "train/grad_norm"}
    return {name: result[key] for name, key in names.items()} | {
      "kl": result["train/kl"]
    }


class Theirs(protocol.TorchSide):
  """A plain loop."""

  def make(self, case: Case) -> Callable[[], dict[str, Any]]:
    import peft

    torch, sizes = self.torch, self.sizes
    dtype = getattr(torch, sizes.dtype)
    ours, made = model_sizes.make_weights(sizes), make_policy(sizes)
    ready = lambda m: m.to(self.device, dtype).eval().requires_grad_(False)  # noqa: E731
    make, on = side_by_side, self.device
    scoring = make.torch_reward(sizes.rewards[REWARD], ours[REWARD], on)
    scoring = self.fast(ready(scoring))
    generator = ours["generator"]
    transformer = ready(make.torch_transformer(sizes.generator, generator, device=on))
    names = lora_keys.peft_names(sizes.generator, made.config)
    model = peft.get_peft_model(
      transformer,
      peft.LoraConfig(
        r=made.config.rank,
        lora_alpha=made.config.alpha,
        target_modules=names[0],
        exclude_modules=names[1] or None,
      ),
    )
    keymap = lora_keys.peft(sizes.generator, *names)
    side_by_side.fill_adapters(model, keymap, random_adapters(made))
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    for p in trained:
      p.data = p.data.float().to(self.device)
      p.requires_grad_(True)
    optimizer = torch.optim.AdamW(
      trained, lr=RATE, weight_decay=1e-4, fused=self.device == "cuda"
    )
    run = self.fast(model)
    lower = torch.autocast(
      self.device, dtype=torch.bfloat16, enabled=dtype != torch.float32
    )

    # What our side draws: of the key, and of each sample's number.
    b, k = case.prompts * case.group, case.candidates
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(b))
    latent = (sizes.latent, sizes.latent, sizes.generator.in_channels)
    schedule, steps = make_steps(sizes)
    random = explore.Explore(k, select="random")
    noise, chosen = [], []
    for t in range(sizes.steps):
      some = k if schedule.explore[t] else 1
      drawn = sample.step_noise(keys, t, jnp.arange(some), latent)
      noise.append(self.tensor(np.asarray(drawn).transpose(0, 1, 4, 2, 3)))
      pick = explore.choose(jnp.zeros((b, some)), random, keys=keys, index=t)[:, 0]
      chosen.append(self.tensor(np.asarray(pick)).long())
    start = np.asarray(sample.initial_noise(keys, latent)).transpose(0, 3, 1, 2)
    start, rows = self.tensor(start), torch.arange(b, device=self.device)

    prompts = make_prompts(sizes, case)
    context, pooled = (
      self.tensor(
        np.concatenate(
          [np.repeat(cond, case.group, axis=0), np.repeat(uncond, b, axis=0)]
        ),
        sizes.dtype,
      )
      for cond, uncond in zip(
        (prompts.cond.context, prompts.cond.pooled),
        (prompts.uncond.context, prompts.uncond.pooled),
        strict=True,
      )
    )

    def step(x, t):
      """Mean and deviations of the transition: of the step, and of the KL."""
      sigma, sigma_next = float(schedule.sigma[t]), float(schedule.sigma_next[t])
      with lower:
        v = run(
          torch.cat([x, x]).to(dtype),
          timestep=torch.full((2 * b,), 1000 * sigma, device=self.device),
          encoder_hidden_states=context,
          pooled_projections=pooled,
          return_dict=False,
        )[0].float()
      v_cond, v_uncond = v.chunk(2)
      v = v_uncond + GUIDANCE * (v_cond - v_uncond)
      return side_by_side.sde_moments(
        x, v, sigma, sigma_next, float(schedule.noise_level[t])
      )

    def score(x, sigma, each):
      n = b * each
      return scoring(
        x.to(dtype),
        torch.full((n,), 1000 * sigma, device=self.device),
        context[:b].repeat_interleave(each, dim=0),
        pooled[:b].repeat_interleave(each, dim=0),
      ).float()[:, 0]

    def log_prob(x_next, mean, std):
      return -(((x_next - mean[:, None]) ** 2) / (2 * std**2)).mean(dim=(2, 3, 4))

    def normalised(r):
      return (r - r.mean(-1, keepdim=True)) / (
        r.std(-1, keepdim=True, correction=0) + 1e-4
      )

    def call():
      x, kept = start, []
      with torch.no_grad():
        for t in range(sizes.steps):
          mean, std, _ = step(x, t)
          candidates = mean[:, None] + std * noise[t]
          advantage = None
          if case.method == "step_grpo" and schedule.explore[t]:
            sigma = float(schedule.sigma_next[t])
            advantage = normalised(score(candidates.flatten(0, 1), sigma, k).view(b, k))
          kept.append((x, candidates, log_prob(candidates, mean, std), advantage))
          x = candidates[rows, chosen[t]]
        reward = score(x, 0.0, 1)
        of_samples = normalised(reward.view(-1, case.group)).view(b, 1)
      optimizer.zero_grad(set_to_none=True)
      total = 0.0
      for t in steps.tolist():
        x, candidates, old, advantage = kept[t]
        advantage = of_samples if advantage is None else advantage
        with torch.no_grad(), model.disable_adapter():
          reference, _, _ = step(x, t)
        mean, std, kl_std = step(x, t)
        ratio = torch.exp(log_prob(candidates, mean, std) - old)
        a = advantage.clamp(-5, 5)
        clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
        kl = ((mean - reference) ** 2 / (2 * kl_std**2)).mean()
        loss = torch.maximum(-a * ratio, -a * clipped).mean() + KL * kl
        (loss / len(steps)).backward()
        total = total + kl.detach() / len(steps)
      norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
      optimizer.step()
      return {"reward": reward.mean(), "grad_norm": norm, "kl": total}

    return call


TABLE = protocol.Table(
  description=__doc__,
  narrow=narrow_sizes(),
  full=full_sizes(),
  cases=cases,
  ours=Ours,
  theirs=Theirs,
  count=count,
  together=False,
)


if __name__ == "__main__":
  sys.exit(protocol.main(TABLE))
