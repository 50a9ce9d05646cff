"""What `python -m tmu_dist.data` does: who reads what (order), how fast it is (bench)."""
