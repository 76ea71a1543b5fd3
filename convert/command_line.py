"""How a conversion script ends: one line for what is wrong, never a traceback."""

from collections.abc import Iterator
import contextlib
import signal
import sys

from lrm_jax.folder import FolderError
from lrm_jax.keymaps.engine import ConversionError


@contextlib.contextmanager
def one_line_errors(left: str = "nothing was written") -> Iterator[None]:
  """Bad input, an interrupt or a termination becomes a message and an exit code.

  Clean-up (`finally`) runs in every case, so that nothing half-written stays.

  Args:
    left: what an interrupted run leaves behind, for the message.

  Raises:
    SystemExit: "error: ..." (1), 130 for an interrupt, 143 for SIGTERM.
  """
  before = signal.signal(signal.SIGTERM, _terminate)
  try:
    yield
  # FolderError and ConversionError are ValueErrors; named for the reader.
  except (ConversionError, FolderError, OSError, ValueError) as e:
    raise SystemExit(f"error: {e}") from e
  except KeyboardInterrupt as e:
    print(f"interrupted: {left}", file=sys.stderr)
    raise SystemExit(130) from e
  finally:
    signal.signal(signal.SIGTERM, before)


def _terminate(number, frame):
  del frame
  raise SystemExit(128 + number)
