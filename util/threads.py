"""Bound the time that torch's CPU threads spin. Import before torch. Does not change results.

torch's threads synchronise after every operation. On Linux, threads that finish first spin until the last one has
finished. If another program occupies a core, all threads wait for its time slice. With GOMP_SPINCOUNT=700, threads
sleep after a few microseconds instead. vit_mini on two cores, images/s (docs/speed.md; larger models lose nothing on
idle cores):

             idle   one core busy   beside two trainings
    default  2,200  600             19
    700      1,660  960             980
"""

import os

SPINS = "700"  # about as long as a thread takes to fall asleep and wake up

if not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS  # read by GNU OpenMP when torch loads it
