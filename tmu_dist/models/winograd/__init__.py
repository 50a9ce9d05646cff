"""Winograd's minimal filtering: a convolution with a sixth of the multiplications.

Lavin and Gray 2016, from Cook and Toom's fast products of polynomials (Winograd 1980). Tiles of
4 x 4 outputs are computed from 8 x 8 (5 x 5 filters) or 6 x 6 inputs (3 x 3 filters):

    y = A^T [ (G g G^T) . (B^T d B) ] A

where the sum over channels stands inside the brackets and is a matrix product at each of the
tile's points. The recurrence applies the same filters at every time step, so filters are
transformed once an update, and their gradients are summed over time as transforms.

`matrices` has A, G and B, exactly; `kernels` calls the C code (`winograd.c`); `filters` is the
convolution with its gradients; `choice` says where it is faster than the library's.

Deliberately not here: half precision (transforms amplify rounding), and devices other than CPUs.
"""
