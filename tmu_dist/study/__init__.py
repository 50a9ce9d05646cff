"""The tables and figures of the paper, run again and set beside what the paper says.

`published` has the paper's numbers, `studies` which runs answer which table, `runs` makes them,
`verdicts` says which of the paper's claims hold, `record` and `page` keep and show it. The command
is `python -m tmu_dist.study`.
"""
