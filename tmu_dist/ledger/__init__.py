"""Is it the teachers' knowledge that helps, or only the extra parameters?

`arms` says which runs answer that, `records` what they found, `statistics` what follows from it,
`page` shows it. The command is `python -m tmu_dist.ledger`.
"""
