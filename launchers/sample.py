"""Draw images from trained weights as a captioned sheet; needs no DeepSpeed.

    python launchers/sample.py --checkpoint RUN|FILE|FOLDER [--classes all|NAME,ID,...] [--per-class N]
        [--sampler ddim|ancestral|euler] [--steps N] [--spacing leading|trailing|linspace] [--eta E]
        [--guidance G] [--cfg-channels 3|all] [--seed S] [--out FILE.png] [--npz FILE.npz]
        [--codec NAME] [--codec-path PATH] [--label-map FILE] [--from FORMAT] [--trust-pickle] ...

Weights may be a run of ours or published ones (docs/convert.md): DiT, SiT, DiT-MoE, diffusers, DeepSpeed folders, which
are converted in memory. What is not given is as the run's own sample sheets, or as published for the weights. ddim and
ancestral walk discrete schedules, euler rectified flow. --spacing and --eta are ddim's; ancestral visits --steps
respaced timesteps, rounded as published DiT does. Under torchrun, deepspeed, mpirun or srun the ranks share the work.
"""

import sys

from dsmoe.convert.incoming import read
from dsmoe.convert.options import add_reading_options
from dsmoe.evaluation.draw import Foreign, main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__, foreign=Foreign(add_reading_options, read)))
