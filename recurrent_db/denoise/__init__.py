"""The mathematics of denoising: noise densities, preconditioning, steps, the likelihood bound, the partition into blocks."""
