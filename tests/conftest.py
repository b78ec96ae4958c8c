import torch

# Tiny tensors: a second thread costs more than it brings, and much more beside another process.
torch.set_num_threads(1)
