"""Prompts to conditioning: tokens, warnings, and the golden embeddings."""

import json
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import text
from lrm_jax.keymaps import clip as clip_keymap
from lrm_jax.keymaps import t5 as t5_keymap
from lrm_jax.models import clip, t5
from tests import helpers

PROMPTS = [
  "a girl walking in the street",
  "a photo of a cat",
  "two dogs playing chess, studio light, 35mm",
]


@pytest.fixture(scope="module")
def tokenizers():
  return text.Tokenizers.load(helpers.GOLDEN / "dina" / "sd35")


@pytest.fixture(scope="module")
def expected():
  return helpers.golden("dina/expected")


@pytest.fixture(scope="module")
def encoders():
  """The three golden encoders as one function of the tokens."""
  loaded = []
  for name, config_class, model_class, table in (
    ("text_encoder", clip.CLIPTextConfig, clip.CLIPText, clip_keymap),
    ("text_encoder_2", clip.CLIPTextConfig, clip.CLIPText, clip_keymap),
    ("text_encoder_3", t5.T5Config, t5.T5Encoder, t5_keymap),
  ):
    folder = f"dina/sd35/{name}"
    config = config_class.from_transformers(helpers.golden_config(f"{folder}/config"))
    graphdef, params = helpers.load(
      lambda m=model_class, c=config: m(c, rngs=nnx.Rngs(0)),
      table.transformers(config),
      helpers.golden(f"{folder}/model"),
    )
    loaded.append((graphdef, params))

  @jax.jit
  def encode(tokens):
    models = [nnx.merge(graphdef, params) for graphdef, params in loaded]
    return text.embed(
      models[0](tokens["clip_l"]),
      models[1](tokens["clip_g"]),
      models[2](tokens["t5"]),
    )

  return encode


def test_tokens(tokenizers, expected):
  tokens = tokenizers.tokenize(PROMPTS, 32)
  assert list(tokens) == ["clip_l", "clip_g", "t5"]
  for i, ids in enumerate(tokens.values()):
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected[f"tokens_{i + 1}"])


def test_embeddings(tokenizers, expected, encoders):
  for prompts, prefix in ((PROMPTS, ""), ([""], "negative_")):
    cond = encoders(tokenizers.tokenize(prompts, 32))
    want = expected[f"{prefix}prompt_embeds"]
    assert helpers.rel_err(cond.context, want) <= 1e-4
    want = expected[f"{prefix}pooled_prompt_embeds"]
    assert helpers.rel_err(cond.pooled, want) <= 1e-4


def test_embed_layout():
  rng = np.random.default_rng(0)
  shapes = [(2, 77, 3), (2, 3), (2, 77, 5), (2, 5), (2, 10, 12)]
  c, cp, g, gp, t = (jnp.asarray(rng.standard_normal(s)) for s in shapes)
  cond = text.embed((c, cp), (g, gp), t)
  assert cond.context.shape == (2, 87, 12) and cond.pooled.shape == (2, 8)
  np.testing.assert_array_equal(cond.context[:, :77, :3], c)
  np.testing.assert_array_equal(cond.context[:, :77, 3:8], g)
  np.testing.assert_array_equal(cond.context[:, :77, 8:], 0)
  np.testing.assert_array_equal(cond.context[:, 77:], t)
  np.testing.assert_array_equal(cond.pooled, jnp.concatenate([cp, gp], -1))

  cond = text.embed((c, cp), (g, gp), text.no_t5(2, 6, 12))
  assert cond.context.shape == (2, 83, 12)
  np.testing.assert_array_equal(cond.context[:, 77:], 0)

  with pytest.raises(ValueError, match="do not fit the context width 4"):
    text.embed((c, cp), (g, gp), t[..., :4])


def test_cut_prompts_are_named(tokenizers):
  words = [f"word{i}" for i in range(40)]
  long = " ".join(words)
  with pytest.warns(UserWarning) as record:
    tokens = tokenizers.tokenize(["a cat", long, long + " too"], 16)
  messages = [str(w.message) for w in record]
  assert [m.split()[0] for m in messages] == ["clip_l", "clip_g", "t5"]
  for message, limit in zip(messages, (77, 77, 16), strict=True):
    assert f"keeps {limit} of the" in message
    assert repr(long) in message and "and 1 more of these prompts" in message
    # The end of the prompt is lost, its beginning is not.
    lost = message.split("; lost is ")[1].replace(" ", "")
    assert "word0" not in lost and lost.startswith("'")
  assert tokens["clip_l"].shape == (3, 77) and tokens["t5"].shape == (3, 16)
  # The end token stays.
  end = tokenizers.clip_l.eos_token_id
  assert (tokens["clip_l"][1:, -1] == end).all()
  assert (tokens["t5"][1:, -1] == tokenizers.t5.eos_token_id).all()


def test_prompts_that_fit_do_not_warn(tokenizers):
  length = len(tokenizers.t5(PROMPTS[2])["input_ids"])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    tokens = tokenizers.tokenize([PROMPTS[2]], length)
  assert (tokens["t5"] != tokenizers.t5.pad_token_id).all()
  with pytest.warns(UserWarning, match=f"t5 keeps {length - 1} of the {length}"):
    tokenizers.tokenize([PROMPTS[2]], length - 1)


def test_without_t5(tmp_path, expected):
  folder = helpers.GOLDEN / "dina" / "sd35"
  for name in ("tokenizer", "tokenizer_2"):
    (tmp_path / name).symlink_to(folder / name)
  with pytest.raises(FileNotFoundError, match="tokenizer_3"):
    text.Tokenizers.load(tmp_path)
  tokens = text.Tokenizers.load(tmp_path, with_t5=False).tokenize(PROMPTS, 32)
  assert list(tokens) == ["clip_l", "clip_g"]
  np.testing.assert_array_equal(tokens["clip_g"], expected["tokens_2"])


@pytest.mark.parametrize("length", [0, 513, -1])
def test_bad_t5_length(tokenizers, length):
  with pytest.raises(ValueError, match=f"t5_length={length} is not in 1..512"):
    tokenizers.tokenize(PROMPTS, length)


def test_bad_prompts(tokenizers):
  with pytest.raises(TypeError, match="sequence of strings"):
    tokenizers.tokenize("a cat", 32)
  with pytest.raises(TypeError):  # of jaxtyping's hook, which comes first in tests
    tokenizers.tokenize(["a cat", None], 32)
  with pytest.raises(ValueError, match="empty"):
    tokenizers.tokenize([], 32)


def test_pads_differ(tokenizers):
  """CLIP-L pads with its end token, CLIP-G with "!": each from its own folder."""
  tokens = tokenizers.tokenize(["a cat"])
  assert tokens["t5"].shape == (1, 256)
  for name, folder in (("clip_l", "tokenizer"), ("clip_g", "tokenizer_2")):
    path = helpers.GOLDEN / "dina" / "sd35" / folder / "tokenizer_config.json"
    pad = json.loads(path.read_text())["pad_token"]
    pad_id = getattr(tokenizers, name).convert_tokens_to_ids(pad)
    assert tokens[name][0, -1] == pad_id
