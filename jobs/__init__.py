"""Complete training jobs: one file is one run."""
