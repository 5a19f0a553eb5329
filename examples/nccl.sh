# Settings of NCCL for clusters: source this before srun or torchrun, and measure with simclr-scale verify before and after.
# Each line says what it is for; leave out what your network does not have.

# The network that processes meet on, where a node has several (ip -brief address lists them).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# InfiniBand adapters to use, where some belong to storage.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

# A rank that waits for one that has died ends with an error, instead of waiting for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

# What NCCL chooses, in the log of rank 0: WARN once all is well.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# SimCLR sends little beside the gradient (simclr-scale plan says how much), so the defaults of NCCL_ALGO and NCCL_PROTO do.
