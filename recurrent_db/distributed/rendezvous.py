"""What torchrun tells a process: where to find the others, and whether it is started again."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist


def rendezvous_store(first: bool, timeout: timedelta) -> Any:
    """The key-value store in which the processes find each other: torchrun's own, or the first process's.

    torchrun may keep one store over its restarts. There a restarted process would read the addresses of dead ones, so each
    start uses its own part of the store. The first process's store is new each time and needs no parts. They would even do
    harm: each node counts its own restarts, and one that returns after it was lost counts from 0 again.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"
    store = dist.TCPStore(
        *address, is_master=first and not kept, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    return dist.PrefixStore(f"recurrent_db/start-{start}", store)


def job_identity() -> dict[str, str] | None:
    """What stays the same when torchrun restarts its processes: its --rdzv-id if it was given one, else the launcher's
    process. None without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    if run != "none":
        return {"run": run}
    parent = os.getppid()
    with contextlib.suppress(OSError, IndexError):
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
        return {"host": socket.gethostname(), "launcher": f"{parent}/{started}"}
    return {"host": socket.gethostname(), "launcher": str(parent)}


def restarted() -> bool:
    """Whether torchrun started this process again after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
