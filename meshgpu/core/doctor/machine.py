"""This machine alone: GPUs, containers, fence, disk, socket."""

from typing import Final

from meshgpu.model.doctor import Finding, MachineFacts, State
from meshgpu.model.inventory import (
    DRIVER_FORBIDDEN,
    DRIVER_MISMATCH,
    DRIVER_NOT_LOADED,
    DRIVER_SILENT,
    DRIVER_TOO_OLD,
    gpu_summary,
)

GB: Final = 10**9
LEAST_FREE_BYTES: Final = GB
"""Below this nothing works well, whatever the owner lets be filled."""

TIGHT: Final = 2
"""Below so many times what is to stay free, the disk is worth a look."""

_DRIVER_REMEDIES: Final = {
    DRIVER_MISMATCH: "sudo reboot",
    DRIVER_SILENT: "sudo reboot",
    DRIVER_NOT_LOADED: "sudo modprobe nvidia",
    DRIVER_FORBIDDEN: "ls -l /dev/nvidia*; sudo nvidia-modprobe",
    DRIVER_TOO_OLD: "sudo ubuntu-drivers install (or as your distribution has it), then sudo reboot",
}
APPARMOR_REMEDY: Final = (
    "sudo apt install apparmor-profiles && "
    "sudo cp /usr/share/apparmor/extra-profiles/bwrap-userns-restrict /etc/apparmor.d/ && "
    "sudo systemctl reload apparmor && meshgpu down && meshgpu up"
)
"""Lets bubblewrap, and nothing else, make user namespaces; it ships with Ubuntu 24.04, switched off."""

TOOLKIT_REMEDY: Final = (
    "sudo apt install nvidia-container-toolkit && sudo nvidia-ctk runtime configure && sudo systemctl restart docker"
)


def gpus(about: MachineFacts) -> Finding:
    inventory = about.inventory
    if about.gpu_faults:
        found = f"{gpu_summary(inventory.gpus)}; {'; '.join(about.gpu_faults)}"
        return Finding("gpus", State.FAIL, found, "nvidia-smi; then sudo reboot")
    if inventory.gpus:
        versions = f"driver {inventory.driver_version or '?'}, CUDA {inventory.cuda_version or '?'}"
        return Finding("gpus", State.OK, f"{gpu_summary(inventory.gpus)}, {versions}")
    note = inventory.gpu_note or "no GPU"
    remedy = _DRIVER_REMEDIES.get(note)
    return Finding("gpus", State.FAIL if remedy else State.SKIPPED, note.partition(":")[0], remedy)


def containers(about: MachineFacts) -> Finding:
    """A container engine that cannot hand out the GPUs that are here."""
    engine, here = about.engine, bool(about.inventory.gpus)
    if not engine.version:
        return Finding("containers", State.WARN if engine.remedy else State.SKIPPED, engine.fault, engine.remedy)
    if here and not engine.gives_gpus:
        found = f"Docker {engine.version} has no NVIDIA runtime: containers get none of the GPUs here"
        return Finding("containers", State.FAIL, found, TOOLKIT_REMEDY)
    return Finding("containers", State.OK, f"Docker {engine.version}" + (", with GPUs" if here else ""))


def fence(about: MachineFacts) -> Finding:
    """Without a fence, jobs of other users are refused; with AppArmor's restriction bubblewrap is none."""
    if about.fence:
        weaker = f" ({about.fence_reason})" if about.fence_reason else ""
        return Finding("fence", State.OK, f"{about.fence} shuts in other users' jobs{weaker}")
    found = f"other users' jobs are refused: {about.fence_reason or 'nothing works here'}"
    if not about.is_fence_wanted:
        return Finding("fence", State.WARN, found, f"sed -i /^fence/d {about.home}/config.toml")
    if not about.has_bubblewrap:
        return Finding("fence", State.FAIL, found, "sudo apt install bubblewrap && meshgpu down && meshgpu up")
    if about.restricts_userns:
        found = f"other users' jobs are refused: AppArmor keeps bubblewrap from user namespaces ({about.fence_reason})"
        return Finding("fence", State.FAIL, found, APPARMOR_REMEDY)
    return Finding("fence", State.FAIL, found, "bwrap --unshare-user --ro-bind / / true")


def python(about: MachineFacts) -> Finding:
    return Finding("python", State.OK, f"{about.python} for jobs")


def disk(about: MachineFacts) -> Finding:
    free, total = about.disk_free_bytes, about.disk_total_bytes
    kept = max(about.keep_free_bytes, LEAST_FREE_BYTES)
    found = f"{_gigabytes(free)} of {_gigabytes(total)} GB free below {about.home}"
    if free < kept:
        found = f"nearly full: {found}"
        if free < about.keep_free_bytes:
            found += f"; files are refused below {_gigabytes(about.keep_free_bytes)} GB"
        return Finding("disk", State.FAIL, found, f"du -xhd1 {about.home} | sort -h")
    if free < kept * TIGHT:
        return Finding("disk", State.WARN, f"getting full: {found}", f"du -xhd1 {about.home} | sort -h")
    return Finding("disk", State.OK, found)


def _gigabytes(size_bytes: int) -> str:
    """`0.2`, `9.7`, `130`."""
    return f"{size_bytes / GB:.{1 if size_bytes < 10 * GB else 0}f}"


def socket(about: MachineFacts) -> Finding:
    """Who may speak to the agent: its own account, and nobody else."""
    facts = about.socket
    if facts is None:
        return Finding("socket", State.SKIPPED, "no agent has made one")
    if not facts.is_own:
        found = f"{facts.path} belongs to another account, which alone may use it"
        return Finding("socket", State.FAIL, found, "sudo meshgpu doctor; or an agent of your own: meshgpu up")
    if facts.mode & 0o077:
        found = f"{facts.path} is open to other accounts (mode {facts.mode:04o})"
        return Finding("socket", State.FAIL, found, f"chmod 0600 {facts.path}")
    if facts.mode & 0o600 != 0o600:
        found = f"{facts.path} is closed to its own account (mode {facts.mode:04o})"
        return Finding("socket", State.FAIL, found, f"chmod 0600 {facts.path}")
    return Finding("socket", State.OK, f"{facts.path}, for this account alone")
