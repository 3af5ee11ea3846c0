"""What torchrun tells a process through its environment: where to find the others, and whether it was restarted."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist


def rendezvous_store(first: bool, timeout: timedelta) -> Any:
    """The key-value store in which the processes find each other: torchrun's own, or one that the first process opens.

    torchrun keeps its own store over restarts. A restarted process would find the addresses of dead processes there, so
    each start uses its own prefix. A store of the first process is new at each start and needs no prefix. A prefix would
    even separate the processes: each node counts its own restarts, and a lost node that returns counts from 0 again.

    Args:
        first: this process opens the store if torchrun keeps none.
        timeout: of every operation on the store.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"
    store = dist.TCPStore(
        *address, is_master=first and not kept, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    return dist.PrefixStore(f"recurrent_db/start-{start}", store)


def job_identity() -> dict[str, str] | None:
    """Identifies this job across torchrun's restarts: its ``--rdzv-id`` if it has one, else the launcher's process.

    None without torchrun.
    """
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
    """Whether torchrun has restarted this process after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
