"""Two nodes on one machine: network namespaces with an address each, and a link between them that can be cut."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ADDRESSES = ("10.83.0.1", "10.83.0.2")

# What a container or a kernel without namespaces answers; whatever else fails is a fault of the test.
_FORBIDDEN = re.compile(r"not permitted|denied|not supported|Unknown device type", re.IGNORECASE)


class Nodes:
    """Node 0 and node 1, made by ``ip netns``."""

    def __init__(self) -> None:
        self.names = [f"simclr-{os.getpid()}-{node}" for node in (0, 1)]
        self.devices = [f"sc{os.getpid() % 10**6}v{node}" for node in (0, 1)]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, ADDRESSES, strict=True):
            ip("link", "set", device, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)

    def cut(self) -> None:
        """What is sent from now on is lost, in both directions, without a word to either side."""
        ip("-n", self.names[0], "link", "set", self.devices[0], "down")

    def mend(self) -> None:
        ip("-n", self.names[0], "link", "set", self.devices[0], "up")

    def on(self, node: int, *command: str) -> list[str]:
        """A command that runs there, under a host name of its own."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"node{node}")
        return ["ip", "netns", "exec", self.names[node], *named, *command]


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"ip {' '.join(arguments)}: {done.stderr.strip()}"
        raise PermissionError(message) if _FORBIDDEN.search(done.stderr) else RuntimeError(message)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Skips, and says what was refused, where the system does not allow it."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"two nodes need {program} (packages iproute2 and util-linux)")
    nodes = Nodes()
    try:
        try:
            nodes.make()
        except PermissionError as error:
            pytest.skip(f"the system forbids network namespaces: {error}")
        yield nodes
    finally:
        nodes.remove()
