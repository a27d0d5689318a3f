"""Networks: magnitude-preserving operations, the EDM2/EDM2+ U-Net, preconditioning, encoders, network files."""
