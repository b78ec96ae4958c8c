import torch

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings, and much more beside another process
