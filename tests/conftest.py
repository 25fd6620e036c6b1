"""Use one thread: tensors of the tests are tiny, so more threads would only wait for each other.

Besides, sums then equal those in the processes that tests start.
"""

import torch

torch.set_num_threads(1)
