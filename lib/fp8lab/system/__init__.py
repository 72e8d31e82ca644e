"""The machine: its GPUs (NVML), locks, temporary folders."""
