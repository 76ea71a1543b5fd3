"""CLIP's text encoders against transformers and the golden vectors."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import weights
from lrm_jax.keymaps import clip as keymap
from lrm_jax.keymaps import engine
from lrm_jax.models import clip
from tests import helpers

SMALL = dict(
  vocab_size=60,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  projection_dim=16,
  max_position_embeddings=77,
  hidden_act="quick_gelu",
  layer_norm_eps=1e-5,
  eos_token_id=2,
)
VARIANTS = {
  "quick_gelu, legacy eos": {},
  "gelu, last id is eos": dict(hidden_act="gelu", eos_token_id=59, hidden_size=32),
  # Ids above eos occur, so the two rules differ.
  "gelu, eos within the vocabulary": dict(
    hidden_act="gelu", eos_token_id=30, num_hidden_layers=4
  ),
  "one layer": dict(num_hidden_layers=1, projection_dim=24),
  "other eps and length": dict(layer_norm_eps=1e-3, max_position_embeddings=20),
}


def make(config, **kw):
  return lambda: clip.CLIPText(config, rngs=nnx.Rngs(0), **kw)


def token_ids(fields, batch=3) -> np.ndarray:
  """Start token, random ids, and (more than once) end tokens."""
  rng = np.random.default_rng(0)
  length = fields["max_position_embeddings"]
  ids = rng.integers(3, fields["vocab_size"], (batch, length)).astype(np.int32)
  eos = fields["eos_token_id"]
  eos = fields["vocab_size"] - 1 if eos == 2 else eos
  for i, row in enumerate(ids):
    row[5 + 4 * i] = eos
    row[-3:] = eos
  return ids


def run(graphdef, params, ids):
  return jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, ids)


def torch_model(fields):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  config = transformers.CLIPTextConfig(**fields, attention_dropout=0.0)
  return transformers.CLIPTextModelWithProjection(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant):
  torch = pytest.importorskip("torch")
  from tests import torch_models

  fields = {**SMALL, **VARIANTS[variant]}
  theirs = torch_models.draw_weights(torch_model(fields), seed=0).eval()
  state = helpers.numpy_state(theirs)
  config = clip.CLIPTextConfig.from_transformers(theirs.config.to_dict())
  loaded = helpers.load(make(config), keymap.transformers(config), state)

  ids = token_ids(fields)
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids).long(), output_hidden_states=True)
  tokens, pooled = run(*loaded, ids)
  assert helpers.rel_err(tokens, want.hidden_states[-2]) <= 1e-4
  assert helpers.rel_err(pooled, want.text_embeds) <= 1e-4

  half = {k: v.astype(np.float16) for k, v in state.items()}  # as published
  helpers.assert_round_trip(make(config), keymap.transformers(config), half)


def test_eos_rules_differ():
  fields = {**SMALL, "eos_token_id": 30}
  config = clip.CLIPTextConfig.from_transformers(fields)
  legacy = dataclasses.replace(config, eos_token_id=clip.LEGACY_EOS)
  ids = jnp.asarray(token_ids(fields))
  first = [list(row).index(30) for row in ids.tolist()]
  largest = [row.index(max(row)) for row in ids.tolist()]
  assert clip.pooled_position(ids, config.eos_token_id).tolist() == first
  assert clip.pooled_position(ids, legacy.eos_token_id).tolist() == largest
  assert first != largest


@pytest.mark.parametrize("index", [1, 2])
def test_golden(index):
  folder = "dina/sd35/text_encoder" + ("_2" if index == 2 else "")
  config = clip.CLIPTextConfig.from_transformers(
    helpers.golden_config(f"{folder}/config")
  )
  loaded = helpers.load(
    make(config), keymap.transformers(config), helpers.golden(f"{folder}/model")
  )
  want = helpers.golden("dina/expected")
  tokens, pooled = run(*loaded, want[f"tokens_{index}"].astype(np.int32))
  # CLIP-L stands before CLIP-G on the channels.
  part = np.s_[:24] if index == 1 else np.s_[24:]
  assert helpers.rel_err(tokens, want["prompt_embeds"][:, :77, part]) <= 1e-4
  assert helpers.rel_err(pooled, want["pooled_prompt_embeds"][:, part]) <= 1e-4


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g"])
@pytest.mark.parametrize("projection", [True, False])
def test_single_file(encoder, projection):
  state = helpers.golden("dina/sd35/text_encoder/model")
  config = clip.CLIPTextConfig.from_transformers(
    helpers.golden_config("dina/sd35/text_encoder/config")
  )
  if not projection:
    config = dataclasses.replace(config, projection_dim=None)
    del state["text_projection.weight"]
  prefix = f"text_encoders.{encoder}."
  single = {f"{prefix}transformer.{key}": array for key, array in state.items()}
  table = keymap.stability(config, encoder)
  helpers.assert_round_trip(make(config), table, single)

  # Buffers that some files carry are skipped; both layouts fill the same model.
  extra = {
    prefix + "logit_scale": np.zeros(()),
    prefix + "transformer.text_model.embeddings.position_ids": np.arange(77)[None],
  }
  graphdef, a = helpers.load(make(config), table, {**single, **extra})
  _, b = helpers.load(make(config), keymap.transformers(config), state)
  jax.tree.map(np.testing.assert_array_equal, a, b)

  _, pooled = run(graphdef, a, np.ones((2, 77), np.int32))
  assert pooled.shape == (2, 24)
  with pytest.raises(engine.ConversionError, match="unexpected key"):
    helpers.load(make(config), table, {**single, f"{prefix}scaled_fp8": np.zeros(())})


def test_single_file_of_another_encoder():
  with pytest.raises(ValueError, match="'t5xxl' is neither"):
    keymap.stability(clip.CLIPTextConfig.clip_l(), "t5xxl")


@pytest.mark.parametrize(
  "config, count",
  [
    (clip.CLIPTextConfig.clip_l(), 123_650_304),
    (clip.CLIPTextConfig.clip_g(), 694_659_840),
  ],
  ids=["clip_l", "clip_g"],
)
def test_full_size(config, count):
  _, params = weights.abstract(make(config))
  assert weights.count(params) == count

  torch = pytest.importorskip("torch")
  with torch.device("meta"):
    theirs = torch_model(
      dict(
        hidden_size=config.dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        projection_dim=config.projection_dim,
        hidden_act=config.act,
        eos_token_id=2,
      )
    )
  assert clip.CLIPTextConfig.from_transformers(theirs.config.to_dict()) == config
  source = {k: (tuple(v.shape), np.float32) for k, v in theirs.state_dict().items()}
  _, problems = engine.match(
    keymap.transformers(config), source, weights.shapes(params)
  )
  assert not problems


def test_bfloat16_stays_close():
  config = clip.CLIPTextConfig.from_transformers(SMALL)
  graphdef, params = weights.split(make(config)())
  graphdef16, _ = weights.abstract(make(config, dtype=jnp.bfloat16))
  params16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  ids = token_ids(SMALL)
  for got, want in zip(
    run(graphdef16, params16, ids), run(graphdef, params, ids), strict=True
  ):
    assert got.dtype == jnp.bfloat16
    assert helpers.rel_err(got, want) < 3e-2


def test_bad_inputs():
  config = clip.CLIPTextConfig.from_transformers(SMALL)
  with pytest.raises(ValueError, match="77 positions"):
    make(config)()(jnp.zeros((1, 78), jnp.int32))
  tokens, _ = make(config)()(jnp.full((1, 77), 60))  # one past the vocabulary
  assert jnp.isnan(tokens).all()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"hidden_act": "relu"}, "act='relu'"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"num_attention_heads": 5}, "not a multiple of num_heads=5"),
    ({"eos_token_id": [1, 2]}, "not one token id"),
  ],
)
def test_unsupported_config(change, message):
  with pytest.raises(ValueError, match=message):
    clip.CLIPTextConfig.from_transformers({**SMALL, **change})
