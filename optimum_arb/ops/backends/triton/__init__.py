"""The Triton backend: kernels that read the packed tensors on a GPU as they are stored."""
