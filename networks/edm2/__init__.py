"""The U-Nets of EDM2 and EDM2+."""
