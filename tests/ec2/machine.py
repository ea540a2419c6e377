"""A machine of the EC2 look-alike: Linux namespaces that run user data until they are shut down."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.ec2.fake_systemd import FAKES

HERE: Final = Path(__file__).parent
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

NAMESPACES: Final = ("unshare", "-m", "-u", "-p", "-f", "--kill-child", "--mount-proc")

END_S: Final = 5.0
"""In which process 1 ends after its plug is pulled; it does in milliseconds."""

SPOT: Final = "meta-data/spot/instance-action"
REBALANCE: Final = "meta-data/events/recommendations/rebalance"


class Machine:
    """One instance from its first boot to its end; it has no second boot.

    console: file of all that its programs print. home: where its MESHGPU_HOME lies when seen from outside.
    settings: environment of the user data and the services; PATH in it goes before the system's.
    """

    def __init__(
        self, instance: str, public: str, private: str, namespace: str, directory: Path, settings: Mapping[str, str]
    ) -> None:
        self.instance = instance
        self.public = public
        self.private = private
        self.namespace = namespace
        self.settings = dict(settings)
        self.console = directory / "console"
        self.home = directory / "lib" / "meshgpu"
        self._directory = directory
        self._facts: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None

    def boot(self, user_data: bytes, ended: Callable[[], None]) -> None:
        """Start it; `ended` is called once, from a thread of its own, whatever ends it: maybe before this returns."""
        self._prepare(user_data)
        self._say(
            {
                "meta-data/instance-id": self.instance,
                "meta-data/public-ipv4": self.public,
                "meta-data/local-ipv4": self.private,
            }
        )
        path = [str(self._directory / "bin"), *filter(None, [self.settings.get("PATH")]), SYSTEM_PATH]
        init = [str(self._directory / "init"), str(self._directory), "ip-" + self.private.replace(".", "-")]
        with self.console.open("ab") as console:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *NAMESPACES, *init],
                env={"LANG": "C.UTF-8"} | self.settings | {"PATH": ":".join(path)},
                cwd="/",
                stdin=subprocess.PIPE,  # its plug, which also comes out when this process is killed
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def watch() -> None:
            process.wait()
            self._unplug()
            ended()

        self._process = process
        self._watcher = threading.Thread(target=watch, name=f"machine {self.instance}", daemon=True)
        self._watcher.start()

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        """End it at once and without a chance to clean up. Returns when none of its processes is left."""
        if self._process is None:
            return
        self._unplug()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def join(self, timeout_s: float) -> None:
        """Wait until `ended` has returned."""
        if self._watcher not in (None, threading.current_thread()):
            assert self._watcher is not None
            self._watcher.join(timeout_s)

    def argv(self, *command: str) -> list[str]:
        """Runs a command in its network, but among the processes and files of the outside."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def notice_spot(self, time_iso: str, action: str = "terminate") -> None:
        """Say that EC2 takes the machine back then."""
        self._say({SPOT: json.dumps({"action": action, "time": time_iso})})

    def recommend_rebalance(self, time_iso: str) -> None:
        self._say({REBALANCE: json.dumps({"noticeTime": time_iso})})

    def _prepare(self, user_data: bytes) -> None:
        (self._directory / "bin").mkdir(parents=True)
        for program, source in (("init", "fake_systemd.py"), ("metadata", "metadata.py"), ("user-data", "")):
            path = self._directory / program
            text = f"#!{sys.executable} -IS\n{(HERE / source).read_text()}".encode() if source else user_data
            path.write_bytes(text)
            path.chmod(0o700)
        for name in FAKES:
            (self._directory / "bin" / name).symlink_to("../init")

    def _say(self, facts: Mapping[str, str]) -> None:
        self._facts |= facts
        draft = self._directory / "metadata.json.new"
        draft.write_text(json.dumps(self._facts))
        draft.replace(self._directory / "metadata.json")

    def _unplug(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
