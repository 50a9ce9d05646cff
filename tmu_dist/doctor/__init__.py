"""Is everything in order for a run, on every node? `python -m tmu_dist.doctor` says what is not.

Facts are gathered where they are; findings follow from them by pure functions.

__main__.py     the command: flags, table, JSON          examination.py   all checks in turn
findings.py     names of the checks, what one found, and what to change        telling.py   words

                facts                                      findings
this machine    here.py                                    here.py
every node      nodes.py  places.py  ray_nodes.py          node_judgements.py  place_judgements.py
the ranks       ranks.py  rank_facts.py  ray_ranks.py      rank_findings.py
"""
