"""One thread and deterministic kernels for every test: the same numbers on every run of one machine."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = False

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("tests")
