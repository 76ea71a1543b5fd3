"""What every file of configs/ promises."""

import pathlib
import runpy

from ml_collections import ConfigDict
import pytest

CONFIGS = sorted(pathlib.Path(__file__).parent.parent.glob("configs/*.py"))
NOT_ON_THE_COMMAND_LINE = ("model.lora",)  # a table of its own, or none


def bare_nones(config: ConfigDict, prefix: str = "") -> list[str]:
  """Keys whose value is None without a type: absl's flags refuse to override them."""
  found = []
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict):
      found += bare_nones(value, f"{prefix}{key}.")
    elif value is None and config.get_type(key) is type(None):
      found.append(prefix + key)
  return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_not_set_can_be_set_on_the_command_line(path):
  config = runpy.run_path(str(path))["get_config"]()
  assert not set(bare_nones(config)) - set(NOT_ON_THE_COMMAND_LINE)
