"""Transfer methods, one file each, behind the contract of `base.TransferMethod`."""
