"""Raw files to verified archives: `python -m data_prep --help`.

Sources make samples (moving_mnist.py, from what readers/ read), writers/ turn samples into an
archive, and verify.py and show.py look at any archive. The format is in docs/data_format.md.
No torch here.
"""
