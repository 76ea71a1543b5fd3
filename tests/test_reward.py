"""The reward models: goldens, training steps, other sizes, options, errors.

Goldens and sizes go through the production keymaps; tests/golden_models.py.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import build, flow, losses, weights
from lrm_jax.keymaps import engine
from lrm_jax.models import (
  conv_head,
  features,
  layers,
  lora,
  mmdit,
  qformer_head,
  reward,
)
from tests import golden_models, helpers
from tests.helpers import nhwc, rel_err

# Sums of many float32 terms, some of which cancel.
TOL = 1e-4
U = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)


@pytest.fixture(scope="module")
def dina():
  return golden_models.dina(), helpers.golden("dina/expected")


@pytest.fixture(scope="module")
def drm():
  return golden_models.drm(), helpers.golden("drm/expected")


def noisy_golden(e, u):
  """(x, sigma) of the golden latents at noise level u."""
  sigma = flow.nearest_sigma(np.float32(u), flow.train_sigmas(3.0))
  sigma = jnp.broadcast_to(sigma, (3,))
  x = flow.add_noise(nhwc(e["reward/clean_latents"]), nhwc(e["reward/noise"]), sigma)
  return x, sigma


def dina_cond(e):
  return features.Cond(e["prompt_embeds"], e["pooled_prompt_embeds"])


# --- goldens ----------------------------------------------------------------------


@pytest.mark.parametrize("u", U)
def test_dina_scores(dina, u):
  model, e = dina
  score = model.run(*noisy_golden(e, u), dina_cond(e))
  assert score.shape == (3,) and score.dtype == jnp.float32
  assert rel_err(score, e[f"reward/score_u{u}"][:, 0]) <= TOL


def test_dina_features(dina):
  """What the head receives at u = 0.4."""
  model, e = dina
  x, sigma = noisy_golden(e, 0.4)
  backbone = jax.jit(lambda p, *args: nnx.merge(model.graphdef, p).backbone(*args))
  velocity, feats = backbone(model.params, x, 1000 * sigma, dina_cond(e))
  assert velocity is None
  assert rel_err(feats.temb, e["reward/temb_u0.4"]) <= 1e-5
  assert len(feats.image) == len(feats.text) == 3
  for j in range(3):
    assert rel_err(feats.image[j], e[f"reward/visual_{j}_u0.4"]) <= 1e-5
    assert rel_err(feats.text[j], e[f"reward/text_{j}_u0.4"]) <= 1e-5


def test_dina_ensemble(dina):
  model, e = dina
  x, sigma = (
    jnp.stack(a)
    for a in zip(*(noisy_golden(e, u) for u in e["reward/ensemble_u"]), strict=True)
  )
  score = model.run(x, sigma, dina_cond(e), method="ensemble")
  assert rel_err(score, e["reward/ensemble_score"][:, 0]) <= TOL


def test_head_copy_is_the_release(dina):
  torch = pytest.importorskip("torch")
  path = helpers.GOLDEN / "dina" / "reward" / "checkpoint" / "rm_head.pt"
  release = torch.load(path, weights_only=True)
  copy = helpers.golden("dina/rm_head")
  assert copy.keys() == release.keys()
  for key, array in copy.items():
    np.testing.assert_array_equal(array, release[key].numpy(), err_msg=key)


@pytest.mark.parametrize("t", ["0", "250", "751.5", "1000"])
def test_drm_scores(drm, t):
  model, e = drm
  cond = features.Cond(e["encoder_hidden_states"], e["pooled_projections"])
  sigma = np.full(3, float(t) / 1000, np.float32)
  score = model.run(nhwc(e["latents"]), sigma, cond)
  assert rel_err(score, e[f"score_t{t}"][:, 0]) <= TOL


def test_drm_features(drm):
  """The head's input: final norm, projection, unpatchified."""
  model, e = drm
  cond = features.Cond(e["encoder_hidden_states"], e["pooled_projections"])
  backbone = jax.jit(lambda p, *args: nnx.merge(model.graphdef, p).backbone(*args))
  t = np.full(3, 250, np.float32)
  velocity, _ = backbone(model.params, nhwc(e["latents"]), t, cond)
  assert rel_err(helpers.nchw(velocity), e["features_t250"]) <= 1e-5


# --- golden training steps --------------------------------------------------------


def pair_step(model, loss_fn, chosen, rejected, sigma, cond):
  """Scores of both, mean loss, and its gradient with respect to every parameter."""

  def loss(params):
    both = jax.tree.map(lambda a: jnp.concatenate([a, a]), (sigma, cond))
    x = jnp.concatenate([chosen, rejected])
    r = nnx.merge(model.graphdef, params)(x, *both)
    r_chosen, r_rejected = jnp.split(r, 2)
    return loss_fn(r_chosen, r_rejected, sigma).mean(), (r_chosen, r_rejected)

  sigma = jnp.asarray(sigma)
  (value, scores), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
  return value, scores, grads


def assert_gradients(found, expected, zero):
  """Relative error TOL; `zero(key)`: rounding noise, small beside the whole."""
  scale = np.sqrt(
    sum(np.sum(np.square(g, dtype=np.float64)) for g in expected.values())
  )
  for key, want in expected.items():
    if zero(key):
      assert np.linalg.norm(found[key]) <= 1e-5 * scale, key
      assert np.linalg.norm(want) <= 1e-5 * scale, key
    else:
      assert rel_err(found[key], want) <= TOL, key


def exported(keymap, grads):
  flat = {path: np.asarray(leaf) for path, leaf in grads.items()}
  return dict(engine.export(keymap, flat))


def test_dina_gradients(dina):
  """One Thurstone step: every adapter and every parameter of the head."""
  model, e = dina
  chosen, rejected = (
    flow.add_noise(nhwc(e[f"train/{k}"]), nhwc(e["train/noise"]), e["train/sigma"])
    for k in ("chosen", "reject")
  )
  value, scores, grads = pair_step(
    model, losses.thurstone, chosen, rejected, e["train/sigma"], dina_cond(e)
  )
  assert rel_err(scores[0], e["train/score_chosen"][:, 0]) <= TOL
  assert rel_err(scores[1], e["train/score_reject"][:, 0]) <= TOL
  np.testing.assert_allclose(value, e["train/loss"][0], rtol=1e-5)

  backbone = weights.flatten(grads["backbone"])
  adapters = {k: v for k, v in backbone.items() if "/lora_" in k}
  found = {
    key.replace("base_model.model.", "backbone."): g
    for key, g in exported(model.keymaps["lora"], adapters).items()
  }
  head = exported(model.keymaps["head"], weights.flatten(grads["head"]))
  found |= {f"reward_head.{key}": g for key, g in head.items()}
  expected = helpers.golden("dina/expected_grads")
  assert found.keys() == expected.keys()
  # A score's constant cancels in the pair, a key's in a softmax.
  zeros = ("head.head.bias", "head.ff.2.bias", "to_k_vis.bias", "to_k_text.bias")
  assert_gradients(found, expected, lambda key: key.endswith(zeros))


def test_drm_gradients(drm):
  """One Bradley-Terry step; the goldens hold a part of the gradients."""
  model, e = drm
  win, lose = (
    flow.add_noise(nhwc(e[k]), nhwc(e[f"noise_{k}"]), e["sigma"])
    for k in ("win", "lose")
  )
  cond = features.Cond(e["encoder_hidden_states"], e["pooled_projections"])
  value, scores, grads = pair_step(
    model, losses.bradley_terry, win, lose, e["sigma"], cond
  )
  assert rel_err(scores[0], e["score_win"][:, 0]) <= TOL
  assert rel_err(scores[1], e["score_lose"][:, 0]) <= TOL
  np.testing.assert_allclose(value, e["bt_loss"][0], rtol=1e-5)

  found = {}
  for part in ("backbone", "head"):
    found |= exported(model.keymaps[part], weights.flatten(grads[part]))
  expected = helpers.golden("drm/expected_grads")
  assert expected.keys() <= found.keys()
  # One channel per group of the first norm: it removes its convolution's bias.
  zeros = ("mlp.3.bias", "down1.0.bias")
  assert_gradients(found, expected, lambda key: key.endswith(zeros))


# --- other sizes ------------------------------------------------------------------

DINA_SIZES = {
  "plain": (dict(), dict()),
  "head width": (dict(), dict(width=32, num_queries=3, num_heads=4, lora_rank=3)),
  "embeddings tapped, projection": (
    dict(layers=4, dual=(0, 2)),
    dict(num_blocks=3, use_proj_in=True, image_taps=(0, 3), text_taps=(1,)),
  ),
  "all blocks but one, no adapters": (
    dict(layers=4, heads=3, head_dim=16, dual=(), pos_embed_max_size=9),
    dict(num_blocks=3, lora_rank=0, image_taps=(3,), text_taps=(0, 3), num_heads=2),
  ),
}


def dina_pair(torch_models, size, seed=0):
  """(ours, theirs) with the same random weights."""
  import peft

  backbone, release = DINA_SIZES[size]
  transformer = torch_models.make_transformer(seed=seed, **backbone)
  full = golden_models.load_mmdit(
    mmdit.MMDiTConfig.from_diffusers(transformer.config),
    helpers.numpy_state(transformer),
  )
  config = torch_models.DinaConfig(**release)
  theirs = torch_models.DinaReward(transformer, config, seed=seed + 1)
  adapter, adapters = {}, {}
  if config.lora_rank:
    found = theirs.backbone.peft_config["default"]
    adapter = dict(
      r=found.r,
      lora_alpha=found.lora_alpha,
      target_modules=sorted(found.target_modules),
      exclude_modules=sorted(found.exclude_modules or ()),
    )
    adapters = peft.get_peft_model_state_dict(theirs.backbone)
    adapters = {k: v.numpy() for k, v in adapters.items()}
  ours = golden_models.load_dina(
    full,
    config.release()["model"],
    adapter,
    adapters,
    helpers.numpy_state(theirs.reward_head),
  )
  return ours, theirs


def level_inputs(levels: int):
  """Torch-layout inputs: latents (k b C H W), sigmas (k b), context, pooled."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((levels, 2, 16, 6, 10), np.float32)
  sigma = np.linspace(0, 1, 2 * levels, dtype=np.float32).reshape(levels, 2)
  context = rng.standard_normal((2, 5, 32), np.float32)
  pooled = rng.standard_normal((2, 28), np.float32)
  return x, sigma, context, pooled


@pytest.mark.parametrize("size", DINA_SIZES)
def test_dina_parity(size):
  """One level, and an ensemble of three."""
  torch = pytest.importorskip("torch")
  from tests import torch_models

  ours, theirs = dina_pair(torch_models, size)
  x, sigma, context, pooled = level_inputs(3)
  cond = features.Cond(context, pooled)
  with torch.no_grad():
    tx, tt, *tc = map(torch.from_numpy, (x, 1000 * sigma, context, pooled))
    one = theirs(tx[1], tt[1], *tc)[:, 0]
    three = theirs.ensemble(list(tx), list(tt), *tc)[:, 0]
  assert rel_err(ours.run(nhwc(x[1]), sigma[1], cond), one) <= TOL
  levels = x.transpose(0, 1, 3, 4, 2)
  assert rel_err(ours.run(levels, sigma, cond, method="ensemble"), three) <= TOL
  assert rel_err(one, three) > 1e-3  # the levels matter


def test_ensemble_of_one_level_is_the_score(dina):
  model, e = dina
  x, sigma = noisy_golden(e, 0.4)
  one = model.run(x[None], sigma[None], dina_cond(e), method="ensemble")
  assert rel_err(one, model.run(x, sigma, dina_cond(e))) <= 1e-6


@pytest.mark.parametrize(
  "skip, base, groups, hw",
  [(1, 32, 8, (6, 10)), (2, 16, 16, (4, 6)), (0, 8, 2, (2, 2))],
)
def test_drm_parity(skip, base, groups, hw):
  """Sides that a stride of 2 halves to odd numbers; full depth without skipping."""
  torch = pytest.importorskip("torch")
  from tests import torch_models

  transformer = torch_models.make_transformer(seed=2, layers=3, dual=(0,))
  theirs = torch_models.DrmReward(
    transformer, skip_last_blocks=skip, base_channels=base, num_groups=groups, seed=3
  )
  full = mmdit.MMDiTConfig.from_diffusers(transformer.config)
  ours = golden_models.load_drm(full, helpers.numpy_state(theirs), skip, base, groups)
  x, sigma, context, pooled = level_inputs(1)
  x = np.ascontiguousarray(x[0, :, :, : hw[0], : hw[1]])
  with torch.no_grad():
    want = theirs(*map(torch.from_numpy, (x, 1000 * sigma[0], context, pooled)))
  got = ours.run(nhwc(x), sigma[0], features.Cond(context, pooled))
  assert rel_err(got, want[:, 0]) <= TOL


# --- options ----------------------------------------------------------------------

BACKBONE = mmdit.MMDiTConfig(
  num_layers=2,
  num_heads=2,
  head_dim=8,
  dual_layers=(0,),
  last_context_pre_only=False,
  has_output=False,
  context_dim=12,
  pooled_dim=10,
  pos_embed_size=8,
  pos_embed_base=8,
  image_taps=(1, 2),
  text_taps=(2,),
)
HEAD = qformer_head.QFormerHeadConfig(
  token_dim=16, width=16, num_image_taps=2, num_text_taps=1, num_heads=4
)
SMALL = reward.RewardConfig(BACKBONE, HEAD)
SMALL_DRM = reward.RewardConfig(
  dataclasses.replace(BACKBONE, has_output=True),
  conv_head.ConvHeadConfig(base_channels=8, num_groups=4, hidden=16),
)


def small(config=SMALL, **kw):
  return golden_models.random_model(
    lambda: reward.RewardModel(config, rngs=nnx.Rngs(0), **kw)
  )


def test_logistic_squashing():
  plain = small()
  squashed = small(dataclasses.replace(SMALL, logistic=True))
  fresh = golden_models.fresh_model(reward.Logistic)
  assert {k: float(v) for k, v in fresh.params.items()} == pytest.approx(
    {"eta3": 0.0, "eta4": 0.15}
  )
  inputs = golden_models.random_inputs(BACKBONE, b=3)
  s = np.asarray(plain.run(*inputs), np.float64)
  for eta3, eta4 in ((0.0, 0.15), (0.3, -0.7)):
    squash = {"eta3": np.float32(eta3), "eta4": np.float32(eta4)}
    got = squashed.run(*inputs, params={**plain.params, "squash": squash})
    want = 4 / (1 + np.exp(-(s - eta3) / (abs(eta4) + 1e-6))) - 2
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_logistic_does_not_overflow():
  fresh = golden_models.fresh_model(reward.Logistic)
  np.testing.assert_array_equal(fresh.run(jnp.array([-1e4, 1e4])), [-2, 2])


@pytest.mark.parametrize("config", [SMALL, SMALL_DRM], ids=["qformer", "conv"])
def test_dropout_needs_a_key(config):
  config = dataclasses.replace(
    config, head=dataclasses.replace(config.head, dropout=0.5)
  )
  model = small(config)
  off = small(
    dataclasses.replace(config, head=dataclasses.replace(config.head, dropout=0.0))
  )
  inputs = golden_models.random_inputs(BACKBONE, hw=(8, 8))
  want = off.run(*inputs)
  np.testing.assert_array_equal(model.run(*inputs), want)
  np.testing.assert_array_equal(off.run(*inputs, jax.random.key(0)), want)
  first, again, other = (model.run(*inputs, jax.random.key(i)) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.all(first != want) and np.all(first != other)


def test_dropout_keeps_the_mean():
  y = layers.dropout(jnp.ones((200, 200)), 0.25, jax.random.key(0))
  np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
  assert abs(float(y.mean()) - 1) < 0.01


def test_head_without_text():
  """The text branch is left out; the prompt still acts through the backbone."""
  model = small(
    dataclasses.replace(SMALL, head=dataclasses.replace(HEAD, num_text_taps=0))
  )
  assert not any("text" in path for path in weights.flatten(model.params["head"]))
  x, sigma, cond = golden_models.random_inputs(BACKBONE)
  other = cond.replace(context=cond.context[:, ::-1] + 1)
  assert np.all(model.run(x, sigma, cond) != model.run(x, sigma, other))
  one = model.run(x[None], sigma[None], cond, method="ensemble")
  assert rel_err(one, model.run(x, sigma, cond)) <= 1e-6


def test_bfloat16_scores_are_float32():
  want = small().run(*golden_models.random_inputs(BACKBONE))
  model = small(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, trained_dtype=jnp.float32)
  assert model.params["head"]["queries"].dtype == jnp.float32
  assert model.params["backbone"]["patch_embed"]["kernel"].dtype == jnp.bfloat16
  got = model.run(*golden_models.random_inputs(BACKBONE))
  assert got.dtype == jnp.float32
  assert rel_err(got, want) < 0.1
  # More digits than bfloat16 has.
  assert np.any(got != got.astype(jnp.bfloat16).astype(jnp.float32))


# --- presets ----------------------------------------------------------------------

MEDIUM_OUT, LARGE_OUT = 4_820_032, 11_989_824
COUNTS = {
  "dina_sd35m_12layers": 1_232_739_840 + 28_311_552 + 139_296_003,
  "drm_2b": 2_014_094_720 + MEDIUM_OUT,
  "drm_7b": 158_080 + 17_442_304 + 9_963_904 + 33 * 212_999_680 + LARGE_OUT,
}
# 3 x (conv + norm), two linear layers: 16 -> 256 -> 512 -> 512 -> 512 -> 1.
CONV_HEAD = (
  (16 * 9 + 1 + 2) * 256
  + (256 * 9 + 1 + 2) * 512
  + (512 * 9 + 1 + 2) * 512
  + 513 * 512
  + 513
)


@pytest.mark.parametrize("name", COUNTS)
def test_presets(name):
  """Full size, nothing allocated: parameter counts, and a forward pass's shapes."""
  config = build.REWARD_PRESETS[name]()
  make = lambda: reward.RewardModel(config, rngs=nnx.Rngs(0))  # noqa: E731
  model = nnx.eval_shape(make)
  count = weights.count(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  head = CONV_HEAD if name.startswith("drm") else 0
  assert count == COUNTS[name] + head

  graphdef, params = weights.split(model)
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
  score = jax.eval_shape(
    lambda p, *args: nnx.merge(graphdef, p)(*args),
    params,
    shape(2, 104, 156, 16),  # 832 x 1248 px
    shape(2),
    features.Cond(shape(2, 333, 4096), shape(2, 2048)),
  )
  assert score.shape == (2,) and score.dtype == jnp.float32


def test_presets_match_the_releases():
  dina = reward.RewardConfig.dina_sd35m_12layers()
  assert dina.backbone.image_taps == dina.backbone.text_taps == (4, 8, 12)
  assert dina.backbone.segments == (12,) and not dina.backbone.has_output
  assert (dina.lora.rank, dina.lora.alpha) == (64, 128)
  scoring = reward.ScoringConfig.dina()
  assert (scoring.u_generated, scoring.u_image) == (0.4, 0.1)
  assert (scoring.offset, scoring.scale) == (10, 10)
  assert reward.RewardConfig.drm_2b().backbone.num_layers == 21
  assert reward.RewardConfig.drm_7b().backbone.num_layers == 33
  scoring = reward.ScoringConfig.drm()
  assert scoring.u_generated == scoring.u_image == 0 and not scoring.table


# --- errors -----------------------------------------------------------------------


def test_ensemble_needs_a_token_stage():
  model = small(SMALL_DRM)
  x, sigma, cond = golden_models.random_inputs(BACKBONE)
  with pytest.raises(ValueError, match="ConvHead has no token stage to ensemble"):
    model.run(x[None], sigma[None], cond, method="ensemble")


def test_conv_head_needs_the_output():
  model = small(dataclasses.replace(SMALL_DRM, backbone=BACKBONE))
  with pytest.raises(ValueError, match="set has_output=True"):
    model.run(*golden_models.random_inputs(BACKBONE))


@pytest.mark.parametrize("taps", [dict(num_image_taps=1), dict(num_text_taps=2)])
def test_other_taps_than_the_head_has(taps):
  model = small(dataclasses.replace(SMALL, head=dataclasses.replace(HEAD, **taps)))
  with pytest.raises(ValueError, match=r"\(image, text\) taps, got \(2, 1\)"):
    model.run(*golden_models.random_inputs(BACKBONE))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: dataclasses.replace(HEAD, width=18), "width=18 must be a multiple of 4"),
    (lambda: dataclasses.replace(HEAD, num_heads=3), "num_heads=3"),
    (lambda: dataclasses.replace(HEAD, num_image_taps=0), "must be >= 1"),
    (lambda: conv_head.ConvHeadConfig(base_channels=48), "base_channels=48"),
  ],
  ids=["width", "heads", "taps", "groups"],
)
def test_invalid_head_config(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_adapters_are_only_on_the_backbone():
  config = dataclasses.replace(SMALL, lora=lora.LoRAConfig(2, 4))
  model = small(config)
  adapted = [p for p in weights.flatten(model.params) if "lora_" in p]
  assert adapted and all(p.startswith("backbone/blocks/") for p in adapted)
