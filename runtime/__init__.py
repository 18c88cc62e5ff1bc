"""What a policy is executed with: tier buffers, copies, disk transfers, 4-bit kernels, attention, a decoder layer."""
