"""What operators hear of the daemon. So far: structured logs."""
