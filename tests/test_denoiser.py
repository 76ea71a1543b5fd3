"""A generator and its rewards over one tree of parameters, against separate models."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import build, denoiser, explore, sample, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import conv_head, lora, mmdit, qformer_head, reward
from tests import golden_models, helpers

FULL = mmdit.MMDiTConfig(
  num_layers=4,
  num_heads=2,
  head_dim=8,
  dual_layers=(0, 1, 2),
  in_channels=3,
  out_channels=3,
  context_dim=12,
  pooled_dim=10,
  pos_embed_size=9,
  pos_embed_base=9,
)
CONV = conv_head.ConvHeadConfig(in_channels=3, base_channels=4, num_groups=2, hidden=8)
LORA = lora.LoRAConfig(2, 4)
SCORING = reward.ScoringConfig(offset=1.0)


def qformer(depth, image_taps, text_taps, adapters=None, **kw) -> reward.RewardConfig:
  backbone = FULL.truncate(
    depth, has_output=False, image_taps=image_taps, text_taps=text_taps
  )
  head = qformer_head.QFormerHeadConfig(
    token_dim=FULL.width,
    width=16,
    num_image_taps=len(image_taps),
    num_text_taps=len(text_taps),
    num_heads=4,
  )
  return reward.RewardConfig(backbone, head, adapters, **kw)


# name -> config, kind of sharing on the generator's backbone
REWARDS = {
  "frozen": (qformer(2, (1, 2), (2,), logistic=True), "prefix"),
  "other taps": (qformer(2, (0, 2), (1,)), "prefix"),
  "conv": (reward.RewardConfig(FULL.truncate(2, has_output=True), CONV), "prefix"),
  "lora": (qformer(2, (1, 2), (2,), LORA), "weights"),
  "conv lora": (
    reward.RewardConfig(FULL.truncate(2, has_output=True), CONV, LORA),
    "weights",
  ),
  "own": (qformer(3, (2,), (2,)), "nothing"),
}


def write(path, component, params, entry, **config):
  """A model folder of one component."""
  with folder_lib.write_atomically(path, force=False) as out:
    if params is not None:
      folder_lib.save_params(out / component, weights.flatten(params))
    entry = entry(out) if callable(entry) else entry
    folder_lib.write_config(out, {"components": {component: entry}, **config})
  return path


def write_generator(path, config=FULL):
  params = golden_models.random_model(golden_models.make_mmdit(config), seed=5).params
  entry = {"config": build.config_to_dict(config)}
  return write(path, "transformer", params, entry)


def write_reward(path, base, config, *, own_backbone=False, seed=0):
  """A random reward; without `own_backbone` only its adapters and head."""
  params = golden_models.random_model(lambda: build.make_reward(config), seed).params
  leaves = {
    p: a
    for p, a in weights.flatten(params).items()
    if own_backbone or not p.startswith("backbone/") or "/lora_" in p
  }
  save = lambda out: build.save_reward(out, leaves, config, SCORING, stacked=True)  # noqa: E731
  return write(path, "reward", None, save, base=str(base))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """`generator`, and one folder for each of REWARDS."""
  path = tmp_path_factory.mktemp("models")
  made = {"generator": write_generator(path / "generator")}
  for seed, (name, (config, kind)) in enumerate(REWARDS.items()):
    made[name] = write_reward(
      path / name,
      made["generator"],
      config,
      own_backbone=kind == "nothing",
      seed=seed,
    )
  return made


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "unrolled"])
def every(request, folders):
  """The generator with all of REWARDS."""
  return denoiser.load(
    folders["generator"], rewards_of(folders), scan_blocks=request.param
  )


def rewards_of(folders, *names):
  return {name: folders[name] for name in names or REWARDS}


def outputs(model, params, cond, x, sigma):
  """Velocity, each reward's score, and those from the generator's tokens."""
  embedded = model.embed(params, cond)
  inputs = model.reward_inputs(embedded)
  prefix = model.prefix_fn(params)(embedded["generator"], x, sigma)
  return (
    model.velocity_fn(params)(embedded["generator"], x, sigma),
    {n: model.reward_fn(params, n)(inputs[n], x, sigma) for n in model.rewards},
    {
      n: model.head_fn(params, n)(inputs[n], prefix)
      for n, part in model.rewards.items()
      if part.sharing == "prefix"
    },
  )


def separate(generator, rewards, cond, x, sigma):
  """The same from models that are loaded one by one."""
  whole = build.load_transformer(generator)
  parts = {name: build.load_reward(path)[0] for name, path in rewards.items()}

  def run(params, *inputs):
    x, sigma, cond = inputs
    velocity, _ = nnx.merge(whole.graphdef, params["generator"])(x, 1000 * sigma, cond)
    return velocity, {
      n: nnx.merge(p.graphdef, params[n])(*inputs) for n, p in parts.items()
    }

  params = {"generator": whole.params} | {n: p.params for n, p in parts.items()}
  return jax.jit(run)(params, x, sigma, cond)


def assert_same(model, generator, rewards):
  """`model`'s outputs are those of the separate models."""
  x, sigma, cond = golden_models.random_inputs(model.config)
  got = jax.jit(lambda params, *a: outputs(model, params, *a))(
    model.params, cond, x, sigma
  )
  velocity, scores = separate(generator, rewards, cond, x, sigma)
  assert helpers.rel_err(got[0], velocity) <= 1e-5
  assert got[1].keys() == scores.keys()
  for name, score in got[1].items():
    assert score.dtype == jnp.float32
    assert helpers.rel_err(score, scores[name]) <= 1e-5, name
  for name, score in got[2].items():
    assert helpers.rel_err(score, scores[name]) <= 1e-5, name


def leaves_of(folder, component) -> dict[str, np.ndarray]:
  path, _ = folder_lib.find(folder, component)
  return weights.flatten(folder_lib.load_params(path))


def num_bytes(tree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# --- the same numbers -------------------------------------------------------------


def test_every_kind_of_sharing(folders, every):
  """All at once, over one cut."""
  for name, (config, kind) in REWARDS.items():
    part = every.rewards[name]
    assert (part.config, part.scoring, part.sharing) == (config, SCORING, kind)
  assert_same(every, folders["generator"], rewards_of(folders))


def test_goldens(golden_folders):
  """The release with adapters shares weights, the fully trained one nothing."""
  base = golden_folders.dina
  rewards = {"dina": base, "drm": golden_folders.drm}
  model = denoiser.load(base, rewards).to_device()
  kinds = {name: part.sharing for name, part in model.rewards.items()}
  assert kinds == {"dina": "weights", "drm": "nothing"}
  assert_same(model, base, rewards)


def test_a_reward_of_all_blocks(folders, tmp_path):
  """Nothing is left to cut off."""
  config = qformer(4, (3, 4), (1,))
  rewards = {"deep": write_reward(tmp_path / "deep", folders["generator"], config)}
  model = denoiser.load(folders["generator"], rewards)
  assert model.tail is None and model.params.keys() == {"prefix", "rewards"}
  assert model.rewards["deep"].sharing == "prefix"
  assert_same(model, folders["generator"], rewards)


def test_exploring_with_the_generators_tokens(folders):
  """`explore` selects the same, whether or not the winner's tokens are reused."""
  model = denoiser.load(folders["generator"], rewards_of(folders, "frozen"))
  x, _, cond = golden_models.random_inputs(FULL)
  uncond = jax.tree.map(np.zeros_like, cond)
  schedule = sample.make_schedule(np.linspace(1, 0, 4, dtype=np.float32))

  def run(params, x, conds, shared):
    cond, uncond = (model.embed(params, c)["generator"] for c in conds)
    if shared:
      networks = explore.SharedPrefix(
        model.prefix_fn(params),
        model.tail_fn(params),
        model.head_fn(params, "frozen"),
        guidance_scale=4.0,
      )
    else:
      networks = explore.Apart(
        sample.guide(model.velocity_fn(params), 4.0), model.reward_fn(params, "frozen")
      )
    return explore.explore(
      networks,
      (cond, uncond),
      cond,
      x,
      schedule,
      explore.Explore(candidates=3),
      keys=jax.random.split(jax.random.key(0), 2),
    )

  run = jax.jit(run, static_argnums=3)
  (a, steps), (b, steps2) = (
    run(model.params, x, (cond, uncond), shared) for shared in (False, True)
  )
  np.testing.assert_array_equal(steps.chosen, steps2.chosen)
  assert len(np.unique(steps.chosen)) > 1
  assert helpers.rel_err(b, a) <= 1e-5


def test_bfloat16(folders):
  names = ("frozen", "lora", "own")
  model = denoiser.load(
    folders["generator"], rewards_of(folders, *names), dtype="bfloat16"
  )
  for path, leaf in weights.flatten(model.params).items():
    trained = path.startswith("rewards/") and "/backbone/" not in path
    trained = trained or "/lora_" in path
    frozen = jnp.float32 if path.endswith("pos_embed") else jnp.bfloat16
    assert leaf.dtype == (jnp.float32 if trained else frozen), path
  shapes = jax.eval_shape(
    lambda *a: outputs(model, *a),
    model.params,
    *(golden_models.random_inputs(FULL)[i] for i in (2, 0, 1)),
  )
  assert {a.dtype for a in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


# --- one copy ---------------------------------------------------------------------


def test_one_copy_of_what_is_shared(folders, every):
  """The arguments of a program hold the stored weights once, on host and device."""
  size = num_bytes(leaves_of(folders["generator"], "transformer"))
  size += sum(num_bytes(leaves_of(folders[name], "reward")) for name in REWARDS)
  assert num_bytes(every.params) == size
  assert num_bytes(every.to_device().params) == size

  def ids(params):
    leaves = jax.tree.leaves(params)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return {id(leaf) for leaf in leaves}

  generators = ids((every.params["prefix"], every.params["tail"]))
  for name, part in every.rewards.items():
    own = ids(every.params["rewards"][name])
    used = ids(every.reward_params(every.params, name))
    assert own <= used and not own & generators
    assert used <= own | generators
    assert (used == own) == (part.sharing == "nothing")


def test_to_device_places_everything(folders):
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  model = denoiser.load(folders["generator"], rewards_of(folders, "lora"))
  placed = model.to_device(everywhere)
  assert all(a.sharding == everywhere for a in jax.tree.leaves(placed.params))
  assert dataclasses.replace(placed, params=model.params) == model


def test_prompts_are_embedded_once_per_set_of_weights(every):
  cond = golden_models.random_inputs(FULL)[2]
  embedded = jax.eval_shape(every.embed, every.params, cond)
  assert embedded.keys() == {"generator", "own"}
  inputs = every.reward_inputs(embedded)
  assert inputs.keys() == REWARDS.keys()
  assert inputs["lora"] is inputs["frozen"] is embedded["generator"]
  assert inputs["own"] is embedded["own"]


def test_adapters_of_the_prompts_embedding(folders, tmp_path):
  targets = (*lora.ALL_ATTENTION, "context_embed")
  config = qformer(2, (2,), (1,), lora.LoRAConfig(2, 4, targets))
  rewards = {"text": write_reward(tmp_path / "text", folders["generator"], config)}
  model = denoiser.load(folders["generator"], rewards)
  part = model.rewards["text"]
  assert (part.sharing, part.embedded) == ("weights", "text")
  assert_same(model, folders["generator"], rewards)


# --- what cannot be shared --------------------------------------------------------


def test_one_cut(folders, tmp_path):
  """At the first reward's depth; what is as deep shares, whatever its kind."""
  deeper = write_reward(
    tmp_path / "deeper", folders["generator"], qformer(3, (3,), (1,), LORA)
  )
  kinds = {}
  for order in (("lora", "frozen", "deeper"), ("deeper", "lora", "frozen")):
    rewards = {n: deeper if n == "deeper" else folders[n] for n in order}
    model = denoiser.load(folders["generator"], rewards)
    kinds[order[0]] = [model.rewards[n].sharing for n in order]
    assert model.prefix_config.num_layers == (2 if order[0] == "lora" else 3)
  assert kinds == {
    "lora": ["weights", "prefix", "nothing"],
    "deeper": ["weights", "nothing", "nothing"],
  }


def test_another_generator_shares_nothing(folders, tmp_path):
  other = write_generator(tmp_path / "other")
  model = denoiser.load(other, rewards_of(folders, "frozen", "lora"))
  assert {part.sharing for part in model.rewards.values()} == {"nothing"}
  assert model.tail is None


def test_a_link_to_the_generator_is_the_generator(folders, tmp_path):
  (tmp_path / "link").symlink_to(folders["generator"])
  model = denoiser.load(tmp_path / "link", rewards_of(folders, "frozen"))
  assert model.rewards["frozen"].sharing == "prefix"


def test_a_generator_with_adapters(folders, tmp_path):
  """They act in the generator only; its blocks are not the reward's any more."""

  def make():
    model = mmdit.MMDiT(FULL, rngs=nnx.Rngs(0))
    lora.add_adapters(model, LORA, rngs=nnx.Rngs(0))
    return model

  graphdef, like = weights.abstract(make)
  params = golden_models.random_params(like, seed=5)
  path = write(
    tmp_path / "tuned",
    "lora",
    None,
    lambda out: build.save_lora(out, params, LORA),
    base=str(folders["generator"]),
  )
  base = leaves_of(folders["generator"], "transformer")
  params = weights.unflatten({**weights.flatten(params), **base})

  rewards = rewards_of(folders, "frozen")
  model = denoiser.load(path, rewards, scan_blocks=False)
  assert model.rewards["frozen"].sharing == "nothing"
  x, sigma, cond = golden_models.random_inputs(FULL)
  velocity, scores, _ = jax.jit(lambda p, *a: outputs(model, p, *a))(
    model.params, cond, x, sigma
  )
  tuned = golden_models.Loaded(FULL, graphdef, params)
  assert helpers.rel_err(velocity, tuned.run(x, 1000 * sigma, cond)[0]) <= 1e-5
  plain, want = separate(folders["generator"], rewards, cond, x, sigma)
  assert helpers.rel_err(velocity, plain) > 1e-2
  assert helpers.rel_err(scores["frozen"], want["frozen"]) <= 1e-5


# --- errors -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "own"])
def test_only_frozen_backbones_have_the_generators_tokens(folders, name):
  model = denoiser.load(folders["generator"], rewards_of(folders, name))
  with pytest.raises(ValueError, match=f"reward '{name}' shares (weights|nothing) "):
    model.head_fn(model.params, name)


@pytest.mark.parametrize("field", ["context_dim", "pooled_dim", "in_channels"])
def test_rewards_for_other_inputs(folders, tmp_path, field):
  config, _ = REWARDS["own"]
  backbone = dataclasses.replace(config.backbone, **{field: 7})
  config = dataclasses.replace(config, backbone=backbone)
  path = write_reward(tmp_path / "x", folders["generator"], config, own_backbone=True)
  message = (
    f"reward 'x' has {field}=7, the generator has {field}={getattr(FULL, field)}"
  )
  with pytest.raises(ValueError, match=message):
    denoiser.load(folders["generator"], {"x": path})


def test_names_and_folders(folders):
  generator = folders["generator"]
  with pytest.raises(ValueError, match="cannot be named 'generator'"):
    denoiser.load(generator, {"generator": folders["own"]})
  with pytest.raises(folder_lib.FolderError, match="holds no component 'reward'"):
    denoiser.load(generator, {"r": generator})
  with pytest.raises(ValueError, match="dtype 'half'"):
    denoiser.load(generator, {}, dtype="half")
  with pytest.raises(ValueError, match="attention implementation 'fast'"):
    denoiser.load(generator, {}, attention_impl="fast")
