"""The Residual U-ViT of simpler diffusion (SiD2)."""
