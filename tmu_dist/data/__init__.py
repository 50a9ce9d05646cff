"""Archives of frame sequences: what they hold, who reads what when, and the loader over them.

Import the module you need (`tmu_dist.data.manifest`, `tmu_dist.data.loader`, ...). Nothing is
re-exported here, so that reading a manifest does not load torch.
"""
