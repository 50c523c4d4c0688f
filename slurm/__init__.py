"""Job scripts for Slurm: data, no code."""
