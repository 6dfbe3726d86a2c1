"""Whether the cluster's head can still be reached. No Ray here.

Ray waits a minute for a head that is gone and then ends the process that waits, in the middle of its work and with the
exit code of a bug. Looking ourselves, we are done before that.
"""

from __future__ import annotations

import socket
import time

_EVERY_SECONDS = 5.0
_MISSES = 6  # half a minute: a head that keeps its state elsewhere is back sooner, and closing takes some of the rest
_CONNECT_SECONDS = 0.5


class Head:
    """The head at an address such as "10.0.0.5:6379"."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._at = host.strip("[]"), int(port)
        self._looked_at, self._misses = time.monotonic(), 0

    @property
    def gone(self) -> bool:
        """True where it could not be reached for half a minute. Looks every five seconds, for half a second at most."""
        now = time.monotonic()
        if now - self._looked_at >= _EVERY_SECONDS:
            self._looked_at = now
            self._misses = 0 if self._reached() else self._misses + 1
        return self._misses >= _MISSES

    def _reached(self) -> bool:
        try:
            socket.create_connection(self._at, _CONNECT_SECONDS).close()
        except OSError:
            return False
        return True
