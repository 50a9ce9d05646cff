"""What teachers tell, computed once and kept as files: placement `cached`.

`files` is the format, `making` computes and proves them, `price` says beforehand what that costs
and brings, `bank` reads them in training.
"""
