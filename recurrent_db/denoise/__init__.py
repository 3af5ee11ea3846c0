"""The mathematics of noise-conditioned denoising: densities, preconditioning, steps, the bound, blocks."""
