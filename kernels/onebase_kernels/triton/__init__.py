"""The ops as Triton kernels for NVIDIA GPUs; `backend.py` is what the seam asks for them."""
