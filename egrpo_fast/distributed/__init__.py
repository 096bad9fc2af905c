"""Many ranks as one trainer: DeepSpeed, loading, checkpoints, heartbeat, signals."""
