"""Import this before torch: it lets the CPU's threads sleep while they wait for each other.

torch's threads meet after every operation. On Linux the first to arrive spins until the last one does, so where another
program holds a core, all wait for its slice of time: of 2,200 images a second of the default model 600 were left on two
cores of which one was busy, and 19 beside two other trainings. Giving the core away after a few microseconds leaves 960
of them busy and 980 beside two trainings, and idle costs vit_mini a quarter, larger models nothing (docs/speed.md). The
results are the same bits.
"""

import os

SPINS = "700"  # spin count: about as long as a thread takes to fall asleep and wake up

if not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS  # GNU's OpenMP reads it when torch loads it
