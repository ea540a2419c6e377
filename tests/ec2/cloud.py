"""A local EC2 whose instances run: the API, the machines, and the Internet between them and an office."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.ec2.front import LocalEc2
from tests.ec2.internet import API_HOST, Internet
from tests.ec2.machine import Machine

PROGRAMS: Final = str(Path(sys.executable).parent)

Settings = Callable[[str], Mapping[str, str]]
"""The environment of an instance's user data, by the instance's id; what is installed there comes by its PATH."""


class LocalCloud:
    """Owns the API and the Internet. settings: see Settings; without PATH in it the machines find our `meshgpu`."""

    def __init__(self, settings: Settings = lambda _: {}) -> None:
        self._settings = settings
        self.internet = Internet()
        try:
            self.ec2 = LocalEc2(self, API_HOST, self.internet.namespace)
        except BaseException:
            self.internet.close()
            raise

    def close(self) -> None:
        self.ec2.close()
        self.internet.close()

    @property
    def machines(self) -> dict[str, Machine]:
        """{instance: its machine} of all that ever booted."""
        return self.internet.machines

    def running(self) -> list[Machine]:
        return [machine for machine in self.machines.values() if machine.is_alive]

    # -- what the API does to machines ------------------------------------------------------------------------------

    def boot(self, instance: str, public: str, private: str, user_data: bytes) -> None:
        settings = {"PATH": PROGRAMS} | dict(self._settings(instance))
        self.internet.boot(instance, public, private, user_data, self.ec2.powered_off, settings)

    def terminate(self, instance: str) -> None:
        self.machines[instance].terminate()

    def allow(self, rules: list[tuple[str, int]]) -> None:
        self.internet.allow(rules)
