"""Networks that other codebases trained, brought into the zoo (docs/importing_weights.md).

`state_dict` reads their files, `layouts` knows their tensors by name, `importing` makes teachers of
them. Names, shapes and gate orders are facts of those codebases; none of their code is here.
"""
