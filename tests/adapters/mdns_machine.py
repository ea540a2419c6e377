"""A machine of its own for the mDNS tests: announces, prints each sighting as JSON, ends when its input closes.

usage: mdns_machine.py NODE MESH_NAME [INTERFACE]   without INTERFACE: the office network's, as the agent does
"""

import asyncio
import json
import sys
from dataclasses import asdict

from meshgpu.adapters.interfaces import chosen_addresses
from meshgpu.adapters.mdns import Mdns
from meshgpu.model.gossip import Sighting
from meshgpu.model.ids import Address, NodeId


async def main(node: str, mesh_name: str, *interface: str) -> None:
    mdns = Mdns(interface or None, poll_period_s=0.2)
    await mdns.start(lambda sighting: print(json.dumps(asdict(sighting)), flush=True))
    addresses = tuple(Address(f"{host}:7443") for host in chosen_addresses(interface or None))
    await mdns.announce(Sighting(NodeId(node), "0123456789ab", mesh_name, 1, addresses, gpus="2x RTX 4090 24GB"))
    print(json.dumps({"announced": addresses}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await mdns.stop()


asyncio.run(main(*sys.argv[1:]))
