"""Pretrain a looped language model: python train/pretrain.py CONFIG.toml [--dotted.key value ...]

Start it with torchrun instead of python to use several processes (docs/guides/several-gpus.md). The training loop is in
`recurrent_db.training.trainer`.
"""

import sys

from recurrent_db.arguments import run_and_exit
from recurrent_db.commands.train import arguments, run

if __name__ == "__main__":
    run_and_exit(lambda: run(arguments(sys.argv[1:], prog="pretrain.py")))
