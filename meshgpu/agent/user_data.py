"""User data: the script of an instance's first boot, and what it leaves for the agent there."""

import json
import math
import shlex
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from meshgpu.core.trust.enrolling import BOOTSTRAP_LIFE_S
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import LaunchId
from meshgpu.model.enrolment import BootTerms, InstanceTerms
from meshgpu.model.ids import MeshId
from meshgpu.wire.certificates import der, make_bootstrap, pem

TEMPLATE: Final = Path(__file__).with_name("user_data.sh")

LIMIT_BYTES: Final = 16 * 1024
"""Of user data at most (EC2 User Guide, "Instance user data considerations")."""

TERMS_FILE: Final = "terms.json"
CERTIFICATE_FILE: Final = "certificate.pem"
KEY_FILE: Final = "key.pem"


@dataclass(frozen=True, slots=True)
class Boot:
    """What an instance finds in the directory that its user data wrote: its terms, and its first listener's secrets.

    certificate, private_key: PEM.
    """

    terms: BootTerms
    certificate: bytes
    private_key: bytes

    @property
    def expires_wall_s(self) -> float:
        return self.parsed.not_valid_after_utc.timestamp()

    @property
    def parsed(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate)


def make_user_data(terms: BootTerms, install: str, now_wall_s: float) -> tuple[bytes, bytes]:
    """(script, bootstrap certificate as DER) for one launch; the certificate holds for 15 minutes from now.

    install: shell command that brings `meshgpu` onto the machine. Raises MeshgpuError `too-large` or `bad-request`.
    """
    lease_ends_wall_s = terms.terms.lease_ends_wall_s
    if lease_ends_wall_s <= now_wall_s:
        raise MeshgpuError("bad-request", "cannot rent a machine: its lease would be over before it boots")
    made = datetime.fromtimestamp(now_wall_s, UTC)
    private_key, certificate = make_bootstrap(terms.launch, made, timedelta(seconds=BOOTSTRAP_LIFE_S))
    # The moment is rounded up: what is checked against it here must not come after it there.
    lease_end = datetime.fromtimestamp(math.ceil(lease_ends_wall_s), UTC)
    values = {
        "MINUTES": str(math.ceil((lease_ends_wall_s - now_wall_s) / 60.0)),
        "LEASE_END": lease_end.strftime("%Y-%m-%d %H:%M:%S"),
        "INSTALL": shlex.quote(install),
        "TERMS": _write_terms(terms),
        "CERTIFICATE": pem(certificate).decode().strip(),
        "KEY": private_key.decode().strip(),
    }
    head, *parts = TEMPLATE.read_text().split("@")
    script = head + "".join(values[part] if number % 2 == 0 else part for number, part in enumerate(parts))
    data = script.encode()
    if len(data) > LIMIT_BYTES:
        raise MeshgpuError(
            "too-large",
            f"cannot rent a machine: its user data has {len(data)} bytes, at most {LIMIT_BYTES} fit",
            "shorten `install` with `meshgpu burst setup`",
        )
    return data, der(certificate)


def read_boot(directory: Path) -> Boot:
    """What the user data wrote; raises MeshgpuError `bad-boot` that names the file."""
    path = directory / TERMS_FILE
    try:
        terms = _read_terms(json.loads(path.read_text()))
        path = directory / CERTIFICATE_FILE
        key = directory / KEY_FILE
        if (mode := stat.S_IMODE(key.stat().st_mode)) & 0o077:
            raise MeshgpuError(
                "bad-boot", f"cannot use {key}: its mode is {mode:04o}, expected 0600", f"chmod 600 {key}"
            )
        boot = Boot(terms, path.read_bytes(), key.read_bytes())
        _ = boot.expires_wall_s
    except OSError as error:
        raise MeshgpuError("bad-boot", f"cannot read {error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise MeshgpuError("bad-boot", f"cannot use {path}: it is not what user data writes ({error!r})") from error
    return boot


def _write_terms(terms: BootTerms) -> str:
    fields = {
        "mesh": terms.mesh,
        "launch": terms.launch,
        "burst_key": terms.burst_key.hex(),
        "port": terms.port,
        "lease_ends_wall_s": terms.terms.lease_ends_wall_s,
        "idle_s": terms.terms.idle_s,
        "no_contact_s": terms.terms.no_contact_s,
    }
    return json.dumps(fields)


def _read_terms(fields: dict[str, object]) -> BootTerms:
    """Raises ValueError, KeyError or TypeError for anything but what `_write_terms` made."""
    numbers = [float(str(fields[name])) for name in ("lease_ends_wall_s", "idle_s", "no_contact_s")]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(numbers)
    return BootTerms(
        MeshId(str(fields["mesh"])),
        LaunchId(str(fields["launch"])),
        bytes.fromhex(str(fields["burst_key"])),
        int(str(fields["port"])),
        InstanceTerms(*numbers),
    )
