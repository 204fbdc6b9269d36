"""Draw images from trained weights as a captioned sheet; needs no DeepSpeed.

    python launchers/sample.py --checkpoint RUN|FILE [--classes all|NAME,ID,...] [--per-class N]
        [--sampler ddim|ancestral|euler] [--steps N] [--spacing leading|trailing|linspace] [--eta E]
        [--guidance G] [--cfg-channels 3|all] [--seed S] [--out FILE.png] [--npz FILE.npz]

What is not given is as the run's own sample sheets. ddim and ancestral walk discrete schedules, euler rectified flow.
--spacing and --eta are ddim's; ancestral visits --steps respaced timesteps, rounded as published DiT does. Under
torchrun, deepspeed, mpirun or srun the ranks share the work.
"""

import sys

from dsmoe.evaluation.draw import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
