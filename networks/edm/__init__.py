"""The U-Nets of EDM: DDPM++ and NCSN++ (song) and ADM."""
