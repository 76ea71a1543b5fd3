"""The model folder: what conversion writes and everything else loads.

```
DIR/config.json      what is in it: one readable entry per component
DIR/transformer/     Orbax checkpoints, one per component, in canonical layout
DIR/vae/ clip_l/ clip_g/ t5/ reward/ lora/
DIR/tokenizer/ tokenizer_2/ tokenizer_3/ scheduler/     copied files
```

A folder may name another one as its `base`: components it does not hold are found
there, so that many reward models share one copy of the generator.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lrm_jax import weights

FORMAT = "lrm_jax"
VERSION = 1
CONFIG = "config.json"


class FolderError(ValueError):
  """A model folder that is missing, incomplete or of another format."""


@contextlib.contextmanager
def write_atomically(
  out: str | os.PathLike,
  *,
  force: bool,
  sources: Iterable[str | os.PathLike | None] = (),
  directory: bool = True,
) -> Iterator[pathlib.Path]:
  """Yields a temporary sibling of `out` that becomes `out` only if all goes well.

  An interrupted or failed run leaves no `out` (and, with `force`, the old one as it
  was).

  Args:
    force: replace an existing `out`.
    sources: what the new contents are made from; replacing them is refused.
    directory: False for a single file, which the caller then creates.

  Raises:
    FileExistsError: `out` exists and `force` is not given.
    FolderError: `out` is one of `sources`, or holds one.
  """
  out = pathlib.Path(os.path.abspath(out))
  for source in (pathlib.Path(s).resolve() for s in sources if s is not None):
    if out.resolve() in (source, *source.parents):
      raise FolderError(f"{out} would replace its own source {source}")
  if os.path.lexists(out) and not force:
    raise FileExistsError(f"{out} exists: choose another name or pass --force")
  out.parent.mkdir(parents=True, exist_ok=True)
  partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
  _remove(partial)
  if directory:
    partial.mkdir()
  try:
    yield partial
    _replace(partial, out)
  finally:
    _remove(partial)


def _replace(new: pathlib.Path, out: pathlib.Path) -> None:
  """Renames `new` to `out`; a folder cannot be renamed over a full one."""
  if not os.path.lexists(out):
    new.rename(out)
    return
  old = out.with_name(f".{out.name}.old-{os.getpid()}")
  out.rename(old)
  try:
    new.rename(out)
  except BaseException:
    old.rename(out)
    raise
  _remove(old)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def write_config(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes `config.json`; `config` holds `components` and what else is to be kept."""
  config = {"format": FORMAT, "version": VERSION, **config}
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
  """`config.json` of a model folder.

  Raises:
    FolderError: not a model folder, or of another version.
  """
  path = pathlib.Path(folder) / CONFIG
  if not path.is_file():
    raise FolderError(
      f"{folder} is not a model folder (no {CONFIG}): make one with "
      "convert/torch_to_flax.py or a trainer (the quickstart's generator: python "
      "train/generator.py --config configs/quickstart_generator.py)"
    )
  try:
    config = json.loads(path.read_text())
  except json.JSONDecodeError as e:
    raise FolderError(f"{path} is not valid JSON: {e}") from e
  if not isinstance(config, dict):
    raise FolderError(f"{path} holds no JSON object, so it is not a model folder's")
  found = (config.get("format"), config.get("version"))
  if found != (FORMAT, VERSION):
    raise FolderError(
      f"{path} has (format, version) = {found}, this program reads "
      f"{(FORMAT, VERSION)}: convert the checkpoint again"
    )
  return config


def find(folder: str | os.PathLike, name: str) -> tuple[pathlib.Path, dict[str, Any]]:
  """Where a component lives (here or in a base folder) and its config entry.

  Raises:
    FolderError: neither this folder nor its bases hold it.
  """
  seen = []
  here: pathlib.Path | None = pathlib.Path(folder)
  while here is not None and here.resolve() not in seen:
    seen.append(here.resolve())
    config = read_config(here)
    if name in config["components"]:
      return here / name, config["components"][name]
    base = config.get("base")
    here = None if base is None else (here / base)
  where = " or its base ".join(str(p) for p in seen)
  raise FolderError(f"{where} holds no component {name!r}")


def has(folder: str | os.PathLike, name: str) -> bool:
  """Whether `find` would succeed."""
  try:
    find(folder, name)
  except FolderError:
    return False
  return True


def save_params(path: pathlib.Path, leaves: Mapping[str, np.ndarray]) -> None:
  """Writes path -> array as one Orbax checkpoint.

  The arrays are written from where they are (Orbax would copy them all first, which
  only an asynchronous save needs), so that the peak is the component plus little.
  Uncompressed: weights hardly compress, and it is 10x faster.

  Raises:
    OSError: it could not be written.
  """
  handlers = ocp.type_handlers
  in_place = handlers.create_type_handler_registry(
    (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, handlers.ArrayHandler()),  # not used; Orbax warns where it is missing
  )
  handler = ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=_gigabytes(leaves.values()),
    use_compression=False,
    type_handler_registry=in_place,
    multiprocessing_options=_alone(),
  )
  tree = _string_keys(weights.unflatten({k: np.asarray(v) for k, v in leaves.items()}))
  with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
    try:
      checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
    except (ValueError, OSError) as e:  # TensorStore's errors are ValueErrors
      reason = str(e).splitlines()[0][:300]
      raise OSError(
        f"writing {path} failed: {reason}. Is the disk full or read-only?"
      ) from e


def _alone() -> ocp.options.MultiprocessingOptions:
  """Orbax would wait for the run's other processes, which do not come here."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"host{this}"
  )


def _gigabytes(leaves: Iterable[np.ndarray]) -> int:
  """The bound on data in flight: the largest array (less would never be admitted)."""
  return max(1, math.ceil(max(leaf.nbytes for leaf in leaves) / 1e9))


def load_params(path: pathlib.Path) -> dict:
  """Reads a component as nested parameters of numpy arrays.

  Raises:
    FolderError: no readable checkpoint there.
  """
  if not path.is_dir():
    raise FolderError(f"{path} is missing: the model folder is incomplete")
  try:
    options = _alone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
      item = checkpointer.metadata(path.absolute()).item_metadata
      if item is None:
        raise ValueError("its metadata is missing or truncated")
      args = _as_numpy(ocp.checkpoint_utils.construct_restore_args(item.tree))
      tree = checkpointer.restore(
        path.absolute(), args=ocp.args.PyTreeRestore(restore_args=args)
      )
  except (ValueError, KeyError, OSError, AttributeError) as e:
    raise FolderError(f"{path} cannot be read as a checkpoint: {e}") from e
  return weights.unflatten(weights.flatten(tree))


def _as_numpy(args: Any) -> Any:
  if isinstance(args, Mapping):
    return {k: _as_numpy(v) for k, v in args.items()}
  return ocp.RestoreArgs(restore_type=np.ndarray)


def _string_keys(tree: Any) -> Any:
  if isinstance(tree, Mapping):
    return {str(k): _string_keys(v) for k, v in tree.items()}
  return tree
