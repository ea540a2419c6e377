"""Makes the image that container tests run in, from this machine's static busybox, without a registry."""

import io
import tarfile
from pathlib import Path
from typing import Any

IMAGE = "meshgpu-test:busybox"
BUSYBOX = Path("/bin/busybox")
TOOLS = (
    "cat",
    "dd",
    "echo",
    "env",
    "grep",
    "head",
    "id",
    "ls",
    "pwd",
    "setsid",
    "sh",
    "sleep",
    "tail",
    "touch",
    "true",
)


def make_image(client: Any) -> None:
    """Import it into the engine of `client` (docker SDK), unless it is there. Some 0.2 s."""
    if not client.images.list(IMAGE):
        repository, _, tag = IMAGE.partition(":")
        client.api.import_image_from_data(
            _root(), repository=repository, tag=tag, changes=["ENV FROM_IMAGE=1", 'ENTRYPOINT ["/bin/true"]']
        )


def _root() -> bytes:
    """A root file system as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o755, data: bytes = b"", link: str = "") -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(data), link
            archive.addfile(entry, io.BytesIO(data))

        for directory in ("bin", "dev", "etc", "proc", "sys"):
            add(directory, tarfile.DIRTYPE)
        add("tmp", tarfile.DIRTYPE, mode=0o1777)
        add("bin/busybox", data=BUSYBOX.read_bytes())
        for tool in TOOLS:
            add(f"bin/{tool}", tarfile.SYMTYPE, link="busybox")
    return buffer.getvalue()
