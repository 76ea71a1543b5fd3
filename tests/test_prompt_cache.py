"""The prompt cache gives back what was put in, or says what is wrong with it."""

import concurrent.futures
import json
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from lrm_jax.data.prompt_cache import PromptCache, PromptCacheWriter
from lrm_jax.data.source import DataError

PROMPTS = ["", "a cat", "zwei Hunde, \u732b \U0001f431", "a cat\nand more", "a dog"]
OPTIONS = dict(t5_length=3, dtype="bfloat16", encoder="tiny")


def embed(prompts, tokens=5, width=4):
  """Embeddings that tell which prompt they belong to."""
  seeds = [sum(prompt.encode()) for prompt in prompts]
  draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)  # noqa: E731
  context = np.stack([draw(seed, tokens, width) for seed in seeds])
  return context.astype(np.float32), context[:, 0, :3].astype(np.float32)


def write(folder, prompts=PROMPTS, **changes):
  with PromptCacheWriter(folder, **(OPTIONS | dict(shard_prompts=2) | changes)) as out:
    if new := out.missing(prompts):
      out.append(new, *embed(new))


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def assert_holds(cache, prompts=PROMPTS):
  context, pooled = embed(prompts)
  for i, prompt in enumerate(prompts):
    got = cache[prompt]
    assert got[0].dtype == got[1].dtype == cache.dtype
    np.testing.assert_array_equal(got[0], context[i].astype(cache.dtype))
    np.testing.assert_array_equal(got[1], pooled[i].astype(cache.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, dtype):
  write(tmp_path / "deep" / "cache", dtype=dtype)
  cache = PromptCache(tmp_path / "deep" / "cache")
  assert len(cache) == 5 and cache.prompts == tuple(PROMPTS)
  assert cache.context_shape == (5, 4) and cache.pooled_dim == 3
  assert cache.t5_length == 3 and cache.encoder == "tiny"
  assert cache.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
  assert "a cat" in cache and "a cow" not in cache and 3 not in cache
  assert_holds(cache)
  shards = [f"prompts-0000-00000{i}.safetensors" for i in range(3)]
  assert names(tmp_path / "deep" / "cache") == ["cache.json", *shards]


def test_pickled_and_read_by_many_threads(tmp_path):
  write(tmp_path)
  cache = pickle.loads(pickle.dumps(PromptCache(tmp_path)))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: assert_holds(cache), range(20)))


def test_a_folder_is_continued(tmp_path):
  write(tmp_path, PROMPTS[:3])
  before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
  (tmp_path / ".prompts-0000-000002.safetensors.partial-1").write_text("half")
  with PromptCacheWriter(tmp_path, **OPTIONS) as out:
    assert out.missing([*PROMPTS[::-1], "a dog"]) == ["a dog", PROMPTS[3]]
    # Prompts that are there stay as they are, whatever is given for them.
    context, pooled = embed(PROMPTS)
    context[:3] = -1
    out.append(PROMPTS, context, pooled)
    assert out.missing(PROMPTS) == []
  assert_holds(PromptCache(tmp_path))
  assert len(names(tmp_path)) == 4  # the killed writer's half shard is gone
  assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


def test_batches_need_not_be_shards(tmp_path):
  prompts = [f"prompt {i}" for i in range(23)]
  with PromptCacheWriter(tmp_path, **OPTIONS, shard_prompts=5) as out:
    for start in range(0, 23, 4):
      batch = prompts[start : start + 4]
      out.append(batch, *embed(batch))
  assert_holds(PromptCache(tmp_path), prompts)
  assert len(names(tmp_path)) == 1 + 5


def test_hosts_share_a_folder(tmp_path):
  writers = [PromptCacheWriter(tmp_path, **OPTIONS, host=host) for host in range(3)]
  for host, writer in enumerate(writers):
    mine = ["", *PROMPTS[1 + host :: 3]]
    writer.append(mine, *embed(mine))
  assert names(tmp_path) == []
  for writer in reversed(writers):
    writer.flush()
  cache = PromptCache(tmp_path)
  assert len(cache) == 5 and len(names(tmp_path)) == 4
  assert_holds(cache)

  # One that opened an empty folder before another settled its settings.
  other = PromptCacheWriter(tmp_path / "new", **OPTIONS, host=1)
  write(tmp_path / "new", dtype="float32")
  other.append([""], *embed([""]))
  with pytest.raises(DataError, match="dtype 'float32', not 'bfloat16'"):
    other.flush()
  assert_holds(PromptCache(tmp_path / "new"))


@pytest.mark.parametrize(
  "change", [dict(t5_length=4), dict(dtype="float32"), dict(encoder="another")]
)
def test_other_settings_are_refused(tmp_path, change):
  write(tmp_path)
  with pytest.raises(DataError, match=f"other settings: {[*change][0]} .*another fold"):
    PromptCacheWriter(tmp_path, **(OPTIONS | change))
  with PromptCacheWriter(tmp_path, **OPTIONS) as out:
    with pytest.raises(DataError, match=r"context_shape \(5, 6\), not \(5, 4\)"):
      out.append(["x"], *embed(["x"], width=6))


def test_bad_embeddings_and_arguments(tmp_path):
  def bad(match, *args, error=DataError, **changes):
    with pytest.raises(error, match=match):
      with PromptCacheWriter(tmp_path, **(OPTIONS | changes)) as out:
        out.append(*args)

  context, pooled = embed(["x", "y"])
  bad("1 prompts with context", ["x"], context, pooled)
  bad(r"should be \(p, l, d\)", ["x", "y"], pooled, context)
  context[1, 2, 3] = np.nan
  bad("embedding of 'y' holds NaN", ["x", "y"], context, pooled)
  pooled[0, 0] = np.inf
  bad("embedding of 'x' holds NaN or inf", ["x", "y"], context, pooled)
  for change in (dict(dtype="int8"), dict(host=-1), dict(shard_prompts=0)):
    bad(f"{[*change][0]}=", [], context, pooled, error=ValueError, **change)
  assert names(tmp_path) == []  # a block that ends with an error writes nothing


def test_missing_prompts(tmp_path):
  write(tmp_path, PROMPTS[1:])
  cache = PromptCache(tmp_path)
  with pytest.raises(DataError, match="no embedding of ''.*precompute_prompts.py"):
    cache[""]
  cache.require(PROMPTS[1:])
  with pytest.raises(DataError, match="of 'x' and 2 more .it holds 4 prompts at T5 le"):
    cache.require(["a cat", "x", "y", "x", ""])


def damaged(folder, damage):
  write(folder)
  damage(folder)
  with pytest.raises(DataError) as caught:
    assert_holds(PromptCache(folder))
  return str(caught.value)


def shard(folder, number=1):
  return folder / f"prompts-0000-{number:06d}.safetensors"


def test_damaged_folders(tmp_path):
  def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))

  def other_settings(folder):
    write(folder / "other", dtype="float32")
    shard(folder / "other").replace(shard(folder))

  def flip(data):
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]

  for i, (damage, match) in enumerate([
    (lambda f: (f / "cache.json").unlink(), "not a prompt cache (no cache.json)"),
    (lambda f: (f / "cache.json").write_text("{"), "cache.json does not describe"),
    (lambda f: rewrite(f / "cache.json", lambda d: d[:-9]), "cache.json does not"),
    (lambda f: rewrite(f / "cache.json", lambda d: d.replace(b": 1", b": 2")),
     "version) = ('lrm_jax.prompt_cache', 2)"),
    (lambda f: (f / "cache.json").write_text("[]"), "cache.json does not describe"),
    (lambda f: (f / "cache.json").write_bytes(b"\xff"), "cache.json is damaged"),
    (lambda f: shard(f).unlink(), "lacks prompts-0000-000001.safetensors"),
    (lambda f: shard(f, 0).unlink(), "lacks prompts-0000-000000.safetensors"),
    (lambda f: rewrite(shard(f), lambda d: d[:-1]), "000001.safetensors cannot be re"),
    (lambda f: rewrite(shard(f), lambda d: d[:9]), "000001.safetensors cannot be re"),
    (lambda f: rewrite(shard(f), lambda d: b""), "000001.safetensors cannot be read"),
    (lambda f: rewrite(shard(f), flip), "000001.safetensors: the embedding in row"),
    (other_settings, "000001.safetensors has settings"),
  ]):  # fmt: skip
    message = damaged(tmp_path / str(i), damage)
    assert match in message, (i, message)

  # A shard that vanishes or changes after the folder was opened.
  write(tmp_path)
  cache = PromptCache(tmp_path)
  shard(tmp_path, 0).unlink()
  with pytest.raises(DataError, match="000000.safetensors cannot be read"):
    cache[""]


def test_a_list_of_prompts_that_does_not_fit(tmp_path):
  write(tmp_path)
  data = shard(tmp_path).read_bytes()
  size = int.from_bytes(data[:8], "little")
  head = json.loads(data[8 : 8 + size])
  head["__metadata__"]["prompts"] = json.dumps(["only one"])
  head = json.dumps(head).encode()
  shard(tmp_path).write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
  with pytest.raises(DataError, match="lists 1 prompts and 2 checksums, but holds"):
    PromptCache(tmp_path)


WRITER = """
import sys
from lrm_jax.data.prompt_cache import PromptCacheWriter
from tests import test_prompt_cache as t
prompts = [f"prompt {i}" for i in range(2000)]
with PromptCacheWriter(sys.argv[1], **t.OPTIONS, shard_prompts=8) as out:
  todo = out.missing(prompts)
  print(len(todo), flush=True)
  for prompt in todo:
    out.append([prompt], *t.embed([prompt], tokens=500))
    print(prompt, flush=True)
"""


def test_killed_writers(tmp_path):
  """SIGKILL at any moment: what is there is right, and the next run goes on."""
  folder, left = tmp_path / "cache", []
  for appended in (1, 203, None):  # before it is killed
    process = subprocess.Popen(
      [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    left.append(int(process.stdout.readline()))
    if appended is None:
      process.communicate()
    else:
      for _ in range(appended):
        process.stdout.readline()
      process.kill()
      process.communicate()
    if (folder / "cache.json").exists():
      cache = PromptCache(folder)
      context, _ = embed(cache.prompts, tokens=500) if len(cache) else ((), ())
      for i, prompt in enumerate(cache.prompts):
        np.testing.assert_array_equal(cache[prompt][0], context[i].astype(cache.dtype))
  assert process.returncode == 0 and len(cache) == 2000
  assert left[0] == 2000 and left[2] <= 2000 - 200, left
  assert not [name for name in names(folder) if name.startswith(".")]
