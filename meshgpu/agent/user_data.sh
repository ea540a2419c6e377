#!/bin/bash
# First boot of a machine that meshgpu rents. Whatever fails below, it powers off when its lease ends, and the provider
# terminates a machine that powers off. The first switch counts from now; the second one survives a reboot.
shutdown -P +@MINUTES@
cat > /etc/systemd/system/meshgpu-lease.service <<'END'
[Unit]
Description=End of this rented machine's lease

[Service]
Type=oneshot
ExecStart=/usr/sbin/poweroff
END
cat > /etc/systemd/system/meshgpu-lease.timer <<'END'
[Unit]
Description=End of this rented machine's lease

[Timer]
OnCalendar=@LEASE_END@ UTC
Persistent=true
AccuracySec=1s

[Install]
WantedBy=timers.target
END
systemctl daemon-reload
systemctl enable --now meshgpu-lease.timer

# From here on a failure costs the machine.
set -eu
trap 'shutdown -P now' EXIT
umask 077
export HOME="${HOME:-/root}"
export PATH="$PATH:/usr/local/bin:$HOME/.local/bin"

# Jobs must not read this script, or whatever else the provider tells the machine.
iptables -I OUTPUT -d 169.254.169.254 -m owner ! --uid-owner 0 -j REJECT

bash -euo pipefail -c @INSTALL@
program="$(command -v meshgpu)"

mkdir -p /var/lib/meshgpu/boot
cat > /var/lib/meshgpu/boot/terms.json <<'END'
@TERMS@
END
cat > /var/lib/meshgpu/boot/certificate.pem <<'END'
@CERTIFICATE@
END
cat > /var/lib/meshgpu/boot/key.pem <<'END'
@KEY@
END
cat > /etc/systemd/system/meshgpu.service <<END
[Unit]
Description=meshgpu agent of a rented machine
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
Environment=HOME=$HOME MESHGPU_HOME=/var/lib/meshgpu
ExecStart=$program agent --cloud /var/lib/meshgpu/boot
Restart=always
RestartSec=2
# As on every machine, jobs live through the agent's restart.
KillMode=process
TimeoutStopSec=20
OOMPolicy=continue
Delegate=yes

[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload
systemctl enable --now meshgpu.service
trap - EXIT
