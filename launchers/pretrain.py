"""Pretrain a DiT or DiT-MoE on images with class labels.

    deepspeed launchers/pretrain.py --deepspeed_config ds_configs/quickstart.json [--recipe NAME|FILE]
        [--run DIR] [--plan] [key=value ...]

It also starts under torchrun, mpirun, srun and plain python.
"""

import sys

from dsmoe.training.pretrain import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
