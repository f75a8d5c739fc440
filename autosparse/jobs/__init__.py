"""Many independent jobs: here, in processes, on a cluster."""
