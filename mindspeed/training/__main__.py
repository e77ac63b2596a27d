"""One rank of a training job: `torchrun -m mindspeed.training ...`, or a worker of `mindspeed pretrain --nproc N`."""

from __future__ import annotations

import sys

from mindspeed.training.worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
