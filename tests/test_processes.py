"""Signals, and starting as one of several processes (see also test_survival)."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_and_the_handlers_come_back(number):
  before = signal.getsignal(number)
  with processes.StopSignal() as stop:
    assert not stop.requested(1)
    os.kill(os.getpid(), number)
    assert stop.requested(2)
    assert signal.getsignal(number) == before  # a second signal ends the process
  assert signal.getsignal(number) == before


def test_one_process_is_the_main_one():
  processes.initialize(None, 1, 0)
  assert processes.is_main()
  value = jnp.arange(8.0)
  np.testing.assert_array_equal(processes.to_host(value), np.arange(8.0))
  assert jax.process_count() == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((None, 2, 0), "--num_processes=2 needs --coordinator"),
    (("127.0.0.1:1", 2, 2), "--process_id=2 must lie in 0..1"),
  ],
)
def test_numbers_that_do_not_fit(arguments, message):
  with pytest.raises(ValueError, match=message):
    processes.initialize(*arguments)
