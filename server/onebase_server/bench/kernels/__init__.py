"""`onebase bench kernels`: every op of onebase_kernels against its peers and against what the machine can do."""
