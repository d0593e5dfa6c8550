"""Ctrl-C and SIGTERM: the first is orderly, the second quick."""

import signal

import pytest
from octavo.launch.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_interrupts_and_the_second_hurries(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert not signals.hurry.is_set()
        signal.raise_signal(number)
        assert signals.hurry.is_set()
    assert signal.getsignal(number) is before


def test_once_the_end_has_begun_nothing_is_interrupted():
    with StopSignals() as signals:
        signals.begin_stop()
        signal.raise_signal(signal.SIGTERM)
        assert signals.hurry.is_set()
