"""The tests' tensors are tiny: several threads would only wait for each other, and on a busy machine for long.

And sums come out the same here as in the processes that tests start.
"""

import torch

torch.set_num_threads(1)
