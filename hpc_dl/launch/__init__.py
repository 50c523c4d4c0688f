"""Start jobs on many ranks, and build Horovod for the frameworks at hand."""
