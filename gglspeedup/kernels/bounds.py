"""What one Philox counter and the kernels have room for; importing this brings no Numba."""

MAX_NODES = 1 << 40
MAX_HOPS = 1 << 8
MAX_BATCH = 1 << 48
MAX_FANOUT = 1024
MAX_DEGREE = (1 << 32) - 1
MAX_PARTS = 1 << 16
OWNERS_A_COUNT = 64  # nodes from one count of a part's nodes to the next
