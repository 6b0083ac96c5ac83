"""Many ranks as real processes: the compiled layer's pieces with collectives of torch.distributed between them."""
